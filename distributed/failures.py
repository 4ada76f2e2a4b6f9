"""The error that all ranks raise for a failure: of this rank's own code, or of the store.

The error for a rank that another one watched die is `store_thread.peer_error`.
"""

from __future__ import annotations

import signal
import time

from .errors import PeerError, RankloadError
from .heartbeat import place
from .liveness import ProcessIdentity
from .printable import Lines
from .store_thread import HEARTBEAT_S, StoreLostError, StoreThread

MESSAGE_LIMIT = 1 << 19
"""Characters of an announced message."""


def as_rankload_error(error: BaseException, rank: int, process: ProcessIdentity, stage: str) -> RankloadError:
    """`error` as all ranks raise it: itself where it is rankload's, else an error that names it.

    An Exception becomes a RankloadError with the original as its cause; KeyboardInterrupt, SystemExit and the like
    become a PeerError that says how this rank was ended.
    """
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
    """`error`, its message cut to `MESSAGE_LIMIT`: a store takes no value of any size."""
    if len(error.message) > MESSAGE_LIMIT:
        error.message = Lines.of(error.message[:MESSAGE_LIMIT] + " ...")
    return error


def store_lost(
    store_thread: StoreThread, error: StoreLostError, rank: int, process: ProcessIdentity
) -> RankloadError:
    """The PeerError for a store that can't be reached, most often because rank 0, which hosts it, has ended.

    Waits up to `HEARTBEAT_S` for the end of rank 0's process to show, where it runs on this machine.
    """
    watch = store_thread.watches.get(0)
    if watch is None or watch.heartbeat is None:
        return PeerError(
            f"the store over which the ranks talk was lost {place(store_thread.stage)} ({error}): the process "
            "that hosts it (rank 0, or the launcher's agent) has ended, or the network is cut",
            rank=rank,
            host=process.host,
        )
    # A killed process closes its connections a moment before its end can be seen.
    until = time.monotonic() + HEARTBEAT_S
    while (ended := store_thread.rank_zero_ended()) is None and time.monotonic() < until:
        time.sleep(0.02)
    host, pid, stage = watch.heartbeat.process.host, watch.heartbeat.process.pid, watch.heartbeat.stage
    if ended is not None:
        # The message leaves out how it ended: ranks that look a moment apart may or may not see its exit status, and
        # all must raise the same message.
        return PeerError(
            f"rank 0 (host {host}, pid {pid}) ended {place(store_thread.stage or stage)}, and with it the store over "
            "which the ranks talk",
            rank=0,
            host=host,
        )
    return PeerError(
        f"the store over which the ranks talk, and which rank 0 (host {host}, pid {pid}) or the launcher's "
        f"agent hosts, was lost {place(store_thread.stage)} ({error})",
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
