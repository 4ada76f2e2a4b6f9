"""What a watchdog does for a rank whose collective waits: ends its process, or lets the cause come first."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from rankload.distributed.errors import PeerError
from rankload.distributed.watchdog import EXIT_CODE, watched_collectives

CODE = """
import sys, time
sys.path.insert(0, {folder!r})
from test_watchdog import Told
from rankload.distributed.watchdog import watched_collectives
with watched_collectives(Told(0.2), "the test's collectives"):
    time.sleep({seconds})
print("went on")
"""


class Told:
    """A channel's end that hears of a failure after so many seconds."""

    rank, world_size = 0, 2

    def __init__(self, after_s: float, world_size: int = 2) -> None:
        self._at = time.monotonic() + after_s
        self.world_size = world_size

    def failure(self) -> PeerError | None:
        return PeerError("rank 1 ended") if time.monotonic() > self._at else None


def run(seconds: float) -> subprocess.CompletedProcess[str]:
    code = CODE.format(folder=__file__.rpartition("/")[0], seconds=seconds)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_process_that_waits_ends_with_the_cause():
    ended = run(50)
    assert ended.returncode == EXIT_CODE == 75
    assert "rank 0 waits in the test's collectives" in ended.stderr
    assert "PeerError: rank 1 ended" in ended.stderr


def test_one_that_leaves_its_collective_in_time_goes_on():
    ended = run(0.6)
    assert (ended.returncode, ended.stdout) == (0, "went on\n"), ended.stderr


def collective_breaks(channel: Any) -> float:
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="by peer"), watched_collectives(channel, "it"):
        raise RuntimeError("Connection closed by peer")
    return time.monotonic() - begin


def test_a_broken_collective_waits_for_the_cause_but_not_for_ever():
    assert 0.3 < collective_breaks(Told(0.3)) < 1.5
    assert 1.5 < collective_breaks(Told(100)) < 4
    assert collective_breaks(Told(100, world_size=1)) < 0.3


def test_no_thread_stays():
    before = threading.active_count()
    with watched_collectives(Told(100), "it"):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
