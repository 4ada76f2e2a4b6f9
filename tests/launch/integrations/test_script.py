"""The script that docs/frameworks.md gives goes on at another number of ranks: samples, learning rate, step, losses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from framework_jobs import Publish
from places import SUPPORT
from processes import run_ranks

WORKER = SUPPORT / "script_worker.py"


def run(world_size: int, folder: Path, steps: int, dropout: float, *args: object, **env: str) -> Any:
    finished = run_ranks(
        f"{WORKER}:train", world_size, args=(folder, steps, dropout, *args), deadline_s=120, env=env
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    (line,) = (line for line in finished[0].stdout.splitlines() if line.startswith("{"))
    return json.loads(line)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], tuple[Path, Any]]:
    """A run of two ranks that was not stopped, once for each dropout: its folder, and what it tells."""
    known: dict[float, tuple[Path, Any]] = {}

    def run_whole(dropout: float) -> tuple[Path, Any]:
        if dropout not in known:
            folder = tmp_path_factory.mktemp("whole")
            known[dropout] = folder, run(2, folder, 12, dropout)
        return known[dropout]

    return run_whole


@pytest.mark.parametrize(
    ("world_size", "dropout", "apart"), [(1, 0.0, 1e-5), (3, 0.0, 1e-5), (2, 0.5, 0.0), (2, 0.0, 0.0)]
)
def test_a_script_goes_on(
    whole: Callable[[float], tuple[Path, Any]],
    world_size: int,
    dropout: float,
    apart: float,
    tmp_path: Path,
) -> None:
    folder, expected = whole(dropout)
    (tmp_path / "run").mkdir()
    for path in (folder / "run").glob("step6.*"):
        shutil.copy2(path, tmp_path / "run")
    told = run(world_size, tmp_path, 12, dropout)
    check(told, expected, apart)
    assert (tmp_path / "run" / "step12.pt").exists()


def check(told: Any, expected: Any, apart: float) -> None:
    """A job that went on at step 6 did what the one did that was not stopped."""
    assert (told["step"], told["sampler"]) == (12, expected["sampler"])
    assert len(told["steps"]) == 6
    for step, before in zip(told["steps"], expected["steps"][6:], strict=True):
        assert step["samples"] == before["samples"]
        assert step["rate"] == before["rate"]
        assert abs(step["loss"] - before["loss"]) <= apart


@pytest.mark.parametrize(("scheme", "world_size"), [("http", 3), ("s3", 1)])
def test_a_script_goes_on_from_a_uri(
    whole: Callable[[float], tuple[Path, Any]],
    published: Publish,
    tmp_path: Path,
    scheme: str,
    world_size: int,
) -> None:
    """Of a web server the file; in a bucket the run, to which it saves too, and from where it goes on again."""
    folder, expected = whole(0.0)
    (tmp_path / "run").mkdir()
    for path in (folder / "run").glob("step6.*"):
        shutil.copy2(path, tmp_path / "run")
    with published(scheme, tmp_path / "run") as place:
        if scheme == "http":
            told = run(world_size, tmp_path, 12, 0.0, f"{place.uri}/step6.pt", 100)
        else:
            told = run(world_size, tmp_path, 12, 0.0, place.uri, **place.env)
            again = run(1, tmp_path, 13, 0.0, place.uri, **place.env)
            assert (again["step"], len(again["steps"])) == (13, 1)
    check(told, expected, 1e-5)
