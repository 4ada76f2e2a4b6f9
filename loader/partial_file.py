"""A remote object of which parts are on this node: a file with holes, and a record of what has landed in it.

    <name>           as long as the object; what has not landed is a hole
    <name>.landed    a record for each range that has: start, stop, the CRC-32 of its bytes, and one of the record

Bytes are written before their record, so what a record tells was there when its process ended, however it ended. The
next process compares them with their CRC-32s and goes on with what is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
from collections.abc import Iterable, Iterator

from .checksums import crc32
from .ranges import ByteRange, subtract, union

RECORD = struct.Struct("<QQI")
_CHECK = struct.Struct("<I")
_READ_BYTES = 1 << 20


class PartialFile:
    """The file at `path`, of `size_bytes`, with what earlier processes landed in it. Threads may share it.

    One process at a time holds it. Raises `BlockingIOError` where another one does, OSError where the disk refuses.
    """

    def __init__(self, path: str, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.landed_bytes = 0
        """What this process landed."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = threading.Lock()
        with contextlib.ExitStack() as opening:
            self._records = os.open(f"{path}.landed", flags | os.O_APPEND, 0o600)
            opening.callback(os.close, self._records)
            fcntl.flock(self._records, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file = os.open(path, flags, 0o600)
            opening.callback(os.close, self._file)
            os.ftruncate(self._file, size_bytes)
            self._landed = union(self._still_right())
            self.resumed_bytes = sum(one.length for one in self._landed)
            """What an earlier process had landed, and was found to be right."""
            opening.pop_all()

    def close(self) -> None:
        """Lets go of it; the file and its record stay."""
        os.close(self._file)
        os.close(self._records)

    def missing(self, ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
        """The bytes of `ranges` that have not landed."""
        with self._lock:
            return subtract(ranges, self._landed)

    def write(self, start: int, data: memoryview) -> None:
        """Puts bytes into their place; they have landed once `land` says so."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], start + done)

    def land(self, start: int, stop: int, crc: int) -> None:
        """Notes that the bytes ``[start, stop)``, whose CRC-32 is `crc`, are in place."""
        record = RECORD.pack(start, stop, crc)
        with self._lock:
            os.write(self._records, record + _CHECK.pack(crc32(record)))
            self._landed = union(self._landed, [ByteRange(start, stop)])
            self.landed_bytes += stop - start

    def read(self, start: int, nbytes: int) -> bytes:
        """Up to `nbytes` from `start` on, as they are on the disk."""
        return os.pread(self._file, nbytes, start)

    def _still_right(self) -> Iterator[ByteRange]:
        """Ranges whose record and bytes are whole. A record that was cut short, or overwritten, ends the reading."""
        size = RECORD.size + _CHECK.size
        position = 0
        while len(record := os.pread(self._records, size, position)) == size:
            if _CHECK.unpack(record[RECORD.size :])[0] != crc32(record[: RECORD.size]):
                break
            start, stop, crc = RECORD.unpack(record[: RECORD.size])
            if start < stop <= self.size_bytes and self._crc_of(start, stop) == crc:
                yield ByteRange(start, stop)
            position += size
        os.ftruncate(self._records, position)

    def _crc_of(self, start: int, stop: int) -> int:
        value = 0
        while start < stop:
            data = os.pread(self._file, min(_READ_BYTES, stop - start), start)
            if not data:
                return -1
            value = crc32(data, value)
            start += len(data)
        return value
