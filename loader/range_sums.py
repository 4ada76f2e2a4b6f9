"""CRC-32s of byte ranges that come in parts, in any order. Free of torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .byte_ranges import ByteRange
from .checksums import crc32, crc32_combine

__all__ = ["RangeSums", "crc32_joined"]


def crc32_joined(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of runs of bytes one after the other, each told by its length and its own CRC-32."""
    joined = 0
    for length, value in parts:
        joined = crc32_combine(joined, value, length)
    return joined


@dataclass
class _Cell:
    """One range that is to be summed: which runs of it have been, in order, and what each sums to."""

    start: int
    stop: int
    runs: list[tuple[int, int, int]] = field(default_factory=list)

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


class RangeSums:
    """The CRC-32s of disjoint ranges of one storage, summed up as their bytes come by; each byte counts once."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._cells = [_Cell(start, stop) for start, stop in sorted(ranges)]
        self._starts = [cell.start for cell in self._cells]

    def update(self, start: int, data: memoryview) -> None:
        """Takes in the bytes from `start` on: those that lie in the ranges and were not seen before."""
        stop = start + len(data)
        index = max(bisect_right(self._starts, start) - 1, 0)
        while index < len(self._cells) and self._cells[index].start < stop:
            cell = self._cells[index]
            for begin, end in cell.missing(start, stop):
                cell.add(begin, end, data[begin - start : end - start])
            index += 1

    def missing(self) -> Iterator[ByteRange]:
        """What has not come by yet."""
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
