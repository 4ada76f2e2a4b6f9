"""A few threads that work while the calling thread watches over them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from ..stores.transfer import POLL_S, Stopped

GROW_S = 0.01
"""How often it is looked whether more threads are wanted."""
STOP_TIMEOUT_S = 5.0
"""How long threads are given to end once they are told to; one stuck in a backend is left to itself."""


class Stop:
    """Tells workers to end: they call `check` wherever they can."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        """Whether the work is given up."""
        return self._event.is_set()

    def check(self) -> None:
        """Raises where the work is given up; only workers call it."""
        if self._event.is_set():
            raise Stopped


def run_jobs(
    jobs: Sequence[Callable[[Stop], None]],
    tick: Callable[[], None],
    *,
    n_threads: int = 4,
    wanted: Callable[[], int] | None = None,
) -> None:
    """Runs `jobs` in up to `n_threads` threads, the first ones first, calling `tick` here ten times a second.

    With `wanted`, a thread is only started once that says that so many are. The first job that raises, or `tick`,
    stops all the others; what it raised is raised once they have ended.
    """
    stop = Stop()
    pending = list(reversed(jobs))
    failures: list[BaseException] = []
    lock = threading.Lock()

    def work(ended: threading.Event) -> None:
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

    # Waited for by events: a join that Ctrl-C interrupts takes its thread for ended in some versions of Python.
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
        for thread, ended in started:
            if ended.wait(STOP_TIMEOUT_S):
                thread.join()
    if failures:
        raise failures[0]
