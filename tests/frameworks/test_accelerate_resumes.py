"""Jobs of Accelerate go on at other numbers of processes, by the lines that docs/frameworks.md gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_server import Served, counting_server
from processes import run_ranks

HERE = Path(__file__).parent
SAVED_WORLD_SIZE = 2
GLOBAL_BATCH = 6
Saved = Callable[[str, str], Path]


def run(python: str, function: str, world_size: int, *args: object) -> Any:
    """What rank 0 prints as JSON; all ranks must end well."""
    finished = run_ranks(
        f"{HERE / 'accelerate_resume_job.py'}:{function}",
        world_size,
        args=args,
        deadline_s=150,
        env={"DS_ACCELERATOR": "cpu"},
        python=python,
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    told = [line for line in finished[0].stdout.splitlines() if line.startswith('{"')]
    return json.loads(told[-1]) if told else None


@pytest.fixture(scope="module")
def saved(frameworks: str, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Runs a job on two ranks, once for each kind and schedule; gives the folder that it wrote."""
    known: dict[tuple[str, str], Path] = {}

    def save(kind: str, schedule: str) -> Path:
        if (kind, schedule) not in known:
            folder = tmp_path_factory.mktemp(f"{kind}-{schedule}")
            run(frameworks, "save", SAVED_WORLD_SIZE, folder, kind, schedule)
            known[kind, schedule] = folder
        return known[kind, schedule]

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
    ("kind", "schedule", "world_size", "batch"),
    [
        ("zero2", "samples", 1, ""),
        ("zero2", "samples", 2, ""),
        ("zero2", "samples", 3, ""),
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
    told = run(frameworks, "resume", world_size, folder, kind, schedule, folder / "state", batch)
    check(told, folder, world_size)


def test_from_a_url(frameworks: str, saved: Saved) -> None:
    folder = saved("zero2", "samples")
    objects = {
        f"/run/{path.relative_to(folder)}": Served(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }
    with counting_server(objects) as server:
        told = run(frameworks, "resume", 3, folder, "zero2", "samples", server.url("/run/state"), "")
    check(told, folder, 3)
