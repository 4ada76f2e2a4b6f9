"""torchtitan's jobs go on at other world sizes, by the lines that docs/frameworks.md gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from http_server import Served, counting_server
from processes import run_ranks

HERE = Path(__file__).parent
SAVED_WORLD_SIZE = 2


def run(python: str, function: str, world_size: int, *args: object) -> Any:
    """What rank 0 prints as JSON; all ranks must end well."""
    finished = run_ranks(
        f"{HERE / function}",
        world_size,
        args=args,
        deadline_s=120,
        env={"DS_ACCELERATOR": "cpu"},
        python=python,
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    told = [line for line in finished[0].stdout.splitlines() if line.startswith("{")]
    return json.loads(told[-1]) if told else None


@pytest.fixture(scope="module")
def saved(torchtitan: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("titan")
    run(torchtitan, "torchtitan_resume_job.py:save", SAVED_WORLD_SIZE, folder, "torchtitan")
    return folder


def check(told: dict[str, Any], world_size: int) -> None:
    assert told["loaded"] is True
    assert told["differences"] == []
    assert told["start"] == {"step": 4, "ntokens_seen": 96, "rates": [0.00025]}
    if 4 % world_size == 0:
        apart = max(abs(a - b) for a, b in zip(told["losses"], told["expected"], strict=True))
        assert apart <= (0.0 if world_size == SAVED_WORLD_SIZE else 1e-5), told


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_its_own_folder(torchtitan: str, saved: Path, world_size: int) -> None:
    told = run(torchtitan, "torchtitan_resume_job.py:resume", world_size, saved, "-", False)
    check(told, world_size)
    assert told["kind"] == "dcp"
    again = [one for one in told["warnings"] if "saved by 2 data-parallel ranks" in one]
    assert len(again) == (0 if world_size == SAVED_WORLD_SIZE else 1), told["warnings"]


def test_from_a_url(torchtitan: str, saved: Path) -> None:
    folder = saved / "checkpoint" / "step-4"
    objects = {
        f"/run/step-4/{path.relative_to(folder)}": Served(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }
    with counting_server(objects) as server:
        told = run(torchtitan, "torchtitan_resume_job.py:resume", 1, saved, server.url("/run/step-4"), False)
    check(told, 1)


def test_weights_of_a_deepspeed_folder(torchtitan: str, tmp_path: Path) -> None:
    run(torchtitan, "accelerate_job.py:save", 2, tmp_path, "zero2")
    told = run(
        torchtitan, "torchtitan_resume_job.py:resume", 2, tmp_path, tmp_path / "state" / "pytorch_model", True
    )
    assert told["differences"] == []
    assert (told["kind"], told["loaded"]) == ("deepspeed", True)
