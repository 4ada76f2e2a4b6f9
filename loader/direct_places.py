"""Which pieces of storages come straight from the store into their memory, and which are left to the node's files.

Free of torch.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .direct_reads import DirectReads, Landed, Placement
from .range_sums import RangeSums
from .ranges import ByteRange, subtract
from .values import StorageRef

if TYPE_CHECKING:
    from .storage_read import Piece

Planned = list[tuple[StorageRef, "list[Piece]"]]


def divide(
    direct: DirectReads,
    planned: Sequence[tuple[StorageRef, Sequence[Piece]]],
    shares: Mapping[StorageRef, RangeSums],
    on_bytes: Callable[[int], None] | None,
) -> tuple[Planned, dict[str, Placement]]:
    """The pieces that are left, and what `direct` is to place, by path.

    What lands is summed into `shares`, and told to `on_bytes`, in the reading threads, one at a time.
    """
    left: Planned = []
    placements: dict[str, Placement] = {}
    storages: dict[str, list[StorageRef]] = {}
    for storage, pieces in planned:
        kept: list[Piece] = []
        placement = placements.get(storage.file) or Placement()
        before = len(placement.pieces)
        for piece in pieces:
            kept.extend(_leave(direct, storage, piece, placement))
        if len(placement.pieces) > before:
            placements[storage.file] = placement
            storages.setdefault(storage.file, []).append(storage)
            if storage.header >= 0:
                placement.headers.append(ByteRange(storage.header, storage.offset))
        left.append((storage, kept))
    for path, placement in placements.items():
        placement.landed = _landing(storages[path], placement, shares, on_bytes)
    return left, placements


def _leave(direct: DirectReads, storage: StorageRef, piece: Piece, placement: Placement) -> Iterator[Piece]:
    """Puts what of `piece` comes straight from the store into `placement`; yields the rest."""
    first, view = storage.offset + piece.start, piece.view
    spans = direct.of(storage.file, first, first + piece.nbytes) if view is not None else ()
    if not spans or view is None:
        yield piece
        return
    for start, stop in spans:
        placement.pieces.append((start, view[start - first : stop - first]))
    for start, stop in subtract([ByteRange(first, first + piece.nbytes)], spans):
        part = view[start - first : stop - first]
        yield replace(piece, start=start - storage.offset, nbytes=stop - start, view=part)


def _landing(
    storages: Sequence[StorageRef],
    placement: Placement,
    shares: Mapping[StorageRef, RangeSums],
    on_bytes: Callable[[int], None] | None,
) -> Landed:
    """Sums what has landed of `storages`, of one file, where it is to be summed here."""
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
