"""Works out the ranges of remote files that one rank reads: before its restore, and for it. Pure.

`early_parts` are those that are read before anything is checked, `parts_of_restore` what the restore reads and what
this rank sums.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..byte_ranges import ByteRange, subtract
from ..saved.contents import Saved
from ..saved.copies import StorageReads
from ..saved.tensor import StorageRef
from ..saved.tree import storages
from .rounds import Parts, WantedRanges


def early_parts(saved: Saved) -> WantedRanges:
    """The ranges that are read before anything is checked: random states, and `Saved.extra`.

    All else comes with the ranges around it, however small it is.
    """
    return all_parts([saved.rng, saved.extra])


def all_parts(tree: Any) -> WantedRanges:
    """The ranges of all storages in `tree`."""
    wanted: WantedRanges = {}
    _add_whole(wanted, storages(tree))
    return wanted


def parts_of_restore(
    reads: Mapping[StorageRef, StorageReads],
    summed: Mapping[StorageRef, Sequence[ByteRange]],
    alone: Collection[StorageRef],
    shared: Mapping[StorageRef, Sequence[ByteRange]],
    unplanned: Iterable[StorageRef] = (),
    *,
    direct: bool,
) -> Parts:
    """The ranges of files, by path, that the restore and its checksums read on this rank.

    The arguments are those of `parts.restore_parts`; `direct`: whether some may be fetched directly.
    """
    parts = Parts()
    for wanted in ({storage: one.ranges for storage, one in reads.items()}, summed, shared):
        for storage, ranges in wanted.items():
            add_storage(parts.wanted, storage, ranges)
    _add_whole(parts.wanted, alone)
    whole = list(unplanned)
    _add_whole(parts.wanted, whole)
    if direct and not whole:
        _add_direct(parts.direct, {one: reads[one] for one in reads.keys() - set(alone)}, summed, shared)
    return parts


def _add_direct(
    direct: WantedRanges,
    reads: Mapping[StorageRef, StorageReads],
    summed: Mapping[StorageRef, Sequence[ByteRange]],
    shared: Mapping[StorageRef, Sequence[ByteRange]],
) -> None:
    """Adds the ranges that can be fetched directly into this rank's tensors."""
    for storage, one in reads.items():
        # Bytes that are only summed have no memory to be fetched into.
        spans = subtract(one.direct, subtract(summed.get(storage, ()), one.ranges))
        if spans:
            add_storage(direct, storage, spans)
    for storage, provided in shared.items():
        add_storage(direct, storage, provided)


def add_storage(wanted: WantedRanges, storage: StorageRef, ranges: Iterable[ByteRange]) -> None:
    """Adds `ranges` of `storage`, and its header, to the ranges of its file."""
    mine = wanted.setdefault(storage.file, [])
    if storage.header >= 0:
        mine.append(ByteRange(storage.header, storage.offset))
    mine.extend(ByteRange(storage.offset + start, storage.offset + stop) for start, stop in ranges)


def _add_whole(wanted: WantedRanges, storages: Iterable[StorageRef]) -> None:
    """Adds all bytes of `storages`."""
    for storage in storages:
        add_storage(wanted, storage, [ByteRange(0, storage.nbytes)])
