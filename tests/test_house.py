"""How the house is built: who imports whom, what an import costs, and what no module may do."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
from places import REPOSITORY

PACKAGES = ("distributed", "loader", "launch", "integrations")
HOMES = {"integrations": "launch/integrations"}
"""Where a package's modules lie, if not in a folder of its name."""
MAY_IMPORT = {
    "distributed": set(),
    "loader": {"distributed"},
    "launch": {"loader", "distributed"},
    "integrations": {"loader", "distributed"},
}
ROOMS = (
    ("resuming",),
    ("journey", "reading", "saving", "exporting", "wholeness", "comparing"),
    ("finding", "inspection", "prefetching"),
    ("completeness", "planning"),
    ("alone",),
    ("opening", "right_indexes"),
    ("request", "receipt", "rng"),
    ("targets", "sources", "verify", "fetch", "writing"),
    ("context",),
    ("materialize",),
    ("formats",),
    ("cache", "candidates", "ranges"),
    ("stores",),
    ("http",),
    ("saved",),
    (
        "state",
        "options",
        "stages",
        "changes",
        "wire",
        "template",
        "checksums",
        "store_errors",
        "retries",
    ),
    ("byte_ranges", "collector", "plurals", "redaction", "torch_modes", "workers"),
    ("errors",),
)
"""The rooms of `loader`, from left to right: each may import any room of a later line, and none of its own line."""
HEAVY = ("torch", "deepspeed", "fsspec", "aiohttp", "s3fs", "numpy")
CLIENTS = {
    "deepspeed", "fsspec", "aiohttp", "s3fs", "botocore", "boto3", "gcsfs", "google", "adlfs", "azure", "paramiko",
    "huggingface_hub", "requests", "zstandard", "transformers", "accelerate", "lightning", "composer", "torchtitan",
}  # fmt: skip
"""Stores' SDKs, and frameworks that call a load: none is imported before a load needs it."""
MAY_IMPORT_HEAVY = {
    "loader.materialize": {"torch", "numpy"},
    "loader.targets": {"torch"},
    "loader.verify": {"torch"},
    "loader.exporting": {"torch"},
    "loader.rng": {"torch", "numpy"},
    "loader.saving": {"torch"},
    "loader.comparing": {"torch"},
    "launch.demo_fixture": {"torch"},
    "launch.demo_model": {"torch", "numpy"},
    "launch.demo_train": {"torch"},
}
"""Rooms and modules that import such things at their top: whoever imports them has torch."""
MAY_IMPORT_HEAVY_LATE = {
    "integrations": {
        "torch",
        "deepspeed",
        "transformers",
        "accelerate",
        "lightning",
        "composer",
        "torchtitan",
    },
    "loader.exporting": {"torch"},
    "loader.stores": {"fsspec", "aiohttp"},
    "loader.state": {"torch"},
    "loader.targets": {"torch"},
    "loader.torch_modes": {"torch"},
    "launch.elastic": {"torch"},
    "distributed": {"torch"},
}
"""Rooms and modules that import such things inside functions, where they are used. All others never do."""
WITH_TORCH = {
    *MAY_IMPORT_HEAVY, "loader.journey", "loader.reading", "loader.resuming", "loader.fetch.parts",
    "integrations.deepspeed", "integrations.transformers", "integrations.accelerate", "integrations.choosing",
    "integrations.random_states",
}  # fmt: skip
"""What may have torch once it is imported. Everything else loads without: it reads, plans, lists and speaks."""
LIGHT_IN_THERE = {
    "loader.verify.joint", "loader.targets.deepspeed.shared_memory", "loader.targets.deepspeed.weight_regions",
    "loader.targets.deepspeed.parameter_sources",
    "loader.materialize.new_pages", "loader.materialize.placing", "loader.materialize.safe_types",
    "loader.materialize.slices", "loader.materialize.staging", "loader.materialize.storages",
    "loader.targets.algorithms",
    "loader.comparing.leaves", "loader.comparing.results",
}  # fmt: skip
"""Modules of those rooms that load without it all the same."""
NEED_THEIR_FRAMEWORK = {
    "integrations.lightning", "integrations.fabric", "integrations.torchtitan", "integrations.composer",
}  # fmt: skip
"""Adapters whose classes are subclasses of their framework's: they cannot be imported where it is not installed."""
PUBLIC = {
    "AccessError",
    "Algorithm",
    "AlgorithmError",
    "AlgorithmPass",
    "CorruptError",
    "Event",
    "FormatError",
    "FoundCheckpoint",
    "InternalError",
    "LayoutError",
    "LoadOptions",
    "LoadResult",
    "MismatchError",
    "MissingFrozenError",
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
    "autoresume",
    "capture_rng",
    "find_checkpoints",
    "gather_rng",
    "load",
    "load_checkpoint",
    "read",
    "register_algorithm",
    "restore_rng",
    "save_checkpoint",
}
"""What users are promised: neither more nor less."""


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted(home_of(package).rglob("*.py")):
            if package in HOMES or not any(
                path.is_relative_to(REPOSITORY / other) for other in HOMES.values()
            ):
                yield package, path


