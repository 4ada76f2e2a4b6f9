"""Jobs of transformers' Trainer go on at other numbers of ranks, by the lines that docs/frameworks.md gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_server import Served, counting_server
from processes import run_ranks

HERE = Path(__file__).parent
SAVED_AT = 4
GLOBAL_BATCH = 6
Saved = Callable[..., Path]


def run(python: str, job: str, world_size: int, *args: object) -> Any:
    """What rank 0 of a job's function prints as JSON; all ranks must end well."""
    finished = run_ranks(
        f"{HERE / job}", world_size, args=args, deadline_s=150, env={"DS_ACCELERATOR": "cpu"}, python=python
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    told = [line for line in finished[0].stdout.splitlines() if line.startswith('{"')]
    return json.loads(told[-1]) if told else None


def served(folder: Path) -> dict[str, Served]:
    return {
        f"/run/{path.relative_to(folder)}": Served(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def saved(frameworks: str, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Runs a job, once for each kind and number of ranks; gives the folder that it wrote."""
    known: dict[tuple[str, int], Path] = {}

    def save(kind: str, world_size: int = 2) -> Path:
        if (kind, world_size) not in known:
            folder = tmp_path_factory.mktemp(f"{kind}-{world_size}")
            run(frameworks, "trainer_resume_job.py:save", world_size, folder, kind)
            known[kind, world_size] = folder
        return known[kind, world_size]

    return save


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
    told = run(
        frameworks, "trainer_resume_job.py:resume", world_size, folder, kind, folder, GLOBAL_BATCH, tmp_path
    )
    check(told, expected, world_size)


def test_from_one_rank(frameworks: str, saved: Saved, tmp_path: Path) -> None:
    kind = "ddp"
    folder = saved(kind, 1)
    expected = json.loads((folder / "numbers.json").read_text())
    told = run(frameworks, "trainer_resume_job.py:resume", 2, folder, kind, folder, GLOBAL_BATCH, tmp_path)
    check(told, expected, 2)


@pytest.mark.parametrize(("kind", "world_size"), [("zero2", 3), ("ddp", 1)])
def test_from_a_url(frameworks: str, saved: Saved, tmp_path: Path, kind: str, world_size: int) -> None:
    folder = saved(kind)
    expected = json.loads((folder / "numbers.json").read_text())
    with counting_server(served(folder)) as server:
        path = server.url("/run/checkpoint-4")
        told = run(
            frameworks, "trainer_resume_job.py:resume", world_size, folder, kind, path, GLOBAL_BATCH, tmp_path
        )
        # An engine's weights are its own; without one, Trainer reads them, and the node has one copy.
        copied = server.gets("/run/checkpoint-4/model.safetensors")
    check(told, expected, world_size)
    assert (copied == 0) == (kind == "zero2")


@pytest.mark.parametrize("kind", ["zero2", "ddp"])
def test_another_batch_is_warned_of(frameworks: str, saved: Saved, tmp_path: Path, kind: str) -> None:
    folder = saved(kind)
    told = run(frameworks, "trainer_resume_job.py:resume", 1, folder, kind, folder, 3, tmp_path)
    assert told["differences"] == []
    (warning,) = told["warnings"]
    assert "a step was 6 samples when the checkpoint was saved, and is 3 here" in warning


def test_nothing_to_resume_from_and_an_error_in_the_block(frameworks: str, tmp_path: Path) -> None:
    run(frameworks, "trainer_resume_job.py:mistakes", 1, tmp_path / "run")
