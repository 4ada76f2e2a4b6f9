"""Ranks of this job that are found by their processes' variables, and noticed when those end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
from rankload.distributed import siblings

JOB = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": f"{40000 + os.getpid() % 20000}", "WORLD_SIZE": "4"}


@contextmanager
def process(**variables: str) -> Iterator[subprocess.Popen[bytes]]:
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    running = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(60)"],
        env={**kept, **variables},
        stdout=subprocess.PIPE,
    )
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        yield running
    finally:
        running.kill()
        running.wait()
        running.stdout.close()


def seen_by(variables: Mapping[str, str], *ended: subprocess.Popen[bytes]) -> tuple[list[int], list[int]]:
    """The ranks that a process with `variables` finds, and those that it finds ended once `ended` are killed."""
    code = """
import json, sys, time
from rankload.distributed import siblings
siblings.LOOK_S, siblings.GONE_S = 0.0, 0.2
found = siblings.Siblings()
assert found.ended() == {}
print(json.dumps([rank for rank in range(8) if found.running(rank)]), flush=True)
input()
until = time.monotonic() + 10
while not (gone := found.ended()) and time.monotonic() < until and sys.argv[1] != "0":
    time.sleep(0.05)
print(json.dumps(sorted(gone)), flush=True)
"""
    asks = subprocess.Popen(
        [sys.executable, "-c", code, str(len(ended))],
        env={**os.environ, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert asks.stdout is not None
    running = json.loads(asks.stdout.readline())
    for one in ended:
        one.kill()
        one.wait()
    time.sleep(0.3)
    rest, _ = asks.communicate("\n", timeout=30)
    return running, json.loads(rest)


def test_ranks_of_this_job_alone_are_found_and_their_end_is_noticed() -> None:
    with (
        process(**JOB, RANK="1") as first,
        process(**JOB, RANK="2"),
        process(**{**JOB, "MASTER_PORT": "1"}, RANK="3"),
        process(RANK="5"),
    ):
        assert seen_by({**JOB, "RANK": "0"}, first) == ([1, 2], [1])


def test_nothing_is_concluded_where_the_job_is_not_told_or_a_rank_goes_on() -> None:
    with process(RANK="1", WORLD_SIZE="4"):
        assert seen_by({"RANK": "0", "WORLD_SIZE": "4"}) == ([], [])
    # A rank that becomes another program, without the variables, lives on.
    with process(**JOB, RANK="1") as other:
        found = siblings.Siblings()
        found._rank, found._job = 0, {name: JOB.get(name) for name in siblings._JOB}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(siblings, "LOOK_S", 0.0)
            patch.setattr(siblings, "GONE_S", 0.0)
            found.ended()
            assert found.running(1) is not None
            patch.setattr(siblings, "_environ", lambda pid: {"PATH": ""})
            assert found.ended() == {}
            other.kill()
            other.wait()
            assert list(found.ended()) == [1]
