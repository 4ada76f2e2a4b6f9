"""Runs jobs of real frameworks by their own interpreter, and serves what they saved."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from http_server import CountingServer, Served, counting_server
from places import TESTS
from processes import run_ranks


def run_job(python: str, job: str, world_size: int, *args: object, deadline_s: float) -> Any:
    """What rank 0 of a job's function (``trainer_job.py:save``) tells, as JSON; None where it tells nothing.

    All ranks must end well.
    """
    finished = run_ranks(
        f"{TESTS / 'frameworks' / job}",
        world_size,
        args=args,
        deadline_s=deadline_s,
        env={"DS_ACCELERATOR": "cpu"},
        python=python,
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    told = [line for line in finished[0].stdout.splitlines() if line.startswith('{"')]
    assert len(told) <= 1, told
    return json.loads(told[0]) if told else None


@contextlib.contextmanager
def served(path: Path) -> Iterator[tuple[CountingServer, str]]:
    """A server of `path`, a file or a folder, and its URL there."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    objects = {f"/run/{one.relative_to(path.parent)}": Served(one.read_bytes()) for one in files}
    with counting_server(objects) as server:
        yield server, server.url(f"/run/{path.name}")
