"""Shows on global rank 0 how far the whole job's download is: a bar on a terminal, else a line every 10 seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

from ...distributed.printable import package_logger

REFRESH_S = 0.2
LINE_EVERY_S = 10.0

Counters = Callable[[], Mapping[int, Mapping[str, float]]]
"""Returns each rank's counters, as `Channel.counters` does."""

_logger = package_logger()


class JobProgress:
    """Context manager around a load; shows nothing until something is downloaded.

    `counters` returns each rank's ``bytes_done`` and ``bytes_total``, and rank 0's ``bytes_planned``. On other ranks,
    and with `enabled` False, it does nothing. Its bar and its thread end with the context; what goes wrong in them
    fails no load.
    """

    def __init__(
        self, counters: Counters, *, rank: int, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self._counters = counters
        self._active = enabled and rank == 0
        self._stream = stream if stream is not None else sys.stderr
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar: Any = None
        self._started = 0.0
        self._next_line = 0.0
        self._planned = 0
        self._since = 0.0
        self._before = 0

    def __enter__(self) -> JobProgress:
        if self._active:
            self._thread = threading.Thread(target=self._run, name="rankload-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._ended.wait(REFRESH_S):
                self._show(last=False)
            self._show(last=True)
        except Exception as error:
            # A load must not fail for its progress bar.
            _logger.debug("progress is no longer shown: %s", error)
        finally:
            if self._bar is not None:
                self._bar.close()

    def _show(self, *, last: bool) -> None:
        counters = self._counters()
        done, total = job_bytes(counters)
        if total <= 0:
            return
        now = time.monotonic()
        planned = planned_bytes(counters)
        if not self._started or planned > self._planned:
            # The time between two plans, when nothing is fetched, must not lower the rate.
            self._planned, self._since, self._before = planned, now, done if self._started else 0
        if not self._started:
            self._started, self._next_line = now, now + LINE_EVERY_S
        if not self._stream.isatty():
            if now >= self._next_line or (last and self._next_line > self._started + LINE_EVERY_S):
                self._next_line = now + LINE_EVERY_S
                self._stream.write(progress_line(done, total, now - self._since, self._before) + "\n")
                self._stream.flush()
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, unit="B", unit_scale=True, desc="fetching checkpoint", file=self._stream
            )
        self._bar.total = total
        self._bar.n = min(done, total)
        self._bar.refresh()


def job_bytes(counters: Mapping[int, Mapping[str, float]]) -> tuple[int, int]:
    """Bytes that all ranks have fetched, and bytes that they will have fetched in the end."""
    done = sum(int(each.get("bytes_done", 0)) for each in counters.values())
    total = sum(int(each.get("bytes_total", 0)) for each in counters.values())
    return done, max(done, total, planned_bytes(counters))


def planned_bytes(counters: Mapping[int, Mapping[str, float]]) -> int:
    """The bytes of the whole job by rank 0's latest plan, which counts every node's before any is fetched."""
    return max((int(each.get("bytes_planned", 0)) for each in counters.values()), default=0)


def progress_line(done: int, total: int, seconds: float, before: int = 0) -> str:
    """One line for a log. The rate is that of the last `seconds`, at whose beginning `before` bytes were done."""
    rate = max(0, done - before) / seconds if seconds > 0 else 0.0
    left = f", {_seconds_text((total - done) / rate)} left" if rate and done < total else ""
    return (
        f"rankload: fetching checkpoint: {done / 1e6:.1f} of {total / 1e6:.1f} MB "
        f"({100 * done / total:.0f} %), {rate / 1e6:.1f} MB/s{left}"
    )


def _seconds_text(seconds: float) -> str:
    """``42 s``, ``3 min 20 s``."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"
