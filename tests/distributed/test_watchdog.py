"""What a watchdog does for a rank whose collective waits: ends its process, or lets the cause come first."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from places import SUPPORT
from processes import run_ranks
from rankload.distributed import watchdog
from rankload.distributed.errors import PeerError, RankloadError
from rankload.distributed.session import open_session
from rankload.distributed.watchdog import EXIT_CODE, watched_collectives

THIS = __file__
STALL_S = 1.5
CODE = """
import sys, time
sys.path[:0] = {folders!r}
from test_watchdog import Told
from rankload.distributed import watchdog
from rankload.distributed.watchdog import watched_collectives
watchdog.UNSEEN_GRACE_S = watchdog._HOST_GRACE_S = 0.5
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

    def announce_standstill(self, where: str) -> None:
        """Nobody stands still."""

    def moved(self) -> None:
        """Needs not to be known."""


def run(seconds: float) -> subprocess.CompletedProcess[str]:
    code = CODE.format(folders=[__file__.rpartition("/")[0], str(SUPPORT)], seconds=seconds)
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
    """The cause is raised in its place; without one, what the collective said."""
    begin = time.monotonic()
    with pytest.raises(PeerError, match="rank 1 ended") as caught:
        collective_breaks(Told(0.3))
    assert "Connection closed by peer" in str(caught.value.__cause__)
    assert 0.3 < time.monotonic() - begin < 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchdog, "_CAUSE_S", 1.0)
        assert 0.9 < collective_breaks(Told(100)) < 3
    assert collective_breaks(Told(100, world_size=1)) < 0.3


def test_no_thread_stays():
    before = threading.active_count()
    with watched_collectives(Told(100), "it"):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


# --- real collectives ----------------------------------------------------------------------------------------------


def in_a_collective(fault: str, victim: str, anywhere: str) -> None:
    """All ranks are in a collective of gloo's, but the victim, which something happened to."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        with (
            open_session(stall_timeout_s=STALL_S) as session,
            session.channel.stage("finish"),
            watched_collectives(session.channel, "the test's collectives", anywhere=anywhere == "anywhere"),
        ):
            dist.all_reduce(torch.ones(1))
            if rank == int(victim):
                time.sleep(1.5)  # the others are inside by now
                if fault != "sleeps":
                    os.kill(os.getpid(), getattr(signal, fault))
                time.sleep(60)
            dist.all_reduce(torch.ones(1))
    except RankloadError as error:
        print(type(error).__name__, error, flush=True)
        os._exit(3)


@pytest.mark.parametrize(
    ("fault", "victim", "anywhere", "cause"),
    [
        ("SIGSTOP", 1, "anywhere", "StalledError: no progress for .* rank 1 .*the process is stopped"),
        ("SIGSTOP", 0, "where seen", "StalledError: the store .* rank 0 .*the process is stopped"),
        ("SIGKILL", 1, "where seen", "PeerError:? rank 1 .* ended in stage 'finish': "),
        ("sleeps", 1, "anywhere", "StalledError: no progress for .* in the test's collectives"),
    ],
    ids=["stopped", "rank 0 stopped", "killed", "elsewhere"],
)
def test_a_rank_that_stands_still_or_dies_ends_those_in_the_collective(
    fault: str, victim: int, anywhere: str, cause: str
) -> None:
    stays = {victim} if fault == "SIGSTOP" else set()
    finished = run_ranks(
        f"{THIS}:in_a_collective",
        3,
        args=(fault, victim, anywhere),
        deadline_s=60,
        kill_once_others_end=stays,
    )
    for rank in finished:
        if rank.rank != victim:
            # Gloo notices a broken connection, and then the rank raises.
            assert rank.returncode in ((3, EXIT_CODE) if fault == "SIGKILL" else (EXIT_CODE,)), finished
            assert re.search(cause, rank.stderr + rank.stdout), finished
            assert rank.seconds < 45, finished
