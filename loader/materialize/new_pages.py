"""Has the system make the pages of new memory many at a time: one by one, as each is first written to, takes longer."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

LEAST_BYTES = 256 << 10
"""Of less memory the pages are made as they are written to."""
_POPULATE_WRITE = 23
"""``MADV_POPULATE_WRITE`` of Linux 5.14, which Python does not name."""


def make_pages(memory: memoryview) -> None:
    """Makes those pages of `memory` that do not exist yet; what is in the others stays.

    Only time depends on it: where the system cannot do so, the pages are made as they are written to.
    """
    if memory.nbytes < LEAST_BYTES or (advise := _madvise()) is None:
        return
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    advise(start, first + memory.nbytes - start, _POPULATE_WRITE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's function of that name; None on other systems than Linux, where the number means something else."""
    if sys.platform != "linux":
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    advise.restype = ctypes.c_int
    return advise
