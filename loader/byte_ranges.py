"""Computes with byte ranges of one object: union, difference, overlap, merging over small gaps, cutting into chunks.

Pure. Arguments may be in any order and overlap; ranges are returned in order, without overlaps.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

CHUNK_BYTES = 8 << 20
"""Chunks begin and end at multiples of this, or where their range does."""
MAX_GAP_BYTES = 256 << 10
"""`coalesce` reads no longer gap: one more request costs about as much as so many bytes on a fast link."""
MAX_WASTE = 1 / 20
"""How many bytes `coalesce` may add for the sake of fewer requests, as a share of the wanted bytes."""
FREE_GAP_BYTES = 512
"""`coalesce` reads any gap up to this: the headers of one more request and of its answer have as many bytes."""
RECORD_GAP_BYTES = 64
"""A gap up to this belongs to the record before it: torch ends each record of a zip with 16 or 24 bytes of sizes."""


class ByteRange(NamedTuple):
    """Bytes ``[start, stop)`` of an object."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def union(*many: Iterable[tuple[int, int]]) -> tuple[ByteRange, ...]:
    """The bytes that are in any of the ranges, as ranges that neither overlap nor touch; empty ones are left out.

    Raises `ValueError` for a range that begins before 0 or ends before it begins.
    """
    merged: list[ByteRange] = []
    for start, stop in sorted(one for ranges in many for one in ranges):
        if start < 0 or stop < start:
            raise ValueError(f"not a range of bytes: [{start}, {stop})")
        if start == stop:
            continue
        if merged and start <= merged[-1].stop:
            merged[-1] = ByteRange(merged[-1].start, max(merged[-1].stop, stop))
        else:
            merged.append(ByteRange(start, stop))
    return tuple(merged)


def subtract(wanted: Iterable[tuple[int, int]], have: Iterable[tuple[int, int]]) -> tuple[ByteRange, ...]:
    """The bytes of `wanted` that are not in `have`."""
    missing = []
    held = union(have)
    index = 0
    for one in union(wanted):
        position = one.start
        while index < len(held) and held[index].stop <= position:
            index += 1
        ahead = index
        while ahead < len(held) and held[ahead].start < one.stop:
            if held[ahead].start > position:
                missing.append(ByteRange(position, held[ahead].start))
            position = held[ahead].stop
            ahead += 1
        if position < one.stop:
            missing.append(ByteRange(position, one.stop))
    return tuple(missing)


def overlap(one: Iterable[ByteRange], other: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    """The bytes that are in both `one` and `other`."""
    kept = union(one)
    return subtract(kept, subtract(kept, other))


def once(ranges: Iterable[tuple[int, int]]) -> tuple[ByteRange, ...]:
    """The bytes that are in exactly one of `ranges`."""
    steps: dict[int, int] = {}
    for start, stop in ranges:
        if start < stop:
            steps[start] = steps.get(start, 0) + 1
            steps[stop] = steps.get(stop, 0) - 1
    depth = 0
    alone = []
    for position, after in pairwise(sorted(steps)):
        depth += steps[position]
        if depth == 1:
            alone.append(ByteRange(position, after))
    return union(alone)


def total_bytes(ranges: Iterable[ByteRange]) -> int:
    """How many bytes are in `ranges`, each counted once."""
    return sum(one.length for one in union(ranges))


def coalesce(
    ranges: Iterable[ByteRange],
    *,
    max_gap: int = MAX_GAP_BYTES,
    max_waste: float = MAX_WASTE,
    free_gap: int = FREE_GAP_BYTES,
) -> tuple[ByteRange, ...]:
    """`ranges` merged over small gaps, the smallest first, so that fewer requests read them.

    No gap of more than `max_gap` bytes is included, and all that are have at most `max_waste` of the wanted bytes. Gaps
    up to `free_gap` are included however many there are, and count.
    """
    merged = union(ranges)
    left = int(sum(one.length for one in merged) * max_waste)
    gaps = sorted(
        (after.start - before.stop, index)
        for index, (before, after) in enumerate(pairwise(merged))
        if after.start - before.stop <= max_gap
    )
    closed = []
    for gap, index in gaps:
        if gap > free_gap and gap > left:
            break
        left -= gap
        closed.append(ByteRange(merged[index].stop, merged[index + 1].start))
    return union(merged, closed)


def with_gaps(ranges: Iterable[tuple[int, int]], max_gap: int) -> tuple[ByteRange, ...]:
    """`ranges` and all gaps between them of at most `max_gap` bytes."""
    merged = union(ranges)
    small = ((one.stop, after.start) for one, after in pairwise(merged) if after.start - one.stop <= max_gap)
    return union(merged, small)


def include(held: list[ByteRange], start: int, stop: int) -> None:
    """Adds ``[start, stop)`` to `held`, whose ranges are in order, neither overlap nor touch, and do not afterwards.

    For lists of many ranges, to which few are added at a time.
    """
    if start >= stop:
        return
    first = bisect_left(held, start, key=lambda one: one.stop)
    last = bisect_right(held, stop, key=lambda one: one.start)
    if first < last:
        start, stop = min(start, held[first].start), max(stop, held[last - 1].stop)
    held[first:last] = [ByteRange(start, stop)]


def split(ranges: Iterable[ByteRange], *, chunk_bytes: int = CHUNK_BYTES) -> tuple[ByteRange, ...]:
    """`ranges` cut at multiples of `chunk_bytes` in the object, so that the cuts do not move when ranges change.

    A chunk has from half of `chunk_bytes` to twice as many, or is a whole range that is shorter: less than half a
    chunk at either end of a range stays with its neighbour. Raises `ValueError` for chunks of fewer than 2 bytes.
    """
    if chunk_bytes < 2:
        raise ValueError(f"chunks of {chunk_bytes} bytes")
    chunks: list[ByteRange] = []
    for one in union(ranges):
        first = (one.start // chunk_bytes + 1) * chunk_bytes
        cuts = list(range(first, one.stop, chunk_bytes))
        if cuts and cuts[0] - one.start < chunk_bytes / 2:
            del cuts[0]
        if cuts and one.stop - cuts[-1] < chunk_bytes / 2:
            del cuts[-1]
        chunks.extend(ByteRange(*edges) for edges in pairwise([one.start, *cuts, one.stop]))
    return tuple(chunks)
