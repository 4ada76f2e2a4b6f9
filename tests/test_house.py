"""How the house is built: who imports whom, what an import costs, and what no module may do."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("distributed", "loader", "launch")
MAY_IMPORT = {"distributed": set(), "loader": {"distributed"}, "launch": {"loader", "distributed"}}
PURE = (
    "loader.archive",
    "loader.arguments",
    "loader.cache",
    "loader.cache_bounds",
    "loader.cache_entry",
    "loader.cache_folder",
    "loader.cache_homes",
    "loader.cache_records",
    "loader.checksums",
    "loader.decompress",
    "loader.digests",
    "loader.dtypes",
    "loader.direct_places",
    "loader.direct_reads",
    "loader.errors",
    "loader.fetch_needs",
    "loader.fetch_plan",
    "loader.http_address",
    "loader.http_answer",
    "loader.http_connections",
    "loader.http_exchange",
    "loader.ignore",
    "loader.intervals",
    "loader.joint_checks",
    "loader.known_globals",
    "loader.layout_roles",
    "loader.legacy_file",
    "loader.locate",
    "loader.manifest",
    "loader.manifest_find",
    "loader.mismatch",
    "loader.model_parallel",
    "loader.monolithic",
    "loader.names",
    "loader.node_image",
    "loader.numpy_pickles",
    "loader.options",
    "loader.origin",
    "loader.partial_file",
    "loader.pickle_build",
    "loader.pickle_opcodes",
    "loader.pickle_read",
    "loader.pickle_scan",
    "loader.preflight",
    "loader.progress",
    "loader.range_engine",
    "loader.range_http",
    "loader.range_local",
    "loader.range_pace",
    "loader.range_peer",
    "loader.range_retries",
    "loader.range_runs",
    "loader.range_source",
    "loader.range_sums",
    "loader.range_targets",
    "loader.range_window",
    "loader.ranges",
    "loader.receipt",
    "loader.s3_sums",
    "loader.safe_types",
    "loader.saved_parts",
    "loader.sniff",
    "loader.stopwatch",
    "loader.storage_names",
    "loader.store",
    "loader.store_errors",
    "loader.store_local",
    "loader.stored_sums",
    "loader.strided",
    "loader.symlinks",
    "loader.template",
    "loader.timestamps",
    "loader.torch_file",
    "loader.trace",
    "loader.transfer",
    "loader.tree_walk",
    "loader.values",
    "loader.weight_regions",
    "loader.whole_checks",
    "loader.workers",
    "loader.zero_contents",
    "loader.zero_experts",
    "loader.zero_fields",
    "loader.zero_files",
    "loader.zero_layers",
    "loader.zero_layout",
    "loader.zero_model_states",
    "loader.zero_optim_states",
    "loader.zero_whole",
    "loader.zip_file",
    "distributed.agreement",
    "distributed.beats",
    "distributed.courier",
    "distributed.errors",
    "distributed.failures",
    "distributed.launchers",
    "distributed.liveness",
    "distributed.range_server",
    "distributed.topology",
    "launch.children",
    "launch.cli",
    "launch.demo",
    "launch.demo_server",
)
"""Modules that read, plan, list and speak: no torch, store SDK or NumPy is imported in or behind them."""
LAZY = (
    "loader.algorithms",
    "loader.fetch",
    "loader.fetch_one",
    "loader.range_fsspec",
    "loader.range_open",
    "loader.range_signed",
    "loader.state",
    "loader.storage_read",
    "loader.store_fsspec",
    "loader.store_http",
    "loader.store_http_errors",
    "loader.store_objects",
    "distributed.channel",
    "distributed.group",
    "distributed.mailbox",
    "distributed.rendezvous",
    "distributed.session",
    "distributed.shutdown",
)
"""Modules that import such things only inside functions, where they are used."""
HEAVY = ("torch", "deepspeed", "fsspec", "aiohttp", "s3fs", "numpy")
LONG: dict[str, int] = {}
"""Modules that may be longer than 300 lines, and how long."""
PUBLIC = {
    "AccessError",
    "Algorithm",
    "AlgorithmError",
    "AlgorithmPass",
    "CorruptError",
    "Event",
    "FormatError",
    "LayoutError",
    "LoadOptions",
    "LoadResult",
    "MismatchError",
    "NotFoundError",
    "OptionError",
    "PartialRestoreError",
    "PeerError",
    "RankloadError",
    "Receipt",
    "StalledError",
    "State",
    "TemplateError",
    "TimestampError",
    "TopologyError",
    "UnsafeError",
    "capture_rng",
    "gather_rng",
    "load",
    "load_checkpoint",
    "register_algorithm",
    "restore_rng",
}
"""What users are promised: neither more nor less."""


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            yield package, path


def label(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


MODULES = [pytest.param(package, path, id=label(path)) for package, path in modules()]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported(path: Path) -> Iterator[tuple[int, str, int]]:
    """``(level, module, line)`` of every import in a module, inside functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                yield node.level, name, node.lineno


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_imports_go_one_way_and_are_relative_inside(package, path):
    depth = len(path.relative_to(REPOSITORY / package).parts)
    for level, module, line in imported(path):
        where = f"{label(path)}:{line}"
        if level == 0:
            first = module.split(".")[0]
            assert first != "rankload", f"{where} imports {module}: say it relatively"
            assert first not in PACKAGES, f"{where} imports {module}, which would be another distribution's"
        elif level > depth:
            assert level == depth + 1, f"{where} climbs out of the house"
            target = module.split(".")[0]
            allowed = MAY_IMPORT[package]
            assert target in allowed, f"{where}: {package} imports {target}; allowed: {sorted(allowed)}"


