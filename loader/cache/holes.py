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
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator

from ..byte_ranges import ByteRange, subtract, union
from ..checksums import crc32

RECORD = struct.Struct("<QQI")
_CHECK = struct.Struct("<I")
_RECORD_BYTES = RECORD.size + _CHECK.size
_READ_BYTES = 1 << 20


class Landed:
    """What has landed of the file at `path`, as its record tells it to other processes; None of them changes it."""

    def __init__(self, path: str) -> None:
        self._record = landed_record(path)
        self._read_to = 0
        self._ranges: tuple[ByteRange, ...] = ()

    def has(self, start: int, stop: int) -> bool:
        """Whether all of these bytes are there by now."""
        if subtract([ByteRange(start, stop)], self._ranges):
            self._update()
        return not subtract([ByteRange(start, stop)], self._ranges)

    def reach(self, start: int, stop: int) -> int:
        """Up to where, from `start` on and to `stop` at most, all bytes are there by now."""
        for known in (True, False):
            if not known:
                self._update()
            at = bisect_right(self._ranges, (start, 1 << 63)) - 1
            if at >= 0 and self._ranges[at].start <= start < self._ranges[at].stop:
                return min(stop, self._ranges[at].stop)
        return start

    def missing(self, ranges: Iterable[tuple[int, int]]) -> tuple[ByteRange, ...]:
        """The bytes of `ranges` that are not there by now."""
        self._update()
        return subtract(ranges, self._ranges)

    def _update(self) -> None:
        with open(self._record, "rb") as file:
            file.seek(self._read_to)
            data = file.read()
        whole = len(data) - len(data) % _RECORD_BYTES
        found = [_unpack(data[at : at + _RECORD_BYTES]) for at in range(0, whole, _RECORD_BYTES)]
        self._ranges = union(self._ranges, (ByteRange(one[0], one[1]) for one in found if one is not None))
        self._read_to += whole


def landed_record(path: str) -> str:
    """Where the record of the file at `path` is, if it comes in parts."""
    return f"{path}.landed"


def _unpack(record: bytes) -> tuple[int, int, int] | None:
    """Start, stop and CRC-32; None where the record is not whole."""
    if _CHECK.unpack(record[RECORD.size :])[0] != crc32(record[: RECORD.size]):
        return None
    start, stop, crc = RECORD.unpack(record[: RECORD.size])
    return (start, stop, crc) if start < stop else None


class PartialFile:
    """The file at `path`, of `size_bytes`, with what earlier processes landed in it. Threads may share it.

    One process at a time holds it. Raises `BlockingIOError` where another one does, OSError where the disk refuses.
    """

    def __init__(self, path: str, size_bytes: int, on_compared: Callable[[int], None] | None = None) -> None:
        """`on_compared` is told of bytes of earlier processes as they are compared with their CRC-32s."""
        self.path = path
        self._on_compared = on_compared
        self.size_bytes = size_bytes
        self.landed_bytes = 0
        """What this process landed."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = threading.Lock()
        with contextlib.ExitStack() as opening:
            self._records = os.open(landed_record(path), flags | os.O_APPEND, 0o600)
            opening.callback(os.close, self._records)
            fcntl.flock(self._records, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file = os.open(path, flags, 0o600)
            opening.callback(os.close, self._file)
            os.ftruncate(self._file, size_bytes)
            right = list(self._still_right())
            self._landed = union(one for one, _ in right)
            # Other processes go by the record, so it tells nothing that was found to be wrong.
            os.ftruncate(self._records, 0)
            for one, crc in right:
                self._note(one.start, one.stop, crc)
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

    def landed(self, span: ByteRange) -> tuple[ByteRange, ...]:
        """The bytes of `span` that have."""
        return subtract([span], self.missing([span]))

    def write(self, start: int, data: memoryview) -> None:
        """Puts bytes into their place; they have landed once `land` says so."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], start + done)

    def land(self, start: int, stop: int, crc: int) -> None:
        """Notes that the bytes ``[start, stop)``, whose CRC-32 is `crc`, are in place."""
        with self._lock:
            self._note(start, stop, crc)
            self._landed = union(self._landed, [ByteRange(start, stop)])
            self.landed_bytes += stop - start

    def adopt(self, start: int, data: bytes) -> None:
        """Puts bytes into their place that were on this node already, and notes that they are."""
        self.write(start, memoryview(data))
        with self._lock:
            self._note(start, start + len(data), crc32(data))
            self._landed = union(self._landed, [ByteRange(start, start + len(data))])

    def _note(self, start: int, stop: int, crc: int) -> None:
        record = RECORD.pack(start, stop, crc)
        os.write(self._records, record + _CHECK.pack(crc32(record)))

    def read(self, start: int, nbytes: int) -> bytes:
        """Up to `nbytes` from `start` on, as they are on the disk."""
        return os.pread(self._file, nbytes, start)

    def _still_right(self) -> Iterator[tuple[ByteRange, int]]:
        """Ranges that are still right, with their CRC-32s. A record that was cut short, or overwritten, ends them."""
        position = 0
        while len(record := os.pread(self._records, _RECORD_BYTES, position)) == _RECORD_BYTES:
            told = _unpack(record)
            if told is None:
                break
            start, stop, crc = told
            if stop <= self.size_bytes and self._crc_of(start, stop) == crc:
                yield ByteRange(start, stop), crc
            position += _RECORD_BYTES

    def _crc_of(self, start: int, stop: int) -> int:
        value = 0
        while start < stop:
            data = os.pread(self._file, min(_READ_BYTES, stop - start), start)
            if not data:
                return -1
            value = crc32(data, value)
            start += len(data)
            if self._on_compared is not None:
                self._on_compared(len(data))
        return value
