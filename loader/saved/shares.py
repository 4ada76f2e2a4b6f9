"""The pieces of a parameter that ZeRO stage 3 has cut into equal shares, without an object for each. Pure.

The flat tensors of thousands of saved ranks each have a share of each of a thousand parameters: millions of pieces,
which differ only in the rank that has them. `Shares` computes each piece where it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from .regions import Run
from .strided import Layout
from .tensor import Piece, StorageRef


@dataclass(frozen=True, slots=True)
class FlatShares:
    """The flat tensors of one kind of saved ranks that follow each other; shared by the parameters in them."""

    first: int
    """The first of those ranks."""
    storages: tuple[StorageRef, ...]
    """Of each of them."""
    offset: int
    """Of the flat tensor's first element, the same in each of the storages."""
    numel: int
    """Elements of the shortest of them."""


class Shares(Sequence[Piece]):
    """The pieces of a parameter, in the order of its elements: the shares that are in `flats`, and what lies before
    and after them, which may be pieces of files that were not read."""

    __slots__ = ("_after", "_before", "_count", "_flats", "_numel", "_share", "_start")

    def __init__(
        self,
        flats: FlatShares,
        *,
        numel: int,
        share: int,
        start: int,
        before: Sequence[Piece] = (),
        after: Sequence[Piece] = (),
    ) -> None:
        """Rank r has elements [r * `share`, (r + 1) * `share`) of the parameter's `numel`, as far as there are any,
        from element `start` of its flat tensor on."""
        self._flats = flats
        self._numel = numel
        self._share = share
        self._start = start
        self._count = max(0, min(len(flats.storages), -(-numel // share) - flats.first))
        self._before = tuple(before)
        self._after = tuple(after)

    def __len__(self) -> int:
        return len(self._before) + self._count + len(self._after)

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Piece]: ...
    def __getitem__(self, index: int | slice) -> Piece | Sequence[Piece]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        at = index - len(self._before)
        if at < 0:
            return self._before[index]
        if at >= self._count:
            return self._after[at - self._count]
        first = (self._flats.first + at) * self._share
        run = Run(first, min(self._share, self._numel - first))
        return Piece(run, self._flats.offset + self._start, (1,), self._flats.storages[at])

    def fill(self, run: Run, offset: int) -> Iterator[tuple[StorageRef, Layout, Layout]] | None:
        """What fills `run`, whose elements follow each other from `offset` on: a storage, where they lie in it, and
        where they go. None where the shares do not have all of it.
        """
        first, share = self._flats.first, self._share
        begin = first * share
        if run.start < begin or run.stop > min(self._numel, begin + self._count * share):
            return None
        return self._fill(run, offset)

    def _fill(self, run: Run, offset: int) -> Iterator[tuple[StorageRef, Layout, Layout]]:
        share, storages = self._share, self._flats.storages
        place = self._flats.offset + self._start
        # All whole shares lie at one place of their storages.
        shape, stride = (share,), (1,)
        whole = Layout(shape, stride, place)
        position = run.start
        at = position // share - self._flats.first
        while position < run.stop:
            skipped = position % share
            length = min(share - skipped, run.stop - position)
            target_offset = offset + position - run.start
            if length == share:
                yield storages[at], whole, Layout(shape, stride, target_offset)
            else:
                part = (length,)
                yield storages[at], Layout(part, stride, place + skipped), Layout(part, stride, target_offset)
            position += length
            at += 1
