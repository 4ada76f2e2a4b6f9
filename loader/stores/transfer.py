"""One transfer into a file: watched while it runs, checked before it gets its name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import wait
from typing import Any, TypeVar

from ..errors import CorruptError
from .base import OnBytes

POLL_S = 0.1
"""How often a transfer that runs elsewhere is looked at."""

T = TypeVar("T")


class Stopped(BaseException):
    """Raised inside a backend's own thread, so that a transfer nobody waits for any more ends."""


class Meter:
    """Bytes that arrived in a backend's thread, reported in the thread that waits for them."""

    def __init__(self, on_bytes: OnBytes) -> None:
        self._on_bytes = on_bytes
        self._arrived = 0
        self._reported = 0
        self.stopped = False

    @property
    def arrived(self) -> int:
        return self._arrived

    def add(self, n_bytes: int) -> None:
        """Counts; called by whoever moves the bytes."""
        if self.stopped:
            raise Stopped
        self._arrived += n_bytes

    def reach(self, total: int) -> None:
        """Counts up to `total`, for backends that tell sums."""
        self.add(max(0, total - self._arrived))

    def report(self) -> None:
        """Passes on what is new; called by whoever waits."""
        arrived = self._arrived
        new, self._reported = arrived - self._reported, arrived
        try:
            self._on_bytes(new)
        except BaseException:
            self.stopped = True
            raise

    def restart(self) -> None:
        """Takes back what was counted, since the transfer begins again."""
        self._arrived = 0
        self.report()


def receive(
    target_path: str, described: str, expected_size: int | None, write: Callable[[str], None]
) -> None:
    """Has `write` fill a temporary name beside `target_path`, checks its size, then gives it its name.

    Raises `CorruptError` where the size is not `expected_size`. The temporary file never stays.
    """
    part = f"{target_path}.{uuid.uuid4().hex[:8]}.part"
    try:
        write(part)
        check_size(part, described, expected_size)
        os.replace(part, target_path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def receive_through_folder(
    target_path: str, described: str, expected_size: int | None, write: Callable[[str], None]
) -> None:
    """As `receive`, for backends that keep temporary files of their own beside the name they are given."""
    folder = f"{target_path}.{uuid.uuid4().hex[:8]}.parts"
    os.mkdir(folder, 0o700)
    try:
        part = os.path.join(folder, "object")
        write(part)
        check_size(part, described, expected_size)
        os.replace(part, target_path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_size(path: str, described: str, expected_size: int | None) -> None:
    """Raises `CorruptError` where the file at `path` is not as long as the store said."""
    try:
        got = os.stat(path).st_size
    except FileNotFoundError:
        raise CorruptError(
            f"{described}: the store reported success but wrote nothing", path=described
        ) from None
    if expected_size is not None and got != expected_size:
        raise CorruptError(
            f"{described}: the transfer ended early or the object changed: expected {expected_size} bytes, "
            f"got {got}",
            path=described,
        )


def run_watched(work: Callable[[], T], meter: Meter, poll: Callable[[], None] | None = None) -> T:
    """Runs a blocking call in a thread of its own, reporting `meter` meanwhile (after `poll`, where given).

    What they raise ends the wait. A call that is given up keeps its (daemon) thread until it notices:
    `Meter.add` raises in it.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="rankload-transfer", daemon=True).start()
    try:
        while not done.wait(POLL_S):
            if poll is not None:
                poll()
            meter.report()
    except BaseException:
        meter.stopped = True
        raise
    if failure:
        raise failure[0]
    meter.report()
    return outcome[0]


def await_watched(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop, meter: Meter) -> T:
    """Runs a coroutine on another thread's `loop`, reporting `meter`; what that raises cancels it."""
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        while not wait([future], timeout=POLL_S).done:
            meter.report()
    except BaseException:
        meter.stopped = True
        future.cancel()
        raise
    result = future.result()
    meter.report()
    return result


def bytes_on_disk(path: str) -> int:
    """Bytes that the files at `path` (a file, or a folder of them) take; 0 where there are none yet."""
    total = 0
    try:
        if not os.path.isdir(path):
            return os.stat(path).st_blocks * 512
        for entry in os.scandir(path):
            total += bytes_on_disk(entry.path) if entry.is_dir(follow_symlinks=False) else _blocks(entry)
    except FileNotFoundError:
        pass
    return total


def _blocks(entry: os.DirEntry[str]) -> int:
    return entry.stat(follow_symlinks=False).st_blocks * 512
