"""What the benchmarks' tables rest on: which pairs are tried, what is measured, and where it is written."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sources_worker
import torch
from deepspeed_ranks import ENVIRONMENT, needs_deepspeed
from places import REPOSITORY, SUPPORT
from processes import run_ranks

sys.path.append(str(REPOSITORY))

from reshard_modules_worker import TARGETS
from reshard_worker import SETTINGS, kind_of, slug

from benchmarks import sources_matrix
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


@needs_deepspeed
def test_every_source_meets_every_target() -> None:
    cases = sources_matrix.every()
    assert len(set(cases)) == len(cases)
    sizes: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for source, n, target, m in cases:
        sizes.setdefault((source, target), set()).add((n, m))
    assert sizes.keys() == set(itertools.product(sources_worker.SOURCES, sources_worker.TARGETS))
    for (source, target), met in sizes.items():
        # Meshes of two dimensions are of four ranks.
        n = {4} if "HSDP" in source or "TP" in source else {2, 4}
        assert met >= set(itertools.product(n, {4} if target in ("HSDP", "TP with FSDP2") else {2}))
    for target in ("FSDP2", "ZeRO 3 fp32"):
        assert sizes["DCP by name of FSDP2", target] == set(itertools.product(SIZES, SIZES))
        assert {m for _, m in sizes["safetensors, one file", target]} == set(SIZES)
    assert sources_matrix.report(cases, dict.fromkeys(cases, GOOD)).count(" all |") == 2
    one = ("DCP by name of FSDP2", 2, "plain", 2)
    text = sources_matrix.report(
        cases, {**dict.fromkeys(cases, GOOD), one: {**GOOD, "problems": ["step/odd"]}}
    )
    assert "| plain | 2→2 **✗**, 4→2 |" in text
    assert "\n- ✗ DCP by name of FSDP2 of 2 → plain of 2: step/odd" in text
    assert f"{len(cases) - 1} of {len(cases)} restored" in text


GOOD = {"problems": [], "tensors": 1, "seconds": 0.5, "apart": 0.0}


@pytest.mark.takes_long
@needs_deepspeed
def test_sources_are_restored_into_targets(tmp_path: Path) -> None:
    """Most sources into a few targets each, on two ranks; and the comparison finds what differs."""
    cases = sources_matrix.quick()
    assert {target for _, _, target, _ in cases} >= sources_worker.TARGETS.keys() - {"HSDP", "TP with FSDP2"}
    sources = list(dict.fromkeys(source for source, *_ in cases))
    found = restored(
        2,
        *("save", json.dumps({"root": str(tmp_path), "settings": sources})),
        *("restore", json.dumps({"root": str(tmp_path), "cases": [case[:3] for case in cases]})),
    )
    assert [(one["source"], one["n"], one["target"], one["m"]) for one in found] == cases
    assert [one for one in found if one["problems"]] == []
    assert min(one["tensors"] for one in found) >= 15
    (source, other) = ("DCP by name of FSDP2", "one .pt by hand")
    for name, value in ((source, 1e-9), (other, 1e-3)):
        path = tmp_path / slug(name, 2) / "oracle.pt"
        oracle = torch.load(path, weights_only=True)
        oracle["tensors"]["exp_avg/blocks.1.up.bias"][3] += value
        oracle["losses"][1] += value
        torch.save(oracle, path)
    altered = [(source, 2, "plain"), (source, 2, "FSDP2"), (other, 2, "ZeRO 1 fp32")]
    request = json.dumps({"root": str(tmp_path), "cases": altered})
    for one in restored(1, "restore", request):
        tensors = [problem for problem in one["problems"] if not problem.startswith("losses")]
        assert tensors == ["exp_avg/blocks.1.up.bias"]
        assert (len(one["problems"]) == 2) == (one["source"] == other)


def restored(world_size: int, *steps: str) -> list[dict[str, Any]]:
    finished = run_ranks(
        SUPPORT / "sources_worker.py", world_size, args=steps, deadline_s=300, env=ENVIRONMENT
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    lines = [json.loads(line) for line in finished[0].stdout.splitlines() if line.startswith("{")]
    return [line for line in lines if "saved" not in line]


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
