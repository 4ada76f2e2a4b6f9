"""What the benchmarks' tables rest on: which pairs are tried, what is measured, and where it is written."""

from __future__ import annotations

import ast
import importlib
import itertools
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from places import REPOSITORY, SUPPORT

sys.path.append(str(REPOSITORY))

from reshard_modules_worker import TARGETS
from reshard_worker import SETTINGS, kind_of

from benchmarks.gauge import gauged
from benchmarks.reshard_matrix import SIZES, Matrix, covering
from benchmarks.tables import publish

SOURCES = tuple(SETTINGS)


@pytest.mark.parametrize(("name", "targets"), [("engines", SOURCES), ("modules", TARGETS)])
def test_every_pair_is_tried_and_every_size_met(name: str, targets: tuple[str, ...]) -> None:
    matrix = Matrix(name, SUPPORT, targets) if name == "engines" else Matrix(name, SUPPORT, targets, None)
    cases = covering(matrix, SOURCES, SIZES)
    assert len(set(cases)) == len(cases)
    assert {(source, target) for source, _, target, _ in cases} == {
        (source, target)
        for source, target in itertools.product(SOURCES, targets)
        if name == "modules" or kind_of(source) == kind_of(target)
    }
    for end in (1, 3):
        assert {(case[0], case[end]) for case in cases} == set(itertools.product(SOURCES, SIZES))
        assert {(case[2], case[end]) for case in cases} == set(itertools.product(targets, SIZES))
    assert {(n, m) for _, n, _, m in cases} == set(itertools.product(SIZES, SIZES))


def test_a_block_is_measured_with_its_children(tmp_path: Path) -> None:
    code = (
        "import sys, time; held = bytearray(b'x') * 50_000_000; "
        "open(sys.argv[1], 'wb').write(held[:3_000_000]); open(sys.argv[1], 'rb').read(); time.sleep(0.5)"
    )
    with gauged(family=True, folder=tmp_path) as cost:
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=True, timeout=60)
    assert cost.seconds > 0.5
    assert cost.io["wchar"] >= 3_000_000
    assert cost.io["rchar"] >= 3_000_000
    assert cost.disk == 3_000_000
    assert cost.anonymous > 40_000_000
    assert cost.resident >= cost.anonymous


def test_a_table_takes_its_own_place_only(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "a\n<!-- one: begin -->\nold\n<!-- one: end -->\nb\n<!-- two: begin -->\n<!-- two: end -->\nc\n"
    )
    publish(path, "one", "new")
    publish(path, "two", "newer")
    publish(path, "one", "newest")
    assert path.read_text() == (
        "a\n<!-- one: begin -->\nnewest\n<!-- one: end -->\nb\n<!-- two: begin -->\nnewer\n<!-- two: end -->\nc\n"
    )
    with pytest.raises(SystemExit, match="no place for the table: <!-- three: begin -->"):
        publish(path, "three", "new")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_of_ours_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["benchmarks" if node.level else "", node.module]))
            if module.split(".")[0] in ("rankload", "benchmarks"):
                found = importlib.import_module(module)
                for name in (alias.name for alias in node.names):
                    assert hasattr(found, name) or find_spec(f"{module}.{name}"), f"{module} has no {name}"
