"""A file to read from that has a position of its own, over bytes that can be read anywhere."""

from __future__ import annotations

import errno
import io
import os
from abc import abstractmethod


class SeekableFile(io.RawIOBase):
    """A file of `size_bytes` bytes, which `read_at` reads. It has no buffer."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self.size_bytes = size_bytes
        self._position = 0

    @abstractmethod
    def read_at(self, start: int, view: memoryview) -> int:
        """Fills `view`, which lies inside the file, with the bytes from `start` on; returns how many there were."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size_bytes}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "a position before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self.size_bytes - self._position))
        got = self.read_at(self._position, memoryview(buffer)[:count]) if count else 0
        self._position += got
        return got
