"""Ends a process whose collective waits for a rank that has failed.

A rank inside a collective of torch's or DeepSpeed's waits in native code, where no exception reaches it. So where such
collectives run, a thread watches for the failure of another rank: the rank gets `GRACE_S` to leave the collective by
itself (gloo notices a broken connection), then the thread prints the cause and ends the process with `EXIT_CODE`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .channel import Channel
from .errors import RankloadError
from .store_thread import HEARTBEAT_S

EXIT_CODE = 75
"""What a process ends with whose collective waits for a rank that failed: ``EX_TEMPFAIL`` of ``sysexits.h``, try it
again."""
GRACE_S = 1.0
_POLL_S = 0.1
_CAUSE_S = 2 * HEARTBEAT_S
"""How long a rank whose collective broke waits to hear which rank died."""


@contextmanager
def watched_collectives(channel: Channel, what: str) -> Iterator[None]:
    """A block that runs collectives; it belongs into a stage of `channel`, and may agree over it, but not `progress`.

    Where another rank dies or fails, the block ends: by the error of the collective, if that notices, else with the
    process. What the collective raises comes after the cause has had the time to arrive, so that the channel raises
    that one. `what` names the collectives in the message.
    """
    if channel.world_size == 1:
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(channel, what, over), name="rankload-watchdog", daemon=True)
    watch.start()
    try:
        yield
    except RankloadError:
        raise
    except RuntimeError:
        over.set()
        until = time.monotonic() + _CAUSE_S
        while channel.failure() is None and time.monotonic() < until:
            time.sleep(_POLL_S)
        raise
    finally:
        over.set()
        watch.join()


def _watch(channel: Channel, what: str, over: threading.Event) -> None:
    while not over.wait(_POLL_S):
        cause = channel.failure()
        if cause is not None:
            if not over.wait(GRACE_S):
                _end(channel.rank, what, cause)
            return


def _end(rank: int, what: str, cause: RankloadError) -> None:
    sys.stdout.flush()
    sys.stderr.write(
        f"rankload: rank {rank} waits in {what} for a rank that failed, and ends with exit code {EXIT_CODE}. "
        f"The cause: {type(cause).__name__}: {cause}\n"
    )
    sys.stderr.flush()
    os._exit(EXIT_CODE)
