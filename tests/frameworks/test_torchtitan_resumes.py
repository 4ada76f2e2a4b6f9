"""torchtitan's jobs go on at other world sizes, by the lines that docs/frameworks.md gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from framework_jobs import Publish, run_job

SAVED_WORLD_SIZE = 2
run = functools.partial(run_job, deadline_s=120)


@pytest.fixture
def saved(torchtitan: str, saved_run: Callable[..., Path]) -> Path:
    return saved_run("torchtitan_resume_job", SAVED_WORLD_SIZE, "torchtitan", deadline_s=120)


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


@pytest.mark.parametrize(("world_size", "scheme"), [(1, "http"), (3, "s3")])
def test_from_a_uri(torchtitan: str, saved: Path, published: Publish, world_size: int, scheme: str) -> None:
    with published(scheme, saved / "checkpoint" / "step-4") as place:
        told = run(
            torchtitan,
            "torchtitan_resume_job.py:resume",
            world_size,
            *(saved, place.uri, False),
            env=place.env,
        )
    check(told, world_size)


def test_weights_of_a_deepspeed_folder(torchtitan: str, tmp_path: Path) -> None:
    run(torchtitan, "accelerate_job.py:save", 2, tmp_path, "zero2")
    told = run(
        torchtitan, "torchtitan_resume_job.py:resume", 2, tmp_path, tmp_path / "state" / "pytorch_model", True
    )
    assert told["differences"] == []
    assert (told["kind"], told["loaded"]) == ("deepspeed", True)
