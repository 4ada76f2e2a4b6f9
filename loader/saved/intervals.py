"""Computes which runs of saved elements fill which wanted ones, where partitions of two world sizes meet. Pure.

A parameter is a row of ``numel`` elements in row-major order. It was saved in pieces, each a run of elements inside a
flat tensor of some rank, and is wanted in slots, each a run inside another. `cut` makes the pieces or slots of equal
partitions, `intersect` the copies between them. Intervals are half-open and count elements, not bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


class CoverageError(ValueError):
    """Pieces or slots overlap, or a wanted element lies in no piece."""


class Place(NamedTuple):
    """Names a flat tensor: that of a rank, which saved it or wants it, and of an optimizer's parameter group."""

    rank: int
    group: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``[param_start, param_start + length)`` of a parameter, from element ``start`` of ``place`` on."""

    place: Place
    start: int
    param_start: int
    length: int

    @property
    def param_stop(self) -> int:
        return self.param_start + self.length


@dataclass(frozen=True, slots=True)
class Copy:
    """``length`` elements from ``source[source_start:]`` to ``target[target_start:]``."""

    source: Place
    source_start: int
    target: Place
    target_start: int
    length: int


def cut(
    param_start: int,
    length: int,
    partition: int,
    count: int,
    group: int = 0,
    ranks: Sequence[int] | None = None,
) -> list[Piece]:
    """The pieces of a parameter of `length` elements that begins at element `param_start` of a row of partitions.

    The row is `count` partitions of `partition` elements each, one on each of `ranks` in that order, by default
    0, 1, 2 ... A piece's ``param_start`` counts from the parameter's first element, its ``start`` from the partition's.
    Raises `CoverageError` where the parameter reaches beyond the row.
    """
    if length < 0 or param_start < 0 or partition < 0 or param_start + length > partition * count:
        raise CoverageError(
            f"elements [{param_start}, {param_start + length}) do not lie in {count} partitions of {partition}"
        )
    pieces = []
    position = param_start
    stop = param_start + length
    while position < stop:
        index = position // partition
        end = min(stop, (index + 1) * partition)
        place = Place(index if ranks is None else ranks[index], group)
        pieces.append(Piece(place, position - index * partition, position - param_start, end - position))
        position = end
    return pieces


def intersect(pieces: Iterable[Piece], slots: Iterable[Piece]) -> list[Copy]:
    """The copies that fill every element of `slots` exactly once, from `pieces` of the same parameter, in its order.

    Pieces that no slot wants, and empty pieces and slots, are passed over. Raises `CoverageError` where two pieces or
    two slots hold the same element, or a wanted element is in no piece.
    """
    sources = _ordered(pieces, "saved")
    starts = [piece.param_start for piece in sources]
    copies = []
    for slot in _ordered(slots, "wanted"):
        position = slot.param_start
        index = max(bisect_right(starts, position) - 1, 0)
        while position < slot.param_stop:
            if (
                index >= len(sources)
                or not sources[index].param_start <= position < sources[index].param_stop
            ):
                raise CoverageError(
                    f"element {position} of the parameter is wanted and lies in no saved piece"
                )
            piece = sources[index]
            end = min(piece.param_stop, slot.param_stop)
            copies.append(
                Copy(
                    piece.place,
                    piece.start + position - piece.param_start,
                    slot.place,
                    slot.start + position - slot.param_start,
                    end - position,
                )
            )
            position = end
            index += 1
    return copies


def _ordered(intervals: Iterable[Piece], what: str) -> Sequence[Piece]:
    """Those that are not empty, by ``param_start``. Raises `CoverageError` where they overlap."""
    found = sorted((one for one in intervals if one.length), key=lambda one: one.param_start)
    for one in found:
        if one.length < 0 or one.start < 0 or one.param_start < 0:
            raise CoverageError(f"a {what} piece begins or ends before 0: {one}")
    for before, after in pairwise(found):
        if after.param_start < before.param_stop:
            raise CoverageError(f"two {what} pieces hold element {after.param_start} of the parameter")
    return found
