"""Computes CRC-32s: of bytes, of bytes joined from parts, and of ranges whose bytes arrive in any order.

The values are those that zip archives keep (and zlib's ``crc32`` returns). isal computes them where it is installed,
several times as fast as zlib.
"""

from __future__ import annotations

import os
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from .byte_ranges import ByteRange

__all__ = ["CELL_BYTES", "RangeSums", "crc32", "crc32_combine", "crc32_in_file", "crc32_joined"]

CELL_BYTES = 8 << 20
"""Storages are cut at multiples of this, so that ranks that read the same bytes share the summing."""

_READ_BYTES = 1 << 20
_POLYNOMIAL = 0xEDB88320
"""CRC-32's generator polynomial (IEEE 802.3), lowest bit first, as zip archives use it."""


def crc32(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """The CRC-32 of `data`, continued from `value`, the CRC-32 of what came before."""
    return _crc32(data, value)


def crc32_in_file(file: int, start: int, stop: int, on_summed: Callable[[int], None] | None = None) -> int:
    """The CRC-32 of the bytes ``[start, stop)`` of the open `file`, a descriptor; -1 where it ends before.

    `on_summed` is called with how many bytes were just summed.
    """
    value = 0
    while start < stop:
        data = os.pread(file, min(_READ_BYTES, stop - start), start)
        if not data:
            return -1
        value = crc32(data, value)
        start += len(data)
        if on_summed is not None:
            on_summed(len(data))
    return value


def crc32_combine(first: int, second: int, second_length: int) -> int:
    """The CRC-32 of two parts laid end to end, from the CRC-32 of each and the length of the second in bytes."""
    return _crc32_combine(first, second, second_length)


def crc32_joined(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of parts laid end to end, in order; each is a pair of its length in bytes and its CRC-32."""
    joined = 0
    for length, value in parts:
        joined = crc32_combine(joined, value, length)
    return joined


class RangeSums:
    """Sums disjoint ranges of one storage, each to its CRC-32, from bytes that arrive in any order.

    A byte that arrives again is not summed again, nor compared with the first. Several threads may use it.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._cells = [_Cell(start, stop) for start, stop in sorted(ranges)]
        self._starts = [cell.start for cell in self._cells]

    def update(self, start: int, data: memoryview) -> None:
        """Sums those of the bytes `data`, which begin at `start`, that lie in the ranges and were not summed before."""
        stop = start + len(data)
        index = max(bisect_right(self._starts, start) - 1, 0)
        while index < len(self._cells) and self._cells[index].start < stop:
            cell = self._cells[index]
            with cell.lock:
                for begin, end in cell.missing(start, stop):
                    cell.add(begin, end, data[begin - start : end - start])
            index += 1

    def missing(self) -> Iterator[ByteRange]:
        """The bytes of the ranges that were not summed yet, in order."""
        for cell in self._cells:
            yield from cell.missing(cell.start, cell.stop)

    def sums(self) -> list[int]:
        """Each range's CRC-32, in the order of their starts. Raises `ValueError` while some are `missing`."""
        found = []
        for cell in self._cells:
            if len(cell.runs) != 1 or cell.runs[0][:2] != (cell.start, cell.stop):
                raise ValueError(f"bytes {cell.start} to {cell.stop} have not all been summed")
            found.append(cell.runs[0][2])
        return found


@dataclass
class _Cell:
    """One range to sum, ``[start, stop)``."""

    start: int
    stop: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while bytes of it are summed, which several threads may want to."""
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    """What was summed of it: start, stop and CRC-32 of runs that neither overlap nor touch, in order."""

    def missing(self, start: int, stop: int) -> list[ByteRange]:
        gaps = []
        position = max(start, self.start)
        stop = min(stop, self.stop)
        for begin, end, _ in self.runs:
            if begin >= stop:
                break
            if position < begin:
                gaps.append(ByteRange(position, begin))
            position = max(position, end)
        if position < stop:
            gaps.append(ByteRange(position, stop))
        return gaps

    def add(self, start: int, stop: int, data: memoryview) -> None:
        """Sums `data`, the bytes ``[start, stop)``, all of them `missing`, and joins the run with its neighbours."""
        at = bisect_right(self.runs, (start, stop, 0))
        before = self.runs[at - 1] if at else None
        if before is not None and before[1] == start:
            run = (before[0], stop, crc32(data, before[2]))
            self.runs[at - 1 : at] = []
            at -= 1
        else:
            run = (start, stop, crc32(data))
        if at < len(self.runs) and self.runs[at][0] == stop:
            begin, end, value = self.runs.pop(at)
            run = (run[0], end, crc32_combine(run[2], value, end - begin))
        self.runs.insert(at, run)


def _combine(first: int, second: int, second_length: int) -> int:
    """As `crc32_combine`, without isal, by the method of zlib's ``crc32_combine``.

    To append zero bytes is a linear map of the CRC over GF(2). It is applied to `first` for `second_length` bytes, by
    one matrix for each bit of that length; then the two are added.
    """
    if second_length < 0:
        raise ValueError(f"a run of {second_length} bytes")
    first &= 0xFFFFFFFF
    bit = 0
    while second_length >> bit:
        if second_length >> bit & 1:
            first = _times(_zero_bytes(bit), first)
        bit += 1
    return (first ^ second) & 0xFFFFFFFF


@lru_cache(maxsize=64)
def _zero_bytes(power: int) -> tuple[int, ...]:
    """The matrix that appends 2**power zero bytes: its columns are the images of the CRC's 32 bits."""
    if power == 0:
        columns = tuple(1 << bit for bit in range(32))
        for _ in range(8):
            columns = tuple(value >> 1 ^ (_POLYNOMIAL if value & 1 else 0) for value in columns)
        return columns
    half = _zero_bytes(power - 1)
    return tuple(_times(half, value) for value in half)


def _times(columns: tuple[int, ...], value: int) -> int:
    """The product of a matrix, by columns, and the vector of the bits of `value`, over GF(2)."""
    total = 0
    bit = 0
    while value:
        if value & 1:
            total ^= columns[bit]
        value >>= 1
        bit += 1
    return total


_Crc = Callable[..., int]
try:
    from isal import isal_zlib

    _crc32: _Crc = isal_zlib.crc32
    _crc32_combine: _Crc = isal_zlib.crc32_combine
except ImportError:
    _crc32, _crc32_combine = zlib.crc32, _combine
