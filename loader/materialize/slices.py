"""Says what is read of storages and how: neighbours by one read, and large ones by several threads. Pure.

`neighbours` joins small storages that lie close to each other. `CutStorage` cuts a large one into segments, each of
which a thread can read, and joins what they sum to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..byte_ranges import ByteRange
from ..checksums import CELL_BYTES, crc32_joined
from ..ranges.destinations import FirstWrite
from ..saved.tensor import StorageRef

MOST_THREADS = 8
"""How many threads of a rank read at most."""
SMALL_BYTES = 64 << 10
"""The largest storage that is read together with its neighbours, and the largest gap between two that is read too."""
_TOGETHER_BYTES = 1 << 20
"""How many bytes are read together at most: they must fit the processor's cache."""
SEGMENT_BYTES = 2 * CELL_BYTES
"""Where storages are cut for several threads: at multiples of it, as cells are, which then no two threads sum."""


@dataclass(frozen=True, slots=True)
class StorageSlice:
    """``nbytes`` bytes of a storage from byte ``start`` on, and where they go.

    They are read into ``view``; where that is None into memory of the `Staging` (at most ``STAGING_BYTES`` of them),
    and ``use`` is called with that memory to take them from there. ``first_write`` is noted before, where they go to
    memory that the caller of a load owns.
    """

    start: int
    nbytes: int
    view: memoryview | None = None
    use: Callable[[memoryview], None] | None = None
    first_write: FirstWrite | None = None


Planned = list[tuple[StorageRef, list[StorageSlice]]]
"""Storages, each with the slices that are read of it."""


def reading_threads(n_ranks: int) -> int:
    """How many threads a rank reads with, where `n_ranks` share this machine's processors."""
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // n_ranks))


def neighbours(planned: Planned) -> Iterator[Planned]:
    """`planned`, which is in the order of the files, in groups: small storages that lie close to each other, and each
    other one by itself."""
    group: Planned = []
    start = end = 0
    for storage, slices in planned:
        near = (
            group
            and storage.nbytes <= SMALL_BYTES
            and storage.file == group[0][0].file
            and end <= storage.offset <= end + SMALL_BYTES
            and storage.offset + storage.nbytes - start <= _TOGETHER_BYTES
        )
        if group and not near:
            yield group
            group = []
        if not group:
            start = storage.offset
        # One that is not small stays alone: nothing is near its end.
        end = storage.offset + storage.nbytes if storage.nbytes <= SMALL_BYTES else -SMALL_BYTES - 1
        group.append((storage, slices))
    if group:
        yield group


@dataclass(eq=False)
class Segment:
    """A part of a storage, and the slices, or parts of slices, that begin in it."""

    storage: StorageRef
    summed: bool
    span: ByteRange
    """What is summed of it. Segments of one storage follow each other without gaps."""
    slices: list[StorageSlice] = field(default_factory=list)
    crc: int = 0
    is_read: bool = False

    @property
    def nbytes(self) -> int:
        """About how much is read."""
        return self.span.length if self.summed else sum(one.nbytes for one in self.slices)


class CutStorage:
    """A storage, cut into segments."""

    def __init__(self, storage: StorageRef, slices: Sequence[StorageSlice], *, summed: bool) -> None:
        self.storage = storage
        self.summed = summed
        self.segments = segments_of(storage, slices, summed=summed)

    @property
    def is_right(self) -> bool:
        """Whether all of it was read, and matches its checksum where it is summed."""
        if not all(one.is_read for one in self.segments):
            return False
        sums = ((one.span.length, one.crc) for one in self.segments)
        return not self.summed or crc32_joined(sums) == self.storage.crc32


def segments_of(storage: StorageRef, slices: Sequence[StorageSlice], *, summed: bool) -> list[Segment]:
    """`storage` in segments, without those of which nothing is read. Slices that are read into their places are cut
    where segments begin; a slice that is used from a buffer stays whole, and moves the beginning of the next one."""
    parts: dict[int, list[StorageSlice]] = {}
    ends: dict[int, int] = {}
    for one in sorted(slices, key=lambda one: one.start):
        start, stop = one.start, one.start + one.nbytes
        if one.view is None:
            at = start // SEGMENT_BYTES
            parts.setdefault(at, []).append(one)
            ends[at] = max(ends.get(at, 0), stop)
            continue
        while start < stop:
            at = start // SEGMENT_BYTES
            end = min(stop, (at + 1) * SEGMENT_BYTES)
            view = one.view[start - one.start : end - one.start]
            parts.setdefault(at, []).append(replace(one, start=start, nbytes=end - start, view=view))
            start = end
    found = []
    begin = 0
    for at in range(-(-storage.nbytes // SEGMENT_BYTES)) if summed else sorted(parts):
        begin = begin if summed else at * SEGMENT_BYTES
        end = max(min((at + 1) * SEGMENT_BYTES, storage.nbytes), ends.get(at, 0), begin)
        span = ByteRange(begin, end)
        found.append(Segment(storage, summed, span, parts.get(at, [])))
        begin = end
    return found
