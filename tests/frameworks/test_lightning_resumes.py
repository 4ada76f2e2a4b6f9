"""Lightning's jobs go on at other world sizes, by the lines that docs/frameworks.md gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from framework_jobs import Publish, run_job

SAVED_WORLD_SIZE = 2
Saved = Callable[[str], Path]
run = functools.partial(run_job, deadline_s=120)


@pytest.fixture
def saved(saved_run: Callable[..., Path]) -> Saved:
    """Runs a job on two ranks, once for each kind; gives the folder that it wrote."""

    def save(kind: str) -> Path:
        job = "fabric" if kind.startswith("fabric") else "lightning"
        return saved_run(f"{job}_resume_job", SAVED_WORLD_SIZE, kind, deadline_s=120)

    return save


def check(told: dict[str, Any], world_size: int) -> None:
    assert told["differences"] == []
    if told["whole"]:  # three ranks have no four samples between them
        apart = max(abs(a - b) for a, b in zip(told["losses"], told["expected"], strict=True))
        assert apart <= (0.0 if world_size == SAVED_WORLD_SIZE else 1e-5), told
    assert bool(told["warnings"]) == (not told["whole"] and told["batch_known"]), told["warnings"]


@pytest.mark.parametrize(
    ("kind", "world_size", "scheme"),
    [
        ("zero2", 1, "file"), ("zero2", 2, "file"), ("zero2", 3, "file"),
        ("zero3", 1, "http"), ("zero3", 2, "file"), ("zero3", 3, "s3"),
        ("ddp", 1, "http"), ("ddp", 2, "file"), ("ddp", 3, "s3"),
    ],
)  # fmt: skip
def test_fit_goes_on(
    frameworks: str, saved: Saved, published: Publish, kind: str, world_size: int, scheme: str
) -> None:
    folder = saved(kind)
    with published(scheme, folder / "step-4.ckpt") as place:
        told = run(
            frameworks,
            "lightning_resume_job.py:resume",
            world_size,
            *(folder, kind, place.uri),
            env=place.env,
        )
    check(told, world_size)
    assert told["start"] == {
        "step": 4, "epoch": 0, "last_epoch": 4, "rates": [0.00025], "counted": 4,
    }  # fmt: skip
    assert told["batch_numbers"] == [4, 5, 6, 7]


def test_a_file_that_tells_the_ranks(frameworks: str, saved: Saved) -> None:
    """Such a file does not tell the batch: another number of ranks is a warning."""
    folder = saved("noted")
    told = run(frameworks, "lightning_resume_job.py:resume", 1, folder, "noted", folder / "step-4.ckpt")
    assert told["differences"] == []
    (warning,) = told["warnings"]
    assert "was saved by 2 ranks, and here are 1; it does not tell how many samples a step was" in warning


@pytest.mark.parametrize(("kind", "world_size"), [("zero1", 2), ("zero2", 1), ("zero3", 3)])
def test_validate(frameworks: str, saved: Saved, kind: str, world_size: int) -> None:
    folder = saved(kind)
    told = run(
        frameworks, "lightning_resume_job.py:validate", world_size, folder, kind, folder / "step-4.ckpt"
    )
    assert abs(told["losses"][0] - told["expected"][0]) < 1e-6, told
    assert told["step"] == 4
    assert {"callbacks", "loops", "pytorch-lightning_version"} <= set(told["extra"])


@pytest.mark.parametrize(
    ("kind", "world_size", "scheme"),
    [
        ("fabric-zero2", 1, "http"),
        ("fabric-zero2", 2, "file"),
        ("fabric-zero2", 3, "s3"),
        ("fabric-zero3", 1, "s3"),
        ("fabric-zero3", 2, "file"),
        ("fabric-zero3", 3, "http"),
    ],
)
def test_fabric_goes_on(
    frameworks: str, saved: Saved, published: Publish, kind: str, world_size: int, scheme: str
) -> None:
    folder = saved(kind)
    with published(scheme, folder / "step-4") as place:
        told = run(
            frameworks, "fabric_resume_job.py:resume", world_size, folder, kind, place.uri, env=place.env
        )
    check(told, world_size)
    assert told["step"] == 4
    assert told["rest"] == {"left": [1, 2], "note": {"a": [1]}}


def test_a_batch_that_fabric_was_not_told(frameworks: str, saved: Saved) -> None:
    """Then Fabric tells DeepSpeed of one sample a rank, which is no batch to compare with."""
    folder = saved("fabric-zero2")
    for world_size, told_of in ((1, 1), (2, 0)):
        told = run(
            frameworks, "fabric_resume_job.py:resume", world_size, folder, "fabric-untold2", folder / "step-4"
        )
        found = [one for one in told["warnings"] if "was saved by 2 ranks, and here are 1" in one]
        assert (len(found), len(told["warnings"])) == (told_of, told_of), told["warnings"]
