"""What a failure on one rank becomes on the others, and how a lost store is explained."""

from __future__ import annotations

import signal
import time

from .errors import PeerError, RankloadError
from .heartbeat import place
from .liveness import ProcessIdentity
from .store_thread import BEAT_S, StoreLostError, StoreThread

MESSAGE_LIMIT = 1 << 19


def as_rankload_error(error: BaseException, rank: int, process: ProcessIdentity, stage: str) -> RankloadError:
    """`error` as all ranks raise it: itself where it is rankload's, else an error that names it."""
    if isinstance(error, RankloadError):
        return error.located(rank, process.host)
    if isinstance(error, Exception):
        wrapped = RankloadError(f"{type(error).__name__}: {error}").located(rank, process.host)
        wrapped.__cause__ = error
        return wrapped
    who = f"rank {rank} (host {process.host}, pid {process.pid})"
    return PeerError(
        f"{who} was ended {place(stage)} by {_interruption(error)}", rank=rank, host=process.host
    )


def bounded(error: RankloadError) -> RankloadError:
    """Cuts a message that no store would carry."""
    if len(error.message) > MESSAGE_LIMIT:
        error.message = error.message[:MESSAGE_LIMIT] + " ..."
    return error


def store_lost(
    courier: StoreThread, error: StoreLostError, rank: int, process: ProcessIdentity
) -> RankloadError:
    """Why the store can't be reached: most often because rank 0, which hosts it, has ended. Takes up to a
    second."""
    watch = courier.watches.get(0)
    if watch is None or watch.beat is None:
        return PeerError(
            f"the store over which the ranks talk was lost {place(courier.stage)} ({error}): the process "
            "that hosts it (rank 0, or the launcher's agent) has ended, or the network is cut",
            rank=rank,
            host=process.host,
        )
    # A killed process closes its connections a moment before its end can be seen.
    until = time.monotonic() + BEAT_S
    while (ended := courier.rank_zero_ended()) is None and time.monotonic() < until:
        time.sleep(0.02)
    host, pid, stage = watch.beat.process.host, watch.beat.process.pid, watch.beat.stage
    if ended is not None:
        # How it ended is not said: a moment decides whether its status can still be seen, and all ranks say
        # the same.
        return PeerError(
            f"rank 0 (host {host}, pid {pid}) ended {place(courier.stage or stage)}, and with it the store over which "
            "the ranks talk",
            rank=0,
            host=host,
        )
    return PeerError(
        f"the store over which the ranks talk, and which rank 0 (host {host}, pid {pid}) or the launcher's "
        f"agent hosts, was lost {place(courier.stage)} ({error})",
        rank=0,
        host=host,
    )


def _interruption(error: BaseException) -> str:
    number = getattr(error, "signal_number", None)
    if isinstance(number, int):
        return signal.Signals(number).name
    if isinstance(error, SystemExit):
        return f"SystemExit (code {error.code})"
    return "Ctrl-C (KeyboardInterrupt)" if isinstance(error, KeyboardInterrupt) else type(error).__name__
