"""Runs one transfer into a file: reports its progress, and checks the size before the file gets its name.

A store transfers inside `receive`, which gives the file its name, and begins anew inside `until_received`. A backend
that blocks runs in `run_watched`, and counts its bytes in a `Meter`; a call that only answers runs in `awaited`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import CorruptError
from ..plurals import counted
from ..retries import Attempts, Outages, TryAgainError, until_done
from ..workers import POLL_S, Stopped
from .base import Heard, OnBytes, unheard

T = TypeVar("T")


class Meter:
    """Counts bytes in a backend's thread, and reports them to `on_bytes` in the thread that waits."""

    def __init__(self, on_bytes: OnBytes) -> None:
        self._on_bytes = on_bytes
        self._arrived = 0
        self._reported = 0
        self.stopped = False
        """Whether the transfer was given up: then `add` raises `Stopped`."""

    def add(self, n_bytes: int) -> None:
        """Counts `n_bytes`; called by the thread that moves them."""
        if self.stopped:
            raise Stopped
        self._arrived += n_bytes

    def reach(self, total: int) -> None:
        """Counts up to `total`, for backends that report totals."""
        self.add(max(0, total - self._arrived))

    def report(self) -> None:
        """Reports what is new since the last report; called by the thread that waits. Raises what `on_bytes` does."""
        arrived = self._arrived
        new, self._reported = arrived - self._reported, arrived
        try:
            self._on_bytes(new)
        except BaseException:
            self.stopped = True
            raise


def callback_of(meter: Meter) -> Any:
    """What fsspec's file systems call while they transfer an object, which `meter` counts; `called` once they do."""
    from fsspec.callbacks import Callback

    class Count(Callback):  # type: ignore[misc]
        called = False

        def relative_update(self, inc: int = 1) -> None:
            self.called = True
            meter.add(inc)

        def absolute_update(self, value: int) -> None:
            self.called = True
            meter.reach(value)

    return Count()


class Reports:
    """Passes on to `on_bytes` how many bytes came, over all attempts at one transfer."""

    def __init__(self, on_bytes: OnBytes, attempts: Attempts) -> None:
        self._on_bytes = on_bytes
        self._attempts = attempts
        self._reported = 0
        self._most = 0
        self.raised: BaseException | None = None
        """What `on_bytes` raised: it ends the transfer, and is no failure of the store."""

    def __call__(self, n_bytes: int) -> None:
        self._reported += n_bytes
        # What comes again after a failure is no progress.
        if self._reported > self._most:
            self._most = self._reported
            self._attempts.moved()
        elif not n_bytes:
            self._attempts.quiet()
        try:
            self._on_bytes(n_bytes)
        except BaseException as error:
            self.raised = error
            raise

    def restart(self) -> None:
        """Takes back what was reported, since the transfer begins again."""
        if self._reported:
            self(-self._reported)


def until_received(
    outages: Outages, described: str, on_bytes: OnBytes, attempt: Callable[[Reports], None]
) -> None:
    """Calls `attempt`, which transfers the whole object `described` and tells `Reports` of its bytes, until it is done.

    Raises as `until_done` does, and what `on_bytes` raises.
    """
    attempts = Attempts(outages, described)
    reports = Reports(on_bytes, attempts)

    def work() -> None:
        reports.restart()
        try:
            attempt(reports)
        except TryAgainError:
            if reports.raised is not None:
                raise reports.raised from None
            raise

    until_done(outages, described, work, lambda: reports(0), attempts=attempts)


def receive(
    target_path: str, described: str, expected_size: int | None, write: Callable[[str], None]
) -> None:
    """Calls `write` with a temporary path next to `target_path`, checks the file's size, then renames it.

    Raises `CorruptError` where the size is not `expected_size` (None: not known). The temporary file never stays.
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
    """As `receive`, for backends that keep temporary files of their own next to the path they are given."""
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
    """Raises `CorruptError` where there is no file at `path`, or it is not as long as the store said."""
    try:
        got = os.stat(path).st_size
    except FileNotFoundError:
        raise CorruptError(
            f"{described}: the store reported success but wrote nothing", path=described
        ) from None
    if expected_size is not None and got != expected_size:
        raise CorruptError(
            f"{described}: the transfer ended early or the object changed: expected {counted(expected_size, 'byte')}, "
            f"got {got}",
            path=described,
        )


def run_watched(work: Callable[[], T], meter: Meter, poll: Callable[[], None] | None = None) -> T:
    """What `work`, a blocking call, returns; it runs in a thread of its own while `meter` is reported from this one.

    `poll` is called before each report. What `work`, `poll` or the report raises is raised here. A call that is given
    up keeps its (daemon) thread until `Meter.add` raises in it.
    """

    def tick() -> None:
        if poll is not None:
            poll()
        meter.report()

    try:
        found = _in_thread(work, tick)
    except BaseException:
        meter.stopped = True
        raise
    meter.report()
    return found


def awaited(work: Callable[[], T], heard: Heard, waiting_for: str) -> T:
    """What `work`, a blocking call that answers as a whole, returns; `heard` is called meanwhile, and ends the wait.

    It runs in a thread of its own, which a call that is given up keeps until it returns; in this one where nobody is
    to hear of it. What `work` or `heard` raises is raised here.
    """
    if heard is unheard:
        return work()
    found = _in_thread(work, lambda: heard(0, waiting_for))
    heard(1, waiting_for)
    return found


def _in_thread(work: Callable[[], T], tick: Callable[[], None]) -> T:
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
    while not done.wait(POLL_S):
        tick()
    if failure:
        raise failure[0]
    return outcome[0]


def bytes_on_disk(path: str) -> int:
    """Bytes of disk that the files at `path` (a file, or a folder of them) take, holes left out; 0 where none are."""
    return _sum_of(path, _blocks)


def bytes_arrived(path: str) -> int:
    """Bytes of the files at `path` that are there by now: of a file that was made large enough first, what is on the
    disk, and never more than its size, although the disk has whole blocks."""
    return _sum_of(path, lambda found: min(_blocks(found), found.st_size))


def _sum_of(path: str, count: Callable[[os.stat_result], int]) -> int:
    total = 0
    try:
        if not os.path.isdir(path):
            return count(os.stat(path))
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                total += _sum_of(entry.path, count)
            else:
                total += count(entry.stat(follow_symlinks=False))
    except FileNotFoundError:
        pass
    return total


def _blocks(found: os.stat_result) -> int:
    return found.st_blocks * 512
