"""What jobs of real frameworks saved goes into jobs without the framework, at other world sizes, and goes on there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import run_ranks

HERE = Path(__file__).parent
SAVED_WORLD_SIZE = 2
CHECKPOINTS = {
    "trainer": "checkpoint-4",
    "accelerate": "state",
    "lightning": "last.ckpt",
    "torchtitan": "checkpoint/step-4",
}
"""Where each writer's job leaves its checkpoint of step 4."""
TARGETS = (("plain", 1), ("plain", 2), ("fsdp2", 2), ("zero1", 2), ("zero3", 3))
ENGINES_OWN = "state/engine"
"""What DeepSpeed's files have, and only an engine takes."""

SAMPLES_PER_STEP = 4

Saved = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def saved(frameworks: str, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Runs a writer's job on two ranks, once for each kind; gives the folder that it wrote."""
    known: dict[tuple[str, str], Path] = {}

    def save(writer: str, kind: str) -> Path:
        if (writer, kind) not in known:
            folder = tmp_path_factory.mktemp(f"{writer}-{kind}")
            finished = run_ranks(
                f"{HERE / f'{writer}_job.py'}:save",
                SAVED_WORLD_SIZE,
                args=(folder, kind),
                deadline_s=240,
                env={"DS_ACCELERATOR": "cpu"},
                python=frameworks,
            )
            assert [rank.returncode for rank in finished] == [0] * SAVED_WORLD_SIZE, finished
            known[writer, kind] = folder
        return known[writer, kind]

    return save


def restored(
    python: str, folder: Path, writer: str, target: str, world_size: int, *, kind: str, path: str = ""
) -> dict[str, Any]:
    """What a job of `world_size` ranks reports that restored the checkpoint in `folder` into `target`."""
    finished = run_ranks(
        f"{HERE / 'restore_job.py'}:restore",
        world_size,
        args=(folder, path or folder / CHECKPOINTS[writer], f"{writer}-{kind}", target),
        deadline_s=240,
        env={"DS_ACCELERATOR": "cpu"},
        python=python,
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    (line,) = (line for line in finished[0].stdout.splitlines() if line.startswith("{"))
    told: dict[str, Any] = json.loads(line)
    return told


def check(told: dict[str, Any], *, same: bool = False, left: tuple[str, ...] = ()) -> None:
    """`same`: the target is of the writer's kind and size, so that the next losses are equal in every bit."""
    assert told["differences"] == []
    assert tuple(told["not_restored"]) == left
    expected = told["numbers"].get("losses")
    # Three ranks have no four samples a step between them.
    if expected is not None and told["samples"] == SAMPLES_PER_STEP:
        apart = max(abs(a - b) for a, b in zip(told["losses"], expected[4:], strict=True))
        assert apart <= (0.0 if same else 1e-5), (told["losses"], expected[4:])


def left_of(kind: str, target: str) -> tuple[str, ...]:
    return (ENGINES_OWN,) if kind.startswith("zero") and not target.startswith("zero") else ()


@pytest.mark.parametrize(("target", "world_size"), TARGETS)
@pytest.mark.parametrize("kind", ["plain", "zero2", "zero3"])
def test_trainer(frameworks: str, saved: Saved, kind: str, target: str, world_size: int) -> None:
    told = restored(frameworks, saved("trainer", kind), "trainer", target, world_size, kind=kind)
    check(told, left=left_of(kind, target))
    assert (told["step"], told["rng"], told["layout"]) == (4, world_size, "trainer")
    assert "trainer_state" in told["extra"]


@pytest.mark.parametrize(("target", "world_size"), TARGETS)
@pytest.mark.parametrize("kind", ["plain", "zero2", "zero3"])
def test_accelerate(frameworks: str, saved: Saved, kind: str, target: str, world_size: int) -> None:
    told = restored(frameworks, saved("accelerate", kind), "accelerate", target, world_size, kind=kind)
    check(told, same=world_size == 2 and target == kind, left=left_of(kind, target))
    assert (told["rng"], told["layout"]) == (world_size, "accelerate")


@pytest.mark.parametrize(("target", "world_size"), TARGETS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_lightning(frameworks: str, saved: Saved, kind: str, target: str, world_size: int) -> None:
    told = restored(frameworks, saved("lightning", kind), "lightning", target, world_size, kind=kind)
    check(told, same=world_size == 2 and target == {"ddp": "plain", "fsdp2": "fsdp2"}[kind])
    assert told["step"] == 4
    assert {"epoch", "global_step", "pytorch-lightning_version"} <= set(told["extra"])


@pytest.mark.parametrize(("target", "world_size"), TARGETS)
def test_torchtitan(torchtitan: str, saved: Saved, target: str, world_size: int) -> None:
    told = restored(torchtitan, saved("torchtitan", "fsdp2"), "torchtitan", target, world_size, kind="fsdp2")
    check(told, same=world_size == 2 and target == "fsdp2")
    assert told["step"] == 4
