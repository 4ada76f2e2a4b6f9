"""A few threads that work while the calling thread watches over them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from .transfer import POLL_S, Stopped

STOP_TIMEOUT_S = 5.0
"""How long threads are given to end once they are told to; one stuck in a backend is left to itself."""


class Stop:
    """Tells workers to end: they call `check` wherever they can."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def check(self) -> None:
        """Raises where the work is given up; only workers call it."""
        if self._event.is_set():
            raise Stopped


def run_jobs(jobs: Sequence[Callable[[Stop], None]], tick: Callable[[], None], *, n_threads: int = 4) -> None:
    """Runs `jobs` in up to `n_threads` threads, the first ones first, calling `tick` here ten times a second.

    The first job that raises, or `tick`, stops all the others; what it raised is raised once they have ended.
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
    endings = [threading.Event() for _ in range(min(n_threads, len(jobs)))]
    threads = [
        threading.Thread(target=work, args=(ended,), name=f"rankload-worker-{index}", daemon=True)
        for index, ended in enumerate(endings)
    ]
    started = []
    try:
        for thread, ended in zip(threads, endings, strict=True):
            thread.start()
            started.append((thread, ended))
        for ended in endings:
            while not ended.is_set():
                tick()
                ended.wait(POLL_S)
    finally:
        stop.set()
        for thread, ended in started:
            if ended.wait(STOP_TIMEOUT_S):
                thread.join()
    if failures:
        raise failures[0]
