"""A remote object that comes to this node in parts, as they are asked for: its source, its file, what has landed."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable
from typing import BinaryIO, cast

from .checksums import crc32
from .partial_file import PartialFile
from .range_engine import Reading, read_ranges
from .range_source import RangeSource
from .range_targets import FileTarget
from .ranges import ByteRange
from .store import OnBytes

BLOCK_BYTES = 64 << 10
"""What an index is read in."""
_SUMMED_BYTES = 1 << 20


class RemoteFile:
    """One object, on the rank that fetches for its node. `close` it; the file stays for as long as its cache entry.

    Raises `BlockingIOError` where another process holds the file at `path`, OSError where the disk refuses.
    """

    def __init__(
        self, source: RangeSource, path: str, on_compared: Callable[[int], None] | None = None
    ) -> None:
        self.source = source
        self.path = path
        with contextlib.ExitStack() as opening:
            self._partial = PartialFile(path, source.size_bytes, on_compared)
            opening.callback(self._partial.close)
            self._target = FileTarget(path, source.size_bytes)
            opening.pop_all()

    @property
    def fetched_bytes(self) -> int:
        """What has landed since it was opened."""
        return self._partial.landed_bytes

    @property
    def resumed_bytes(self) -> int:
        """What an earlier process had landed."""
        return self._partial.resumed_bytes

    def reading(self, ranges: Iterable[ByteRange]) -> Reading | None:
        """What is to be read so that `ranges` are here; None where all of them are."""
        whole = ByteRange(0, self.source.size_bytes)
        missing = self._partial.missing(
            ByteRange(max(start, whole.start), min(stop, whole.stop)) for start, stop in ranges
        )
        return Reading(self.source, missing, self._target, self._landed) if missing else None

    def ensure(self, ranges: Iterable[ByteRange], on_bytes: OnBytes) -> None:
        """Brings `ranges` here now. Raises as `read_ranges` does."""
        reading = self.reading(ranges)
        if reading is not None:
            read_ranges([reading], on_bytes)

    def opener(self, on_bytes: OnBytes) -> Callable[[str], BinaryIO]:
        """What opens it for reading, as a file whose parts come when they are read."""

        def open_file(path: str) -> BinaryIO:
            return cast(BinaryIO, io.BufferedReader(_Fetching(self, on_bytes), BLOCK_BYTES))

        return open_file

    def read(self, start: int, nbytes: int) -> bytes:
        """Bytes that are here."""
        return self._partial.read(start, nbytes)

    def close(self) -> None:
        self.source.close()
        self._target.close()
        self._partial.close()

    def _landed(self, start: int, stop: int) -> None:
        value = 0
        for view in self._target.views(start, stop):
            for begin in range(0, len(view), _SUMMED_BYTES):
                value = crc32(view[begin : begin + _SUMMED_BYTES], value)
        self._partial.land(start, stop, value)


class _Fetching(io.RawIOBase):
    """A position in a remote file; reading brings what is read here, in whole blocks."""

    def __init__(self, file: RemoteFile, on_bytes: OnBytes) -> None:
        super().__init__()
        self._file = file
        self._on_bytes = on_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.source.size_bytes}[
            whence
        ]
        if base + offset < 0:
            raise OSError(22, "a position before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = self._file.source.size_bytes
        start, stop = self._position, min(size, self._position + len(buffer))
        if start >= stop:
            return 0
        first = start // BLOCK_BYTES * BLOCK_BYTES
        last = min(size, -(-stop // BLOCK_BYTES) * BLOCK_BYTES)
        self._file.ensure([ByteRange(first, last)], self._on_bytes)
        data = self._file.read(start, stop - start)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
