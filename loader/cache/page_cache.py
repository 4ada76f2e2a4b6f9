"""Whether the system has a file's bytes in its page cache, where every process reads them at the speed of memory."""

from __future__ import annotations

import os

_LOOKS = 16


def is_cached(path: str, start: int, stop: int) -> bool:
    """Whether bytes ``[start, stop)`` of the file at `path` are in the page cache, by a look at a few of them.

    False where that is not told: on other systems than Linux, by network file systems, and of files that cannot be
    opened. Nothing is read from storage. `start` must be less than `stop`.
    """
    at_once = getattr(os, "RWF_NOWAIT", None)
    if at_once is None:
        return False
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    byte = bytearray(1)
    last = stop - 1 - start
    try:
        return all(
            os.preadv(file, [byte], start + last * at // (_LOOKS - 1), at_once) == 1 for at in range(_LOOKS)
        )
    except OSError:  # a byte that is not there, or a file system that cannot tell
        return False
    finally:
        os.close(file)
