"""Where ranges land: memory that is there already, or a file of the object's size that is filled in places."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Protocol

from .errors import CorruptError
from .store_errors import disk_full

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14: fills the page table at once, and fails where there is no space left."""
_AT_ONCE = 8 << 20


class Target(Protocol):
    """Takes bytes of one object; called from several threads, never twice for the same bytes at once."""

    def views(self, start: int, stop: int) -> Iterator[memoryview]:
        """Writable memory for bytes ``[start, stop)``, in order."""


class MemoryTarget:
    """Pieces of memory: ``(start, view)`` takes the object's bytes from `start` on, in place.

    Views are one-dimensional, contiguous and writable, of any item size. Raises `ValueError` where they overlap.
    """

    def __init__(self, pieces: Iterable[tuple[int, memoryview]]) -> None:
        placed = sorted(((start, view.cast("B")) for start, view in pieces), key=lambda one: one[0])
        self._pieces = [(start, view) for start, view in placed if len(view)]
        self._starts = [start for start, _ in self._pieces]
        for (start, view), (after, _) in zip(self._pieces, self._pieces[1:], strict=False):
            if start + len(view) > after:
                raise ValueError(f"two pieces of memory take byte {after}")
            if view.readonly:
                raise ValueError("memory that can't be written")

    def views(self, start: int, stop: int) -> Iterator[memoryview]:
        index = max(bisect_right(self._starts, start) - 1, 0)
        position = start
        while position < stop:
            begin, view = self._pieces[index] if index < len(self._pieces) else (stop, memoryview(b""))
            if not begin <= position < begin + len(view):
                raise ValueError(f"byte {position} has no place in memory")
            end = min(stop, begin + len(view))
            yield view[position - begin : end - begin]
            position = end
            index += 1


class FileTarget:
    """A file of `size_bytes`, sparse where nothing has landed, mapped while it is written.

    The file is made where it is missing (0600) and kept as it is where it has that size. Space is taken before
    bytes arrive: a disk that is full is an `AccessError`, not a signal. `close` it.
    """

    def __init__(self, path: str, size_bytes: int) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            held = os.fstat(self._fd).st_size
            if held not in (0, size_bytes):
                raise CorruptError(f"{path}: holds {held} bytes, expected {size_bytes}", path=path)
            os.ftruncate(self._fd, size_bytes)
            self._map = mmap.mmap(self._fd, size_bytes) if size_bytes else mmap.mmap(-1, 1)
        except BaseException:
            os.close(self._fd)
            raise
        self._view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def views(self, start: int, stop: int) -> Iterator[memoryview]:
        for begin in range(start, stop, _AT_ONCE):
            end = min(stop, begin + _AT_ONCE)
            self._take_space(begin, end)
            yield self._view[begin:end]

    def close(self) -> None:
        """Unmaps the file, unless a view of it is still in use, and closes it."""
        self._view.release()
        # A read that was given up may still hold it; it ends with that.
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self._fd)

    def _take_space(self, start: int, stop: int) -> None:
        begin = start - start % mmap.PAGESIZE
        # Through ctypes, which lets other threads go on meanwhile; mmap's own madvise does not.
        length = ctypes.c_size_t(stop - begin)
        if _libc.madvise(ctypes.c_void_p(self._address + begin), length, _POPULATE_WRITE) == 0:
            return
        code = ctypes.get_errno()
        if code in (errno.EFAULT, errno.ENOSPC, errno.ENOMEM):
            raise disk_full(self._path)
        try:
            os.posix_fallocate(self._fd, start, stop - start)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise disk_full(self._path) from error
            # The file system has no such call.


_libc = ctypes.CDLL(None, use_errno=True)
