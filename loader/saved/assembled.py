"""Describes a tensor that was saved in runs over several flat tensors, and finds what fills a box of it. Pure.

The tensor is never put together as a whole: a rank asks `parts_of` which saved elements fill the shard that it keeps,
and reads those into their places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .strided import Box, Layout, row_major_boxes
from .values import LazyTensor


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """``length`` elements of a flattened tensor from ``start`` on, saved in ``source`` from ``source_start`` on."""

    source: LazyTensor
    """One-dimensional; a flat tensor of one saved rank."""
    source_start: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class AssembledTensor:
    """A tensor that was saved in runs. They are in the order of its elements, and hold each element once.

    Raises `ValueError` where they do not.
    """

    name: str
    """The parameter's name in the checkpoint; for messages."""
    dtype: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        position = 0
        for run in self.runs:
            reach = run.source_start + run.length
            if (
                run.start != position
                or run.length < 0
                or not 0 <= run.source_start <= reach <= run.source.numel
            ):
                raise ValueError(
                    f"{self.name}: the run from element {run.start} on does not follow or lie inside"
                )
            position += run.length
        if position != self.numel:
            raise ValueError(f"{self.name}: its runs hold {position} of {self.numel} elements")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements as they were saved."""
        return sum(run.length * run.source.itemsize for run in self.runs)


SavedTensor = LazyTensor | AssembledTensor
"""A tensor of a checkpoint: saved whole, or in runs."""


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box of all elements of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def parts_of(source: SavedTensor, box: Box) -> Iterator[tuple[LazyTensor, Box]]:
    """The lazy tensors that fill `box` of `source`, each with the part of the box that it fills.

    A lazy tensor has the shape of its part, whose ``starts`` count from the box's corner. Every element of the box is
    in exactly one part. Of a box of whole rows the lazy tensors are contiguous, of any other box strided.
    """
    if not box.numel:
        return
    if isinstance(source, LazyTensor):
        yield (
            _part(source, Layout(source.shape, source.stride, source.storage_offset).part(box)),
            whole_box(box.sizes),
        )
        return
    strides = _row_major(source.shape)
    for run in source.runs:
        step = run.source.stride[0] if run.source.stride else 1
        for filled in row_major_boxes(source.shape, run.start, run.start + run.length):
            common = _overlap(filled, box)
            if common is None:
                continue
            first = sum(start * stride for start, stride in zip(common.starts, strides, strict=True))
            offset = run.source.storage_offset + (run.source_start + first - run.start) * step
            layout = Layout(common.sizes, tuple(stride * step for stride in strides), offset)
            corner = tuple(a - b for a, b in zip(common.starts, box.starts, strict=True))
            yield _part(run.source, layout), Box(corner, common.sizes)


def _part(source: LazyTensor, layout: Layout) -> LazyTensor:
    return LazyTensor(source.storage, source.dtype, layout.shape, layout.stride, layout.offset)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _overlap(one: Box, other: Box) -> Box | None:
    starts = tuple(max(a, b) for a, b in zip(one.starts, other.starts, strict=True))
    stops = (
        min(a + m, b + n) for a, m, b, n in zip(one.starts, one.sizes, other.starts, other.sizes, strict=True)
    )
    sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return Box(starts, sizes) if all(size > 0 for size in sizes) else None