def home_of(package: str) -> Path:
    return REPOSITORY / HOMES.get(package, package)


def label(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def named(path: Path) -> str:
    """A module's name below ``rankload``."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    for package, home in HOMES.items():
        if path.is_relative_to(REPOSITORY / home):
            parts = (package, *parts[len(Path(home).parts) :])
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [pytest.param(package, path, id=label(path)) for package, path in modules()]


@functools.cache
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
    depth = len(path.relative_to(home_of(package)).parts)
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


def import_graph() -> dict[str, set[str]]:
    """Which module of the house imports which, inside functions and under ``TYPE_CHECKING`` too."""
    known = {named(path): path for _, path in modules()}
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, *filter(None, [node.module])])
                for alias in node.names:
                    whole = f"{module}.{alias.name}"
                    graph[name].add(whole if whole in known else module)
    return graph


def test_no_module_imports_itself_by_way_of_others():
    graph = import_graph()
    ended: set[str] = set()

    def follow(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"an import circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in ended:
            for other in sorted(graph[name]):
                follow(other, (*way, name))
            ended.add(name)

    for name in graph:
        follow(name, ())


def test_rooms_import_only_rooms_to_their_right():
    line_of = {room: line for line, rooms in enumerate(ROOMS) for room in rooms}
    forbidden = set()
    for name, others in import_graph().items():
        for other in others:
            if name.startswith("loader.") and other.startswith("loader."):
                here, there = name.split(".")[1], other.split(".")[1]
                if here != there and line_of[here] >= line_of[there]:
                    forbidden.add((name.removeprefix("loader."), other.removeprefix("loader.")))
    assert sorted(forbidden) == []


def inside(name: str, places: Collection[str]) -> bool:
    """Whether the module `name` is one of `places`, or lies in one of them."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_only_some_rooms_import_what_is_heavy(package, path):
    nodes = tree(path)
    late = {
        line
        for node in ast.walk(nodes)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    for level, module, line in imported(path):
        first = module.split(".")[0]
        if level == 0 and first in HEAVY:
            table = MAY_IMPORT_HEAVY_LATE if line in late else MAY_IMPORT_HEAVY
            allowed = {
                each for place, names in table.items() if inside(named(path), [place]) for each in names
            }
            assert first in allowed, f"{label(path)}:{line} imports {module}"


def loaded_after(statement: str) -> set[str]:
    """The top-level names in ``sys.modules`` of a fresh interpreter after `statement`."""
    code = (
        f"import json, sys\n{statement}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_what_reads_and_plans_loads_without_torch_or_fsspec():
    heavy = WITH_TORCH | NEED_THEIR_FRAMEWORK
    light = [named(path) for _, path in modules() if not inside(named(path), heavy)]
    light.remove("launch.__main__")
    light += LIGHT_IN_THERE
    assert len(light) > 100
    loaded = loaded_after("\n".join(f"import rankload.{name}" for name in light))
    assert not loaded & set(HEAVY)


def test_the_front_door_is_two_files_that_import_our_packages_alone():
    found = sorted((REPOSITORY / "rankload").glob("*.py"))
    assert [path.name for path in found] == ["__init__.py", "__main__.py"]
    for path in found:
        for level, module, line in imported(path):
            ours = level == 1 and module.split(".")[0] in PACKAGES
            assert ours or module in sys.stdlib_module_names, f"{label(path)}:{line} imports {module}"
    assert not loaded_after("import rankload") & set(HEAVY)


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_is_cheap(package):
    assert not loaded_after(f"import rankload.{package}") & set(HEAVY)


@pytest.mark.parametrize("package", ["rankload", "rankload.loader"])
def test_public_names(package):
    api = importlib.import_module(package)
    assert sorted(set(api.__all__) - {"__version__"}) == sorted(PUBLIC)
    assert ("__version__" in api.__all__) == (package == "rankload")
    for name in api.__all__:
        assert getattr(api, name) is not None
        assert name in dir(api)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = api.no_such_name


def test_no_module_is_in_the_way_of_a_public_name():
    code = """
import importlib, json, pkgutil, types
import rankload, rankload.loader, rankload.distributed, rankload.launch
for package in (rankload.loader, rankload.distributed, rankload.launch):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        # In a clone, launch/integrations is seen as a part of launch, too: only rankload.integrations is one.
        if not module.name.endswith("__main__") and ".launch.integrations" not in module.name:
            importlib.import_module(module.name)
for api in (rankload, rankload.loader):
    for name in api.__all__:
        assert not isinstance(getattr(api, name), types.ModuleType), name
"""
    loaded_after(code)


def test_resolving_load_imports_no_store_no_deepspeed_and_no_framework():
    by_torch = loaded_after("import torch, torch.distributed, torch.distributed.tensor")
    loaded = loaded_after("from rankload import load, State, LoadOptions, restore_rng")
    assert "torch" in loaded
    assert not (loaded - by_torch) & CLIENTS


def test_help_explains_every_argument_in_place():
    from rankload import LoadOptions, State, load, load_checkpoint, read, save_checkpoint

    for documented, names in (
        (load, inspect.signature(load).parameters),
        (load_checkpoint, inspect.signature(load_checkpoint).parameters),
        (read, inspect.signature(read).parameters),
        (save_checkpoint, inspect.signature(save_checkpoint).parameters),
        (LoadOptions, LoadOptions.__dataclass_fields__),
        (State, inspect.signature(State).parameters),
    ):
        explained = re.findall(r"^    (\w+): ", inspect.getdoc(documented) or "", flags=re.M)
        assert explained[: len(names)] == list(names)
    arguments = [
        inspect.getdoc(one).split("Args:")[1].split("Returns:")[0] for one in (load, load_checkpoint)
    ]
    assert arguments[0] == arguments[1]


def test_every_public_name_is_documented():
    text = "\n".join(
        path.read_text() for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    )
    api = importlib.import_module("rankload.loader")
    assert not [name for name in api.__all__ if f"`{name}" not in text and f"{name}(" not in text]


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_module_is_named_for_what_it_does(package, path):
    assert path.stem not in {"utils", "helpers", "misc", "util", "helper", "common"}


@pytest.mark.parametrize(("package", "path"), MODULES)
def test_a_long_module_says_why(package, path):
    if len(path.read_text().splitlines()) > 600:
        assert "One file: " in (ast.get_docstring(tree(path)) or ""), (
            f"{label(path)} is long, and does not say why"
        )


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


def test_nobody_is_told_to_fetch_again():
    """A load does that by itself; what it then says is that the stored file is damaged."""
    advice = re.compile(r"\b(fetch|download)( or \w+)? (it|them|the [a-z ]+) again", re.IGNORECASE)
    told = [
        f"{label(path)}:{node.lineno}: {node.value}"
        for _, path in modules()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value
        if advice.search(node.value)
    ]
    assert told == []


def test_modules_have_docstrings():
    assert not [label(path) for _, path in modules() if not ast.get_docstring(tree(path))]


def test_the_map_shows_every_room_and_nothing_else() -> None:
    shown = set(re.findall(r"`([a-z_0-9]+)/?`", (REPOSITORY / "docs" / "map.md").read_text()))
    rooms = {room for line in ROOMS for room in line}
    ours = {path.stem for package in PACKAGES for path in (REPOSITORY / package).rglob("[a-z]*")}
    assert rooms - shown == set()
    assert {path.stem for path in (REPOSITORY / "distributed").glob("[a-z]*.py")} - shown == set()
    ours |= {path.name for path in REPOSITORY.iterdir()} | set(PUBLIC)
    assert shown - ours == set()


def test_files_that_the_docs_name_are_there() -> None:
    named_there = {
        (page.name, path)
        for page in [*REPOSITORY.glob("*.md"), *sorted((REPOSITORY / "docs").glob("*.md"))]
        for path in re.findall(
            r"\b((?:loader|distributed|launch|rankload|tests|benchmarks|configs)/[\w/]+\.\w+)",
            page.read_text(),
        )
    }
    assert len(named_there) > 10
    assert sorted((page, path) for page, path in named_there if not (REPOSITORY / path).exists()) == []
