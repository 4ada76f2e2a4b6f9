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
Saved = Callable[[str, str], Path]
run = functools.partial(run_job, deadline_s=150)


@pytest.fixture
def saved(saved_run: Callable[..., Path]) -> Saved:
    """Runs a job on two ranks, once for each kind and schedule; gives the folder that it wrote."""
    return lambda kind, schedule: saved_run(JOB, SAVED_WORLD_SIZE, kind, schedule, deadline_s=150)


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
    ("kind", "schedule", "world_size", "batch"),
    [
        ("zero2", "samples", 1, ""),
        ("zero2", "samples", 2, ""),
        ("zero2", "samples", 3, ""),
        ("zero3", "samples", 1, ""),
        ("zero3", "samples", 2, ""),
        ("zero3", "samples", 3, ""),
        ("ddp", "steps", 1, ""),
        ("ddp", "steps", 2, ""),
        ("ddp", "steps", 3, ""),
        ("ddp", "stairs", 1, GLOBAL_BATCH),
    ],
)
def test_goes_on(
    frameworks: str, saved: Saved, kind: str, schedule: str, world_size: int, batch: object
) -> None:
    folder = saved(kind, schedule)
    told = run(frameworks, f"{JOB}.py:resume", world_size, folder, kind, schedule, folder / "state", batch)
    check(told, folder, world_size)


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
