"""Runs a block without Python's collector of reference cycles, which takes longer the more objects there are.

A load makes many objects at once, and keeps them: each time the collector wakes up for that, it visits all of them and
all of torch's (0.2 s in a job with 500,000 objects), and finds nothing. Reference counts still free what is not used.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_blocks = 0
_was_enabled = False


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Runs its block without the collector, in all threads; afterwards it is as it was before the first such block."""
    global _blocks, _was_enabled
    with _lock:
        if _blocks == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0 and _was_enabled:
                gc.enable()


def collect_young() -> None:
    """Frees what was made lately and is in cycles, inside of such a block: for long work that makes and drops much.

    It visits what was made since the last calls alone, so that calling it often is cheap.
    """
    # What was in use still at one call is looked at once more, at every tenth.
    gc.collect(1 if gc.get_count()[1] > 10 else 0)
