"""The script that docs/frameworks.md gives goes on at another number of ranks: samples, learning rate, step, losses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import SUPPORT
from processes import run_ranks

WORKER = SUPPORT / "script_worker.py"


def run(world_size: int, folder: Path, steps: int, dropout: float) -> Any:
    finished = run_ranks(f"{WORKER}:train", world_size, args=(folder, steps, dropout), deadline_s=120)
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
    assert (told["step"], told["sampler"]) == (12, expected["sampler"])
    assert len(told["steps"]) == 6
    for step, before in zip(told["steps"], expected["steps"][6:], strict=True):
        assert step["samples"] == before["samples"]
        assert step["rate"] == before["rate"]
        assert abs(step["loss"] - before["loss"]) <= apart
    assert (tmp_path / "run" / "step12.pt").exists()
