"""Cuts strided tensors into boxes that can be read one after another. Free of torch.

`row_major_boxes` are those that a run of a flattened tensor fills, `bounded_boxes` those that fit a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor: for each dimension, the first index and how many there are."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a tensor's elements lie in its storage; all in elements, not bytes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def span(self) -> int:
        """How many elements of the storage lie from the tensor's first to its last one, both included."""
        if self.stride == (1,):
            return self.shape[0]
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether it is row-major without gaps; dimensions of size 1 may have any step."""
        if self.stride == (1,):
            return True  # as nearly all are
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True

    def part(self, box: Box) -> Layout:
        """The layout of the elements in `box`."""
        moved = sum(start * step for start, step in zip(box.starts, self.stride, strict=True))
        return Layout(box.sizes, self.stride, self.offset + moved)


def row_major_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes of elements ``[start, stop)`` of the flattened tensor of `shape`, in the order of the elements."""
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = start // row, stop // row
    if start % row:
        row_stop = min(stop, (first + 1) * row)
        for box in row_major_boxes(shape[1:], start - first * row, row_stop - first * row):
            yield Box((first, *box.starts), (1, *box.sizes))
        first += 1
        start = row_stop
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
        start = last * row
    if start < stop:
        for box in row_major_boxes(shape[1:], start - last * row, stop - last * row):
            yield Box((last, *box.starts), (1, *box.sizes))


def bounded_boxes(layout: Layout, limit: int) -> Iterator[Box]:
    """Boxes that hold each element of `layout` once, each with a span of at most `limit`; mostly in storage order."""
    if layout.span <= limit:
        if layout.span:
            yield Box(tuple(0 for _ in layout.shape), layout.shape)
        return
    longest = max(range(len(layout.shape)), key=lambda d: layout.stride[d] if layout.shape[d] > 1 else -1)
    step = layout.stride[longest]
    inner_span = layout.span - (layout.shape[longest] - 1) * step
    rows = 1 + max(0, limit - inner_span) // step
    for first in range(0, layout.shape[longest], rows):
        count = min(rows, layout.shape[longest] - first)
        outer = Box(
            tuple(first if d == longest else 0 for d in range(len(layout.shape))),
            tuple(count if d == longest else size for d, size in enumerate(layout.shape)),
        )
        for inner in bounded_boxes(layout.part(outer), limit):
            yield Box(tuple(a + b for a, b in zip(outer.starts, inner.starts, strict=True)), inner.sizes)