@pytest.mark.parametrize("name", PURE)
def test_pure_module_imports_nothing_heavy(name):
    path = REPOSITORY / (name.replace(".", "/") + ".py")
    for level, module, line in imported(path):
        if level == 0:
            assert module.split(".")[0] not in HEAVY, f"{label(path)}:{line} imports {module}"


def loaded_after(statement: str) -> set[str]:
    """The top-level names in ``sys.modules`` of a fresh interpreter after `statement`."""
    code = (
        f"import json, sys\n{statement}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_pure_and_lazy_modules_load_without_torch_or_fsspec():
    loaded = loaded_after("\n".join(f"import rankload.{name}" for name in (*PURE, *LAZY)))
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_is_cheap(package):
    assert not loaded_after(f"import rankload.{package}") & set(HEAVY)


def test_public_names():
    api = importlib.import_module("rankload.loader")
    assert sorted(api.__all__) == sorted(PUBLIC)
    for name in api.__all__:
        assert getattr(api, name) is not None
        assert name in dir(api)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = api.no_such_name


def test_every_public_name_is_documented():
    text = "\n".join(
        path.read_text() for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    )
    api = importlib.import_module("rankload.loader")
    assert not [name for name in api.__all__ if f"`{name}" not in text and f"{name}(" not in text]


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_module_is_short_and_named_for_what_it_does(package, path):
    lines = len(path.read_text().splitlines())
    assert lines < 300 or lines <= LONG.get(label(path), 0), f"{label(path)} has {lines} lines"
    assert path.stem not in {"utils", "helpers", "misc", "util", "helper", "common"}


FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.loads",
    "yaml.load",
    "os.system",
    "torch.load",
}


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_nothing_is_run_or_unpickled_and_nothing_asserted(package, path):
    for node in ast.walk(tree(path)):
        where = f"{label(path)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: raise an error of the tree instead of assert"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN_CALLS, f"{where} calls {called}"
            for keyword in node.keywords:
                told = f"{keyword.arg}={ast.unparse(keyword.value)}"
                assert told not in {"weights_only=False", "shell=True", "allow_pickle=True"}, (
                    f"{where}: {told}"
                )
        if isinstance(node, ast.ImportFrom) and node.module in {"pickle", "marshal", "yaml"}:
            names = {alias.name for alias in node.names}
            assert not names & {"load", "loads", "Unpickler"}, f"{where} imports {names} from {node.module}"


def test_modules_have_docstrings():
    assert not [label(path) for _, path in modules() if not ast.get_docstring(tree(path))]


def test_the_map_shows_every_module() -> None:
    shown = (REPOSITORY / "docs" / "map.md").read_text()
    modules = {path.stem for package in PACKAGES for path in (REPOSITORY / package).glob("[a-z]*.py")}
    named = set(re.findall(r"`([a-z_0-9]+)`", shown))
    assert sorted(modules - named) == []
    assert sorted(name for name in named - modules if "_" in name) == []
