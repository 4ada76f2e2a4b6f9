"""Divides slices into what comes directly from the store, all at once, and what is read of files. Free of torch."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from ..byte_ranges import ByteRange, subtract
from ..checksums import RangeSums
from ..ranges.destinations import FirstWrite
from ..ranges.direct import DirectReads, Placement
from ..ranges.engine import OnLanded
from ..saved.tensor import StorageRef
from .slices import Planned, StorageSlice


def own_memory(
    wanted: StorageSlice,
    direct: DirectReads,
    storage: StorageRef,
    owned: list[tuple[FirstWrite, memoryview, memoryview]],
) -> StorageSlice:
    """`wanted` with memory apart in place of memory that the caller of the load owns, where all of it comes directly;
    adds both to `owned`."""
    span = ByteRange(storage.offset + wanted.start, storage.offset + wanted.start + wanted.nbytes)
    if wanted.first_write is None or wanted.view is None or direct.of(storage.file, *span) != (span,):
        return wanted
    landed = memoryview(bytearray(wanted.nbytes))
    owned.append((wanted.first_write, wanted.view, landed))
    return replace(wanted, view=landed, first_write=None)


def divide(
    direct: DirectReads,
    planned: Sequence[tuple[StorageRef, Sequence[StorageSlice]]],
    shares: Mapping[StorageRef, RangeSums],
    on_bytes: Callable[[int], None] | None,
) -> tuple[Planned, dict[str, Placement]]:
    """The slices that are left to read from files, and the `Placement` of what `direct` is to read, by path.

    What lands is summed into `shares` and counted by `on_bytes`, in the reading threads, by one at a time.
    """
    left: Planned = []
    placements: dict[str, Placement] = {}
    storages: dict[str, list[StorageRef]] = {}
    for storage, slices in planned:
        kept: list[StorageSlice] = []
        placement = placements.get(storage.file) or Placement()
        before = len(placement.pieces)
        for one in slices:
            kept.extend(_place_direct(direct, storage, one, placement))
        if len(placement.pieces) > before:
            placements[storage.file] = placement
            storages.setdefault(storage.file, []).append(storage)
            if storage.header >= 0:
                placement.headers.append(ByteRange(storage.header, storage.offset))
        left.append((storage, kept))
    for path, placement in placements.items():
        placement.landed = _on_landed(storages[path], placement, shares, on_bytes)
    return left, placements


def _place_direct(
    direct: DirectReads, storage: StorageRef, wanted: StorageSlice, placement: Placement
) -> Iterator[StorageSlice]:
    """Adds what of `wanted` comes directly to `placement`; yields the rest."""
    first, view = storage.offset + wanted.start, wanted.view
    spans = direct.of(storage.file, first, first + wanted.nbytes) if view is not None else ()
    if not spans or view is None:
        yield wanted
        return
    for start, stop in spans:
        placement.pieces.append((start, view[start - first : stop - first]))
        if wanted.first_write is not None:
            placement.first_writes[start] = wanted.first_write
    for start, stop in subtract([ByteRange(first, first + wanted.nbytes)], spans):
        part = view[start - first : stop - first]
        yield replace(wanted, start=start - storage.offset, nbytes=stop - start, view=part)


def _on_landed(
    storages: Sequence[StorageRef],
    placement: Placement,
    shares: Mapping[StorageRef, RangeSums],
    on_bytes: Callable[[int], None] | None,
) -> OnLanded:
    """What to call as bytes of one file land in `placement`: sums those that `shares` has of its `storages`."""
    in_order = sorted(storages, key=lambda storage: storage.offset)
    offsets = [storage.offset for storage in in_order]
    pieces = sorted(placement.pieces, key=lambda piece: piece[0])
    starts = [start for start, _ in pieces]
    one_at_a_time = threading.Lock()

    def landed(start: int, stop: int) -> None:
        with one_at_a_time:
            at = max(bisect_right(starts, start) - 1, 0)
            while at < len(pieces) and pieces[at][0] < stop:
                first, view = pieces[at]
                begin, end = max(first, start), min(first + view.nbytes, stop)
                storage = in_order[bisect_right(offsets, first) - 1]
                sums = shares.get(storage)
                if begin < end and sums is not None:
                    sums.update(begin - storage.offset, view[begin - first : end - first])
                at += 1
            if on_bytes is not None:
                on_bytes(stop - start)

    return landed
