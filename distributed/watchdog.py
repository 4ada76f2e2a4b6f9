"""Ends a process whose collective waits for a rank that has failed or stands still.

A rank inside a collective of torch's or DeepSpeed's waits in native code, where no exception reaches it, and calls
neither `Channel.progress` nor an agreement. So where such collectives may run, a thread watches in its place:

1. Another rank failed: `Channel.failure` knows it.
2. A rank is stopped: it lives, and sends no heartbeat for ``stall_timeout_s``. Or nothing moves on any rank for as
   long: what a process reads, writes and computes counts as movement here, since collectives and engines report none.
3. The rank gets some seconds to leave the collective by itself (gloo notices a broken connection): `GRACE_S` where
   its main thread is seen in torch.distributed's or DeepSpeed's code, else `UNSEEN_GRACE_S`. Then the thread prints the
   cause and ends the process with `EXIT_CODE`.

Not guaranteed: that a collective is noticed that waits on a GPU, after its call has returned, in a block that ends only
what is seen in one (``anywhere=False``).
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .channel import Channel
from .errors import RankloadError
from .heartbeat import SILENT_AFTER_S
from .store_thread import HEARTBEAT_S

EXIT_CODE = 75
"""What a process ends with whose collective waits for a rank that failed: ``EX_TEMPFAIL`` of ``sysexits.h``, try it
again."""
GRACE_S = 1.0
UNSEEN_GRACE_S = 5.0
_HOST_GRACE_S = 2 * HEARTBEAT_S
"""How much longer rank 0 stays: it may host the store, where the others have to read the cause."""
_POLL_S = 0.1
_CAUSE_S = SILENT_AFTER_S + 2 * HEARTBEAT_S
"""How long a rank whose collective broke waits to hear which rank died: on another machine its silence must tell."""
_MOVED_BYTES, _MOVED_CPU_S = 64 << 10, 0.2
"""What a process reads and writes, or computes, from one look to the next where something moves; heartbeats and this
thread take less."""
_COLLECTIVES = ("torch.distributed", "deepspeed")
"""Modules in whose functions a thread may wait in a collective."""
_BROKEN = re.compile(r"gloo|nccl|connection|socket|broken pipe|by peer|time.?out|timed out", re.IGNORECASE)
"""What an error of a collective says that another rank has left."""


@contextmanager
def watched_collectives(channel: Channel, what: str, *, anywhere: bool = True) -> Iterator[None]:
    """A block that runs collectives; it belongs into a stage of `channel`, and may agree over it.

    Where another rank dies, fails or stands still, the block ends: by the error of the collective, if that notices,
    else with the process. Where the collective notices, the cause is waited for, and raised in place of what the
    collective says.

    Args:
        channel: an open one, of all ranks that run the collectives.
        what: names the collectives in the message.
        anywhere: whether the process ends wherever its main thread is. False for a block that mostly does other work,
            which hears of failures by itself: it ends only while it is seen inside a collective.
    """
    if channel.world_size == 1:
        yield
        return
    watch = _Watch(channel, what, anywhere)
    watch.start()
    try:
        yield
    except RankloadError:
        raise
    except Exception as error:
        watch.stop()
        cause = _awaited_cause(channel) if _is_broken(error) else None
        if cause is not None:
            # Not left to the channel alone: where rank 0 has taken the store along, it cannot ask what came first.
            raise cause from error
        raise
    finally:
        watch.stop()


def _awaited_cause(channel: Channel) -> RankloadError | None:
    until = time.monotonic() + _CAUSE_S
    while (cause := channel.failure()) is None and time.monotonic() < until:
        time.sleep(_POLL_S)
    return cause


class _Watch:
    """The thread that watches over one block of the thread that makes it."""

    def __init__(self, channel: Channel, what: str, anywhere: bool) -> None:
        self._channel, self._what, self._anywhere = channel, what, anywhere
        self._watched = threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rankload-watchdog", daemon=True)
        self._seen = _bytes_moved(), time.process_time()
        self._looked = time.monotonic()

    def start(self) -> None:
        self._channel.moved()
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_POLL_S):
            cause = self._channel.failure() or self._standstill()
            if cause is not None:
                if self._is_still_inside():
                    self._end(cause)
                return

    def _standstill(self) -> RankloadError | None:
        now = time.monotonic()
        if now - self._looked >= HEARTBEAT_S:
            self._looked = now
            n_bytes, cpu_s = _bytes_moved(), time.process_time()
            if n_bytes - self._seen[0] >= _MOVED_BYTES or cpu_s - self._seen[1] >= _MOVED_CPU_S:
                self._channel.moved()
            self._seen = n_bytes, cpu_s
        return self._channel.announce_standstill(f"in {self._what}")

    def _is_still_inside(self) -> bool:
        """Whether the block neither ends nor leaves its collective within the time that it has for that."""
        since = time.monotonic()
        while not self._over.wait(_POLL_S):
            longest_s = GRACE_S if _is_in_collective(self._watched) else UNSEEN_GRACE_S
            if self._channel.rank == 0:
                longest_s += _HOST_GRACE_S
            if time.monotonic() - since < longest_s:
                continue
            if self._anywhere or _is_in_collective(self._watched):
                return True
        return False

    def _end(self, cause: RankloadError) -> None:
        sys.stdout.flush()
        sys.stderr.write(
            f"rankload: rank {self._channel.rank} waits in {self._what} for a rank that failed, and ends with exit "
            f"code {EXIT_CODE}. The cause: {type(cause).__name__}: {cause}\n"
        )
        sys.stderr.flush()
        os._exit(EXIT_CODE)


def _is_in_collective(thread: int) -> bool:
    """Whether the thread is in a function of torch.distributed or DeepSpeed, or in one that such a function called."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(_COLLECTIVES):
            return True
        frame = frame.f_back
    return False


def _is_broken(error: BaseException) -> bool:
    """Whether `error`, or what it came from, is a collective's own, raised because another rank has left."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, RuntimeError | OSError) and _BROKEN.search(str(found)):
            return True
        found = found.__cause__ or found.__context__
    return False


def _bytes_moved() -> int:
    """Bytes that this process has read and written by files and sockets; 0 where the system does not count them."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            counted = dict(line.split(": ", 1) for line in file)
        return int(counted["rchar"]) + int(counted["wchar"])
    except (OSError, KeyError, ValueError):
        return 0
