"""Jobs of Accelerate go on at other numbers of processes, by the lines that docs/frameworks.md gives."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from framework_jobs import Publish, run_job

JOB = "accelerate_resume_job"
SAVED_WORLD_SIZE = 2
GLOBAL_BATCH = 6
Saved = Callable[..., Path]
run = functools.partial(run_job, deadline_s=150)


@pytest.fixture
def saved(saved_run: Callable[..., Path]) -> Saved:
    """Runs a job on two ranks, once for each kind and schedule; gives the folder that it wrote."""

    def save(kind: str, schedule: str, *, attached: bool = True) -> Path:
        return saved_run(JOB, SAVED_WORLD_SIZE, kind, schedule, attached, deadline_s=150)

    return save


def check(told: dict[str, Any], folder: Path, world_size: int, within: float = 1e-5) -> None:
    """What a resumed job told is what the saving job, which went on, had."""
    expected = json.loads((folder / "numbers.json").read_text())
    assert told["differences"] == []
    assert told["rate"] == expected["rate"]
    assert told["rates"] == pytest.approx(expected["rates"], rel=1e-12)
    assert (told["seen"], told["step"], told["warnings"]) == (expected["seen"], expected["step"], [])
    apart = max(abs(a - b) for a, b in zip(told["losses"], expected["losses"], strict=True))
    assert apart <= (0.0 if world_size == SAVED_WORLD_SIZE else within)
    found, states = told["states"], expected["states"]
    both = min(len(found), len(states))
    assert found[:both] == states[:both]
    assert len({each[-1] for each in found}) == len(found)


@pytest.mark.parametrize(
    ("kind", "schedule", "world_size"),
    [
        ("zero2", "samples", 1),
        ("zero2", "samples", 2),
        ("zero2", "samples", 3),
        ("zero2", "one-cycle", 1),
        ("zero3", "samples", 1),
        ("zero3", "samples", 2),
        ("zero3", "samples", 3),
        ("ddp", "steps", 1),
        ("ddp", "steps", 2),
        ("ddp", "steps", 3),
        ("ddp", "samples", 3),
        ("ddp", "one-cycle", 1),
        ("ddp", "one-cycle", 3),
    ],
)
def test_goes_on(frameworks: str, saved: Saved, kind: str, schedule: str, world_size: int) -> None:
    folder = saved(kind, schedule)
    told = run(frameworks, f"{JOB}.py:resume", world_size, folder, kind, schedule, folder / "state", "")
    check(told, folder, world_size)


def test_the_batch_of_a_job_that_was_not_attached(frameworks: str, saved: Saved) -> None:
    """It is passed, or is not known, which is a warning at another number of processes."""
    folder = saved("ddp", "stairs", attached=False)
    told = run(frameworks, f"{JOB}.py:resume", 1, folder, "ddp", "stairs", folder / "state", GLOBAL_BATCH)
    check(told, folder, 1)
    folder = saved("ddp", "steps", attached=False)
    told = run(frameworks, f"{JOB}.py:resume", 1, folder, "ddp", "steps", folder / "state", "")
    (warning,) = told["warnings"]
    assert "was saved by 2 ranks, and here are 1; it does not tell how many samples a step was" in warning
    check({**told, "warnings": []}, folder, 1)


@pytest.mark.parametrize(("kind", "schedule"), [("ddp", "steps"), ("zero2", "one-cycle")])
def test_another_batch_is_warned_of(frameworks: str, saved: Saved, kind: str, schedule: str) -> None:
    folder = saved(kind, schedule)
    told = run(frameworks, f"{JOB}.py:resume", 1, folder, kind, schedule, folder / "state", "", 3)
    (warning,) = told["warnings"]
    numbers = (12, 6) if schedule == "steps" else (6, 3)  # of the first loader
    assert "a step was {} samples when the checkpoint was saved, and is {} here".format(*numbers) in warning


@pytest.mark.parametrize(
    ("kind", "schedule", "world_size", "scheme"),
    [
        ("zero2", "samples", 3, "http"),
        ("zero3", "samples", 1, "s3"),
        ("ddp", "steps", 1, "s3"),
        ("ddp", "steps", 3, "http"),
    ],
)
def test_from_a_uri(
    frameworks: str, saved: Saved, published: Publish, kind: str, schedule: str, world_size: int, scheme: str
) -> None:
    folder = saved(kind, schedule)
    with published(scheme, folder / "state") as place:
        told = run(
            frameworks,
            f"{JOB}.py:resume",
            world_size,
            *(folder, kind, schedule, place.uri, ""),
            env=place.env,
        )
    check(told, folder, world_size)
