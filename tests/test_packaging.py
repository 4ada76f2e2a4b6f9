"""The project outside its own folder: as a wheel, beside Dask, and in a clone with an awkward name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from places import REPOSITORY

DEADLINE_S = 240
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def run(
    *command: str | Path, cwd: Path, deadline_s: float = DEADLINE_S, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "RANKLOAD"))
    }
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=deadline_s,
    )


def pip(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    return run(sys.executable, "-m", "pip", *arguments, *quiet, cwd=cwd)


def clone(target: Path) -> Path:
    """The working tree without what git ignores, copied to `target`."""
    listed = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=REPOSITORY)
    if listed.returncode != 0:
        pytest.skip("not a git repository: what belongs to it cannot be listed")
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy, so that no build folder appears in the repository."""
    source = clone(tmp_path_factory.mktemp("source") / "some other name")
    out = tmp_path_factory.mktemp("wheel")
    built = pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source, cwd=out)
    assert built.returncode == 0, built.stderr
    (found,) = out.glob("rankload-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that the wheel is installed into."""
    target = tmp_path_factory.mktemp("installed")
    done = pip("install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    assert done.returncode == 0, done.stderr
    return target


def python(code: str, *, path: Path, cwd: Path) -> str:
    """What `code` prints, run elsewhere, with `path` first and the editable installation switched off."""
    without_editable = (
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    )
    done = run(sys.executable, "-c", without_editable + code, cwd=cwd, PYTHONPATH=str(path))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_every_package_and_nothing_else_at_top_level(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rankload"}
    homes = {
        "rankload": "rankload",
        **{f"rankload/{name}": name for name in ("distributed", "launch", "loader")},
        "rankload/integrations": "launch/integrations",
    }
    for package, home in homes.items():
        assert f"{package}/py.typed" in names
        found = {path.relative_to(REPOSITORY / home) for path in (REPOSITORY / home).rglob("*.py")}
        if home == "launch":
            found = {path for path in found if path.parts[0] != "integrations"}
        assert len(found) >= 2
        assert {f"{package}/{path}" for path in found} <= names


def test_wheel_works_elsewhere(installed, tmp_path):
    code = """
import rankload.loader, rankload.distributed, rankload.launch.cli
from rankload import State, load_checkpoint, LoadOptions
from rankload.loader import State, load_checkpoint, LoadOptions
print(rankload.loader.__file__)
"""
    printed = python(code, path=installed, cwd=tmp_path)
    assert Path(printed) == installed / "rankload" / "loader" / "__init__.py"


@pytest.mark.parametrize("where", ["beside a clone", "in a clone"])
def test_an_installed_wheel_wins_over_a_clone(installed, tmp_path, where):
    there = clone(tmp_path / "rankload")
    code = """
import rankload
from rankload import State, load
import rankload.loader.sources.zero.layout as layout
print(layout.__file__)
print(callable(load), rankload.__version__)
"""
    printed = python(code, path=installed, cwd=there.parent if where == "beside a clone" else there)
    file, said = printed.splitlines()
    assert Path(file) == installed / "rankload" / "loader" / "sources" / "zero" / "layout.py"
    assert said == "True 0.1.0"


def test_python_m_rankload_is_the_command_line(installed, tmp_path):
    for module in ("rankload", "rankload.launch"):
        said = run(sys.executable, "-m", module, "--version", cwd=tmp_path, PYTHONPATH=str(installed))
        assert (said.returncode, said.stdout.strip()) == (0, "rankload 0.1.0"), said.stderr


def test_the_distribution_has_the_packages_version():
    import rankload

    assert metadata.version("rankload") == rankload.__version__


def test_wheel_brings_the_command(installed, tmp_path):
    said = run(installed / "bin" / "rankload", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert (said.returncode, said.stdout.strip()) == (0, "rankload 0.1.0"), said.stderr


def test_wheel_restores_a_checkpoint_elsewhere(installed, tmp_path):
    code = """
import torch
from rankload import State, load
saved, fresh = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
torch.save({"state": State(model=saved).state_dict()}, "saved.pt")
result = load("saved.pt", State(model=fresh), load_weights_only=True)
print(torch.equal(saved.weight, fresh.weight), len(result.receipt.files))
"""
    assert python(code, path=installed, cwd=tmp_path) == "True 1"


@pytest.mark.takes_long
def test_beside_an_installed_dask(wheel, tmp_path):
    target = tmp_path / "site"
    got = pip("install", "--no-deps", "--target", target, "distributed", "dask", wheel, cwd=tmp_path)
    if got.returncode != 0 and "rankload" not in got.stderr:
        pytest.skip("no package index can be reached to install Dask from")
    assert got.returncode == 0, got.stderr
    code = """
from importlib.util import find_spec
import rankload.loader, rankload.distributed
print(find_spec("distributed").origin)
print(find_spec("dask").origin)
print(rankload.distributed.__file__)
"""
    dask_distributed, dask, ours = map(Path, python(code, path=target, cwd=tmp_path).splitlines())
    assert dask_distributed == target / "distributed" / "__init__.py"
    assert (target / "distributed" / "scheduler.py").exists()
    assert dask == target / "dask" / "__init__.py"
    assert ours == target / "rankload" / "distributed" / "__init__.py"


def test_a_clone_of_any_name_runs_its_tests(tmp_path):
    there = clone(tmp_path / "my clone-1.0")
    done = run(*PYTEST, "tests/loader/test_template.py", cwd=there)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.takes_long
def test_a_clone_of_any_name_collects_every_test(tmp_path):
    there = clone(tmp_path / "my clone-1.0")
    done = run(*PYTEST, "--collect-only", "tests", cwd=there)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
