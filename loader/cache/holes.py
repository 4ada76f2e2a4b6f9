"""Keeps a remote object of which only ranges are on this node: a file with holes, and a record of what has landed.

    <name>           as long as the object; what has not landed is a hole
    <name>.landed    a record for each range that has: start, stop, the CRC-32 of its bytes, and one of the record
    <name>.again     locked while bytes are fetched again; which ones were, by load

`PartialFile` is for the process that fetches: it writes bytes before their record, so recorded bytes were there
however that process ended. The next one compares them with their CRC-32s and goes on with what is missing. `Landed`
reads the record in other processes. Any of them may put other bytes in the place of damaged ones (`replace_bytes`),
one at a time (`fetching_again`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..byte_ranges import ByteRange, include, overlap, subtract, total_bytes, union
from ..checksums import crc32, crc32_in_file
from .folder import open_private

_RECORD = struct.Struct("<QQI")
_CHECK = struct.Struct("<I")
_RECORD_BYTES = _RECORD.size + _CHECK.size
_POLL_S = 0.05
"""How often a process that waits for another one's lock looks."""


class PartialFile:
    """The file at `path`, of `size_bytes`, with what earlier processes landed in it. Threads may share it.

    One process at a time holds it. Raises `BlockingIOError` where another one does, OSError where the disk refuses.
    """

    def __init__(self, path: str, size_bytes: int, on_compared: Callable[[int], None] | None = None) -> None:
        """`on_compared` is called with how many bytes of earlier processes were just compared with their CRC-32."""
        self.path = path
        self._on_compared = on_compared
        self.size_bytes = size_bytes
        self.landed_bytes = 0
        """How many bytes this process landed."""
        flags = os.O_RDWR | os.O_CREAT
        self._lock = threading.Lock()
        with contextlib.ExitStack() as opening:
            self._records = open_private(landed_record(path), flags | os.O_APPEND)
            opening.callback(os.close, self._records)
            fcntl.flock(self._records, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file = open_private(path, flags)
            opening.callback(os.close, self._file)
            os.ftruncate(self._file, size_bytes)
            wrong: list[ByteRange] = []
            right = list(self._still_right(wrong))
            self._landed = list(union(one for one, _ in right))
            self.damaged_bytes = total_bytes(subtract(wrong, self._landed))
            """How many bytes that earlier processes had landed were found to be wrong, and are missing now."""
            # Other processes rely on the record, so what was found to be wrong is taken out.
            os.ftruncate(self._records, 0)
            for one, crc in right:
                self._note(one.start, one.stop, crc)
            self._read_to = os.fstat(self._records).st_size
            self.resumed_bytes = sum(one.length for one in self._landed)
            """How many bytes earlier processes had landed, and were found to be right."""
            opening.pop_all()

    def close(self) -> None:
        """Releases the file, so that another process may hold it; it and its record stay."""
        os.close(self._file)
        os.close(self._records)

    def missing(self, ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
        """The bytes of `ranges` that have not landed, by whatever process."""
        with self._lock:
            self._hear_of_others()
            return subtract(ranges, self._landed)

    def landed(self, span: ByteRange) -> tuple[ByteRange, ...]:
        """The bytes of `span` that have landed."""
        return self.landed_among([span])

    def landed_among(self, ranges: Sequence[ByteRange]) -> tuple[ByteRange, ...]:
        """The bytes of `ranges` that have landed."""
        return subtract(ranges, self.missing(ranges))

    def write(self, start: int, data: memoryview) -> None:
        """Writes `data` at `start`; it has landed once `land` was called for it."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], start + done)

    def land(self, start: int, stop: int, crc: int) -> None:
        """Records that the bytes ``[start, stop)``, whose CRC-32 is `crc`, are in place."""
        with self._lock:
            self._note(start, stop, crc)
            include(self._landed, start, stop)
            self.landed_bytes += stop - start

    def adopt(self, start: int, data: bytes) -> None:
        """Writes and records bytes that were on this node already; they do not count as `landed_bytes`."""
        self.write(start, memoryview(data))
        with self._lock:
            self._note(start, start + len(data), crc32(data))
            include(self._landed, start, start + len(data))

    def read(self, start: int, nbytes: int) -> bytes:
        """Up to `nbytes` from `start` on, as they are on the disk, landed or not."""
        return os.pread(self._file, nbytes, start)

    def forget(self, ranges: Iterable[ByteRange]) -> None:
        """From now on, the bytes of `ranges` have not landed. For before other processes know of the file."""
        with self._lock:
            self._landed = list(subtract(self._landed, ranges))
            os.ftruncate(self._records, 0)
            self._read_to = 0
            for start, stop in self._landed:
                self._note(start, stop, crc32_in_file(self._file, start, stop, self._on_compared))

    def _hear_of_others(self) -> None:
        """Takes in what other processes have recorded, which may land bytes too (`record_landed`)."""
        while len(record := os.pread(self._records, _RECORD_BYTES, self._read_to)) == _RECORD_BYTES:
            found = _unpack(record)
            if found is not None:
                include(self._landed, found[0], found[1])
            self._read_to += _RECORD_BYTES

    def _note(self, start: int, stop: int, crc: int) -> None:
        os.write(self._records, _packed(start, stop, crc))

    def _still_right(self, wrong: list[ByteRange]) -> Iterator[tuple[ByteRange, int]]:
        """Ranges that are still right, with their CRC-32s; adds the others to `wrong`. A record that was cut short, or
        overwritten, ends them."""
        position = 0
        while len(record := os.pread(self._records, _RECORD_BYTES, position)) == _RECORD_BYTES:
            found = _unpack(record)
            if found is None:
                break
            start, stop, crc = found
            if stop <= self.size_bytes:
                if crc32_in_file(self._file, start, stop, self._on_compared) == crc:
                    yield ByteRange(start, stop), crc
                else:
                    wrong.append(ByteRange(start, stop))
            position += _RECORD_BYTES


class Landed:
    """What has landed of the file at `path`, as its record says. For processes that read it; writes nothing."""

    def __init__(self, path: str) -> None:
        self._record = landed_record(path)
        self._read_to = 0
        self._ranges: list[ByteRange] = []

    def has(self, start: int, stop: int) -> bool:
        """Whether all bytes ``[start, stop)`` are there by now."""
        if start >= stop or self.reach(start, stop) == stop:
            return True
        self._update()
        return self.reach(start, stop) == stop

    def reach(self, start: int, stop: int) -> int:
        """The position up to which all bytes from `start` on are there by now; `stop` at most."""
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

    def landed(self, ranges: Iterable[tuple[int, int]]) -> tuple[ByteRange, ...]:
        """The bytes of `ranges` that are there by now."""
        self._update()
        return overlap(union(ranges), self._ranges)

    def _update(self) -> None:
        with open(self._record, "rb") as file:
            file.seek(self._read_to)
            data = file.read()
        whole = len(data) - len(data) % _RECORD_BYTES
        found = [_unpack(data[at : at + _RECORD_BYTES]) for at in range(0, whole, _RECORD_BYTES)]
        for one in found:
            if one is not None:
                include(self._ranges, one[0], one[1])
        self._read_to += whole


def landed_record(path: str) -> str:
    """The path of the record of the file at `path`."""
    return f"{path}.landed"


def again_record(path: str) -> str:
    """The path of the record of what was fetched again of the file at `path`."""
    return f"{path}.again"


def record_landed(path: str, start: int, stop: int, crc: int) -> None:
    """Records that bytes ``[start, stop)`` of the partial file at `path`, whose CRC-32 is `crc`, are in place.

    For processes that do not hold the file (`PartialFile`), of bytes that no other one fetches.
    """
    with open(landed_record(path), "ab", buffering=0) as records:
        records.write(_packed(start, stop, crc))


class FetchedAgain:
    """What one load has fetched again of a file, on this node; `fetching_again` makes it."""

    def __init__(self, fd: int, load_id: str) -> None:
        self._fd = fd
        self._load_id = load_id

    def left(self, ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
        """The bytes of `ranges` that are not among them."""
        lines = os.pread(self._fd, os.fstat(self._fd).st_size, 0).decode("ascii", "replace").splitlines()
        noted = [line.split() for line in lines if line.startswith(f"{self._load_id} ")]
        held = [ByteRange(int(start), int(stop)) for _, start, stop in noted]
        return subtract(ranges, held)

    def note(self, ranges: Iterable[ByteRange]) -> None:
        """Adds `ranges`."""
        text = "".join(f"{self._load_id} {start} {stop}\n" for start, stop in ranges)
        os.pwrite(self._fd, text.encode("ascii"), os.fstat(self._fd).st_size)


@contextlib.contextmanager
def fetching_again(path: str, load_id: str, on_wait: Callable[[], None]) -> Iterator[FetchedAgain]:
    """Holds the right to put other bytes in the place of those of the file at `path`, among this node's processes.

    `load_id` is that of the load on all of its ranks. `on_wait` is called while another process holds it; it may raise.
    """
    fd = open_private(again_record(path), os.O_RDWR | os.O_CREAT)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(_POLL_S)
        yield FetchedAgain(fd, load_id)
    finally:
        os.close(fd)


@contextlib.contextmanager
def replace_bytes(path: str, ranges: Iterable[ByteRange]) -> Iterator[None]:
    """Around the writing of other bytes in `ranges` of the partial file at `path`: keeps its record right.

    What was recorded together with them stays recorded, where it is still what was recorded. Hold `fetching_again`.
    """
    spans = union(ranges)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        beside = [
            (*left, crc32_in_file(file, *left))
            for start, stop, crc in _records_of(path)
            if subtract([(start, stop)], spans) != (ByteRange(start, stop),)
            and crc32_in_file(file, start, stop) == crc
            for left in subtract([(start, stop)], spans)
        ]
        yield
        put = [(*span, crc32_in_file(file, *span)) for span in spans]
        with open(landed_record(path), "ab", buffering=0) as records:
            for start, stop, crc in (*beside, *put):
                records.write(_packed(start, stop, crc))
    finally:
        os.close(file)


def _records_of(path: str) -> Iterator[tuple[int, int, int]]:
    with open(landed_record(path), "rb") as file:
        data = file.read()
    for at in range(0, len(data) - len(data) % _RECORD_BYTES, _RECORD_BYTES):
        found = _unpack(data[at : at + _RECORD_BYTES])
        if found is not None:
            yield found


def _packed(start: int, stop: int, crc: int) -> bytes:
    record = _RECORD.pack(start, stop, crc)
    return record + _CHECK.pack(crc32(record))


def _unpack(record: bytes) -> tuple[int, int, int] | None:
    """Start, stop and CRC-32; None where the record is not whole."""
    if _CHECK.unpack(record[_RECORD.size :])[0] != crc32(record[: _RECORD.size]):
        return None
    start, stop, crc = _RECORD.unpack(record[: _RECORD.size])
    return (start, stop, crc) if start < stop else None
