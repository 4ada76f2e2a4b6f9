"""Turns SIGTERM into an exception, so that clean-up runs before the process ends as the signal would have ended it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM). Exit code 143, as a shell shows it; ``signal_number`` is the signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block, SIGTERM raises `Terminated` in the main thread.

    When that leaves the block, every clean-up inside has run, and the signal is raised again under the handler that
    was there before: by default, that ends the process as SIGTERM always does. A handler that returns lets
    `Terminated` go on as the SystemExit that it is.

    A second SIGTERM during clean-up is ignored (SIGKILL is not). KeyboardInterrupt goes its usual way. Nothing is
    changed outside the main thread, where Python allows no handlers, nor where SIGTERM is ignored or has a handler
    that is not Python code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    if before is None or before is signal.SIG_IGN:
        yield
        return
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise Terminated(number)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        _restore(handle, before)
        if asked:
            # Raised even where the block swallowed the exception: the sender of the signal wants the process to end.
            os.kill(os.getpid(), signal.SIGTERM)


def _restore(ours: Any, before: Any) -> None:
    if signal.getsignal(signal.SIGTERM) is ours:
        signal.signal(signal.SIGTERM, before)
