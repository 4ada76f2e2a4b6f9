"""torchtitan's jobs go on at other world sizes, by the lines that docs/frameworks.md gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from framework_jobs import Publish, run_job

SAVED_WORLD_SIZE = 2
SAVED_AT = 4
GLOBAL_BATCH = 6
run = functools.partial(run_job, deadline_s=120)


@pytest.fixture
def saved(torchtitan: str, saved_run: Callable[..., Path]) -> Path:
    """What torchtitan's Trainer saved."""
    return saved_run("torchtitan_trainer_job", SAVED_WORLD_SIZE, "trainer", deadline_s=120)


@pytest.mark.parametrize(
    ("world_size", "scheme"), [(1, "own"), (2, "own"), (3, "own"), (1, "http"), (2, "s3"), (3, "s3")]
)
def test_its_trainer_goes_on(
    torchtitan: str, saved: Path, published: Publish, world_size: int, scheme: str
) -> None:
    with published(scheme, saved / "checkpoint" / "step-4") as place:
        path = "-" if scheme == "own" else place.uri
        told = run(
            torchtitan,
            "torchtitan_trainer_job.py:resume",
            world_size,
            *(saved, path, GLOBAL_BATCH),
            env=place.env,
        )
    expected, same = told["expected"], world_size == SAVED_WORLD_SIZE
    assert told["differences"] == []
    assert (told["kind"], told["start"]) == ("dcp", expected["start"])
    assert told["seen"] == expected["seen"][SAVED_AT:]
    apart = max(abs(a - b) for a, b in zip(told["losses"], expected["losses"][SAVED_AT:], strict=True))
    assert apart <= (0.0 if same else 1e-5), told
    assert told["batch"] == []
    assert len(told["position"]) == (0 if same else 1)
    assert all("saved by 2 data-parallel ranks" in one for one in told["position"])


def test_another_batch_is_warned_of(torchtitan: str, saved: Path) -> None:
    told = run(torchtitan, "torchtitan_trainer_job.py:resume", 1, saved, "-", 3)
    (warning,) = told["batch"]
    assert "a step was 72 tokens on average when the checkpoint was saved, and is 36 here" in warning
    assert told["start"] == told["expected"]["start"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_manager_of_a_script(torchtitan: str, saved_run: Callable[..., Path], world_size: int) -> None:
    """Without its Trainer; the position in the data has a tensor and lists."""
    folder = saved_run("torchtitan_resume_job", SAVED_WORLD_SIZE, "torchtitan", deadline_s=120)
    told = run(torchtitan, "torchtitan_resume_job.py:resume", world_size, folder, "-", False)
    same = world_size == SAVED_WORLD_SIZE
    assert (told["loaded"], told["kind"], told["differences"]) == (True, "dcp", [])
    assert told["start"] == {"step": 4, "ntokens_seen": 96 if same else 64, "rates": [0.00025]}
    if same:
        assert told["losses"] == told["expected"]
    for text in ("the position in the data is not restored", "was saved by 2 ranks, and here are 3"):
        assert [text in one for one in told["warnings"]].count(True) == (0 if same else 1), told["warnings"]


def test_weights_of_a_deepspeed_folder(torchtitan: str, tmp_path: Path) -> None:
    run(torchtitan, "accelerate_job.py:save", 2, tmp_path, "zero2")
    told = run(
        torchtitan, "torchtitan_resume_job.py:resume", 2, tmp_path, tmp_path / "state" / "pytorch_model", True
    )
    assert told["differences"] == []
    assert (told["kind"], told["loaded"]) == ("deepspeed", True)
