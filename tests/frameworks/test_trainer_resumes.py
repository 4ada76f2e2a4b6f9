"""Jobs of transformers' Trainer go on at other numbers of ranks, by the lines that docs/frameworks.md gives."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from framework_jobs import Publish, run_job
from places import TESTS
from processes import run_ranks
from rankload.distributed.watchdog import EXIT_CODE

JOB = "trainer_resume_job"
SAVED_AT = 4
GLOBAL_BATCH = 6
STALL_S = 5
"""As the job's ``stall_timeout_s``."""
Saved = Callable[..., Path]
run = functools.partial(run_job, deadline_s=150)


@pytest.fixture
def saved(saved_run: Callable[..., Path]) -> Saved:
    """Runs a job, once for each kind and number of ranks; gives the folder that it wrote."""
    return lambda kind, world_size=2: saved_run(JOB, world_size, kind, deadline_s=150)


def check(told: dict[str, Any], expected: dict[str, Any], world_size: int) -> None:
    """What a resumed job told is what the saving job, which went on, had."""
    assert told["differences"] == []
    assert (told["step"], told["final"], told["rates"]) == (SAVED_AT, 2 * SAVED_AT, expected["rates"])
    assert told["warnings"] == []
    assert told["seen"] == expected["seen"][SAVED_AT:]
    assert len(told["losses"]) == 2 * SAVED_AT
    apart = max(abs(a - b) for a, b in zip(told["losses"], expected["losses"], strict=True))
    assert apart <= (0.0 if world_size == len(expected["states"]) else 1e-5)
    check_states(told["states"], expected["states"])
    assert told["callbacks"].count("RandomStates") == 0


def check_states(found: list[Any], saved: list[Any]) -> None:
    """Each rank goes on with its own random states, those without with others that no rank has."""
    both = min(len(found), len(saved))
    assert found[:both] == saved[:both]
    of_torch = [states[-1] for states in found]
    assert len(set(of_torch)) == len(of_torch)


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        ("zero2", 1),
        ("zero2", 2),
        ("zero2", 3),
        ("zero3", 1),
        ("zero3", 3),
        ("ddp", 1),
        ("ddp", 2),
        ("ddp", 3),
    ],
)
def test_goes_on(frameworks: str, saved: Saved, tmp_path: Path, kind: str, world_size: int) -> None:
    folder = saved(kind)
    expected = json.loads((folder / "numbers.json").read_text())
    told = run(frameworks, f"{JOB}.py:resume", world_size, folder, kind, folder, GLOBAL_BATCH, tmp_path)
    check(told, expected, world_size)


def test_from_one_rank(frameworks: str, saved: Saved, tmp_path: Path) -> None:
    kind = "ddp"
    folder = saved(kind, 1)
    expected = json.loads((folder / "numbers.json").read_text())
    told = run(frameworks, f"{JOB}.py:resume", 2, folder, kind, folder, GLOBAL_BATCH, tmp_path)
    check(told, expected, 2)


@pytest.mark.parametrize(
    ("kind", "world_size", "scheme"),
    [("zero2", 3, "http"), ("zero3", 1, "s3"), ("ddp", 1, "http"), ("ddp", 3, "s3")],
)
def test_from_a_uri(
    frameworks: str, saved: Saved, published: Publish, tmp_path: Path, kind: str, world_size: int, scheme: str
) -> None:
    folder = saved(kind)
    expected = json.loads((folder / "numbers.json").read_text())
    with published(scheme, folder / "checkpoint-4") as place:
        told = run(
            frameworks,
            f"{JOB}.py:resume",
            world_size,
            *(folder, kind, place.uri, GLOBAL_BATCH, tmp_path),
            env=place.env,
        )
        if place.web is not None:
            # An engine's weights are its own; without one, Trainer reads them, and the node has one copy.
            copied = place.web.gets("/run/checkpoint-4/model.safetensors")
            assert (copied == 0) == (kind == "zero2")
    check(told, expected, world_size)


def test_the_newest_of_a_run_in_a_store(
    frameworks: str, saved: Saved, published: Publish, tmp_path: Path
) -> None:
    """A run's folder in a bucket, which a killed save left another checkpoint in."""
    folder = saved("zero2")
    expected = json.loads((folder / "numbers.json").read_text())
    killed = folder / "checkpoint-9"
    (killed / "trainer_state.json").write_text("{")
    try:
        with published("s3", folder) as place:
            told = run(
                frameworks,
                f"{JOB}.py:resume",
                1,
                *(folder, "zero2", place.uri, GLOBAL_BATCH, tmp_path),
                env=place.env,
            )
    finally:
        (killed / "trainer_state.json").unlink()
    check(told, expected, 1)


@pytest.mark.parametrize("kind", ["zero2", "ddp"])
def test_another_batch_is_warned_of(frameworks: str, saved: Saved, tmp_path: Path, kind: str) -> None:
    folder = saved(kind)
    told = run(frameworks, f"{JOB}.py:resume", 1, folder, kind, folder, 3, tmp_path)
    assert told["differences"] == []
    (warning,) = told["warnings"]
    assert "a step was 6 samples when the checkpoint was saved, and is 3 here" in warning


def test_a_rank_that_fails_in_trainers_own_load_ends_all(
    frameworks: str, saved: Saved, tmp_path: Path
) -> None:
    folder = saved("ddp")
    told = run(frameworks, f"{JOB}.py:fails_on_one_rank", 2, folder, "ddp")
    assert told is None


def test_a_rank_that_stands_still_in_trainers_own_load_ends_the_others(
    frameworks: str, saved: Saved, tmp_path: Path
) -> None:
    """They wait for it in a collective, which no exception reaches."""
    began = tmp_path / "began"
    finished = run_ranks(
        f"{TESTS / 'frameworks' / JOB}.py:stops_on_one_rank",
        2,
        args=(saved("ddp"), "ddp", began),
        deadline_s=150,
        env={"DS_ACCELERATOR": "cpu"},
        kill_once_others_end=(1,),
        python=frameworks,
    )
    seconds = time.monotonic() - float(began.read_text())
    assert finished[0].returncode == EXIT_CODE, finished
    assert "Trainer's own load" in finished[0].stderr
    assert "rank 1" in finished[0].stderr
    assert STALL_S < seconds < STALL_S + 10, finished


def test_nothing_to_resume_from_and_an_error_in_the_block(frameworks: str, tmp_path: Path) -> None:
    run(frameworks, f"{JOB}.py:mistakes", 1, tmp_path / "run")
