"""Runs jobs in a few threads while the calling thread watches them, and stops all of them when one fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

POLL_S = 0.1
"""How often the calling thread looks at work in other threads, and calls `tick`."""
GROW_S = 0.01
"""How often `run_jobs` checks whether more threads are wanted."""
STOP_TIMEOUT_S = 2.0
"""How long threads have, all together, to end once they are stopped; one that is stuck in a backend is left behind.
The failure that stopped them is announced only then, so that all ranks wait for it."""


class Stopped(BaseException):
    """Ends a thread whose work was given up. No `Exception`: a backend that called back must not catch it."""


_here = threading.local()


class Stop:
    """A flag that ends jobs: they call `check` wherever they can."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Gives the work up."""
        self._event.set()

    def is_set(self) -> bool:
        """Whether the work is given up."""
        return self._event.is_set()

    def check(self) -> None:
        """Raises `Stopped` where the work is given up; called in jobs only."""
        if self._event.is_set():
            raise Stopped


def check_stopped() -> None:
    """Raises `Stopped` in a thread of `run_jobs`, or a block of `stopped_by`, whose work is given up: for code that was
    not handed its `Stop`."""
    stop: Stop | None = getattr(_here, "stop", None)
    if stop is not None:
        stop.check()


@contextmanager
def stopped_by(stop: Stop) -> Iterator[None]:
    """A block in which `stop` is what `check_stopped` looks at in this thread."""
    before, _here.stop = getattr(_here, "stop", None), stop
    try:
        yield
    finally:
        _here.stop = before


def run_jobs(
    jobs: Sequence[Callable[[Stop], None]],
    tick: Callable[[], None],
    *,
    n_threads: int = 4,
    wanted: Callable[[], int] | None = None,
) -> None:
    """Runs `jobs` in up to `n_threads` threads, the first ones first, calling `tick` in this thread ten times a second.

    With `wanted`, a thread is started only while there are fewer than that returns (one always is). What a job or
    `tick` raises first stops all other jobs, and is raised here once they have ended.
    """
    stop = Stop()
    pending = list(reversed(jobs))
    failures: list[BaseException] = []
    lock = threading.Lock()

    def work(ended: threading.Event) -> None:
        _here.stop = stop
        try:
            while not failures:
                with lock:
                    if not pending:
                        return
                    job = pending.pop()
                stop.check()
                job(stop)
        except Stopped:
            return
        except BaseException as error:
            failures.append(error)
            stop.set()
        finally:
            ended.set()

    # Threads are awaited by events: some versions of Python take a thread for ended after Ctrl-C interrupts its join.
    most = min(n_threads, len(jobs))
    started: list[tuple[threading.Thread, threading.Event]] = []

    def start() -> None:
        while len(started) < (most if wanted is None else min(most, max(1, wanted()))):
            ended = threading.Event()
            name = f"rankload-worker-{len(started)}"
            thread = threading.Thread(target=work, args=(ended,), name=name, daemon=True)
            thread.start()
            started.append((thread, ended))

    try:
        start()
        looked = time.monotonic()
        while any(not ended.is_set() for _, ended in started):
            if time.monotonic() - looked >= POLL_S:
                looked = time.monotonic()
                tick()
            waiting_for = next((ended for _, ended in started if not ended.is_set()), None)
            if waiting_for is not None:
                waiting_for.wait(POLL_S if len(started) == most else GROW_S)
            if not stop.is_set():
                start()
    finally:
        stop.set()
        until = time.monotonic() + STOP_TIMEOUT_S
        for thread, ended in started:
            if ended.wait(max(0.0, until - time.monotonic())):
                thread.join()
    if failures:
        raise failures[0]
