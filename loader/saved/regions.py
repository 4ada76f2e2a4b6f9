"""Computes which elements two parts of one tensor have in common, and where they lie in the memory of each. Pure.

A `Region` is a part of a tensor: a `Box` (a whole tensor, a shard, a chunk of it), or a `Run` of elements in row-major
order (a part of a flattened parameter, as ZeRO partitions it). `Laid` adds where its elements lie in some memory.
`intersect` takes any two laid regions and gives the elements that both have as pairs of strided layouts. Everything
counts elements, not bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .strided import Box, Layout, row_major_boxes


class CoverageError(ValueError):
    """Regions overlap, or a wanted element lies in none of them."""


class Run(NamedTuple):
    """``length`` elements of a flattened tensor, from ``start`` on."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def numel(self) -> int:
        return self.length


Region = Box | Run


@dataclass(frozen=True, slots=True, eq=False)
class Laid:
    """A region, and where its elements lie in some memory; in elements, not bytes.

    ``stride`` has one step for each dimension of a box, and one alone for a run.
    """

    region: Region
    offset: int
    """Of the region's first element."""
    stride: tuple[int, ...]


@lru_cache(maxsize=256)
def whole_box(shape: tuple[int, ...]) -> Box:
    """The box of all elements of a tensor."""
    # A checkpoint has many tensors of few shapes; tensors of a shape share its box.
    return Box((0,) * len(shape), tuple(shape))


@lru_cache(maxsize=256)
def row_major_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor of `shape` whose elements follow each other in row-major order."""
    steps = []
    step = 1
    for size in reversed(shape):
        steps.append(step)
        step *= size
    return tuple(reversed(steps))


def extent(shape: tuple[int, ...], region: Region) -> tuple[int, int]:
    """The row-major positions of a region's first element, and after its last; equal where it is empty."""
    if isinstance(region, Run):
        return region.start, region.stop
    first = last = 0
    for start, size, step in zip(region.starts, region.sizes, row_major_stride(shape), strict=True):
        if not size:
            return 0, 0
        first += start * step
        last += (start + size - 1) * step
    return first, last + 1


def intersect(shape: tuple[int, ...], one: Laid, other: Laid) -> Iterator[tuple[Layout, Layout]]:
    """The elements that `one` and `other`, parts of a tensor of `shape`, have in common: where they lie in each.

    The two layouts of a pair have the same shape, and their elements correspond; every common element is in exactly one
    pair. Dimensions are merged, reordered and left out where that makes both simpler: elements that follow each other
    in both memories come as one dimension of step 1.
    """
    if isinstance(one.region, Box) and isinstance(other.region, Box):
        found = _common(one.region, one.offset, one.stride, other.region, other.offset, other.stride)
        if found is not None:
            yield found
        return
    one, other = as_run(shape, one), as_run(shape, other)
    if isinstance(one.region, Run) and isinstance(other.region, Run):
        start = max(one.region.start, other.region.start)
        length = min(one.region.stop, other.region.stop) - start
        if length > 0:
            mine, theirs = one.stride[0], other.stride[0]
            yield _simplest(
                [(mine, theirs, length)] if length > 1 else [],
                one.offset + (start - one.region.start) * mine,
                other.offset + (start - other.region.start) * theirs,
            )
        return
    for box, offset, stride in _boxes(shape, one):
        for other_box, other_offset, other_stride in _boxes(shape, other):
            found = _common(box, offset, stride, other_box, other_offset, other_stride)
            if found is not None:
                yield found


def _common(
    box: Box,
    offset: int,
    stride: tuple[int, ...],
    other_box: Box,
    other_offset: int,
    other_stride: tuple[int, ...],
) -> tuple[Layout, Layout] | None:
    """Where the elements that are in both boxes lie in the memory of each; None where there are none."""
    # One loop without calls: it runs for every piece of a tensor and every part that is wanted of it.
    dims = []
    for first, size, step, other_first, other_size, other_step in zip(
        box.starts, box.sizes, stride, other_box.starts, other_box.sizes, other_stride, strict=True
    ):
        stop, other_stop = first + size, other_first + other_size
        start = first if first > other_first else other_first
        count = (stop if stop < other_stop else other_stop) - start
        if count <= 0:
            return None
        offset += (start - first) * step
        other_offset += (start - other_first) * other_step
        if count > 1:
            dims.append((step, other_step, count))
    return _simplest(dims, offset, other_offset)


def _boxes(shape: tuple[int, ...], laid: Laid) -> Iterator[tuple[Box, int, tuple[int, ...]]]:
    """`laid` as boxes of the tensor, at most twice as many as it has dimensions, each with its offset and strides."""
    region = laid.region
    if isinstance(region, Box):
        yield region, laid.offset, laid.stride
        return
    steps = row_major_stride(shape)
    stride = tuple(step * laid.stride[0] for step in steps)
    for box in row_major_boxes(shape, region.start, region.stop):
        first = sum(start * step for start, step in zip(box.starts, steps, strict=True))
        yield box, laid.offset + (first - region.start) * laid.stride[0], stride


def as_run(shape: tuple[int, ...], laid: Laid) -> Laid:
    """`laid` as a run, where its box is one and its elements lie at equal steps in that order; else as it is."""
    box = laid.region
    if isinstance(box, Run):
        return laid
    step = None
    numel = 1
    inside = True
    for size, whole, stride in zip(reversed(box.sizes), reversed(shape), reversed(laid.stride), strict=True):
        if size > 1:
            if step is None:
                step = stride
            if not inside or stride != step * numel:
                return laid
        # Beyond a dimension of which the box has a part, it must have one index of each.
        inside = inside and size == whole
        numel *= size
    first, _ = extent(shape, box)
    return Laid(Run(first, numel), laid.offset, (1 if step is None else step,))


def _simplest(dims: list[tuple[int, int, int]], offset: int, other_offset: int) -> tuple[Layout, Layout]:
    """Two layouts of the same elements with as few dimensions as can be, the largest steps of the first one first.

    `dims` has both steps and the size of each dimension of more than one element.
    """
    if len(dims) > 1:
        dims.sort(reverse=True)
        merged = dims[:1]
        for step, other_step, size in dims[1:]:
            outer_step, outer_other, outer_size = merged[-1]
            if outer_step == step * size and outer_other == other_step * size:
                merged[-1] = (step, other_step, outer_size * size)
            else:
                merged.append((step, other_step, size))
        dims = merged
    if len(dims) == 1:
        # By far the most frequent case.
        step, other_step, size = dims[0]
        return Layout((size,), (step,), offset), Layout((size,), (other_step,), other_offset)
    if not dims:
        return Layout((1,), (1,), offset), Layout((1,), (1,), other_offset)
    shape = tuple(size for _, _, size in dims)
    return (
        Layout(shape, tuple(step for step, _, _ in dims), offset),
        Layout(shape, tuple(step for _, step, _ in dims), other_offset),
    )


def hull(shape: tuple[int, ...], region: Region) -> Box:
    """The smallest box that has all elements of `region`."""
    if isinstance(region, Box):
        return region
    if not region.numel:
        return Box((0,) * len(shape), (0,) * len(shape))
    first, last = region.start, region.stop - 1
    starts: list[int] = []
    sizes: list[int] = []
    for dim, step in enumerate(row_major_stride(shape)):
        starts.append(first // step)
        sizes.append(last // step - first // step + 1)
        if sizes[-1] > 1:
            # It goes on into another row, so that it may have any part of the dimensions inside.
            starts.extend(0 for _ in shape[dim + 1 :])
            sizes.extend(shape[dim + 1 :])
            break
        first, last = first % step, last % step
    return Box(tuple(starts), tuple(sizes))


def check_cover(shape: tuple[int, ...], regions: Iterable[Region]) -> None:
    """Raises `CoverageError` unless each element of a tensor of `shape` is in exactly one of `regions`.

    Runs alone are compared in order. Boxes by their corners: the sum of their indicator functions is the whole's if and
    only if the corners, each with the sign of its position, add up to the whole's (both sides are determined by their
    mixed differences). That takes time in proportion to the number of regions.
    """
    regions = [region for region in regions if region.numel]
    numel = math.prod(shape)
    runs = [(region.start, region.stop) for region in regions if isinstance(region, Run)]
    boxes = [region for region in regions if isinstance(region, Box)]
    if any(start < 0 or stop < start for start, stop in runs) or any(
        min((*box.starts, *box.sizes, 0)) < 0 for box in boxes
    ):
        raise CoverageError("one of the pieces begins before 0, or ends before it begins")
    if not boxes:
        _check_runs(runs, numel)
        return
    total = sum(region.numel for region in regions)
    if total != numel:
        raise CoverageError(f"the pieces hold {total} of {numel} elements")
    corners: dict[tuple[int, ...], int] = {}
    for start, stop in runs:
        if stop > numel:
            raise CoverageError(f"the pieces reach to element {stop} of {numel}")
        boxes.extend(row_major_boxes(shape, start, stop))
    for box in boxes:
        _add_corners(corners, box, 1)
    _add_corners(corners, whole_box(shape), -1)
    if any(corners.values()):
        raise CoverageError("some elements are in two of the pieces, and others in none")


def _check_runs(runs: list[tuple[int, int]], numel: int) -> None:
    position = 0
    for start, stop in sorted(runs):
        if start < position:
            raise CoverageError(f"element {start} is in two of the pieces")
        if start > position:
            raise CoverageError(f"element {position} is in none of the pieces")
        position = stop
    if position < numel:
        raise CoverageError(f"the pieces hold {position} of {numel} elements")
    if position > numel:
        raise CoverageError(f"the pieces reach to element {position} of {numel}")


def _add_corners(corners: dict[tuple[int, ...], int], box: Box, sign: int) -> None:
    signed: list[tuple[tuple[int, ...], int]] = [((), sign)]
    for start, size in zip(box.starts, box.sizes, strict=True):
        signed = [
            each
            for corner, value in signed
            for each in (((*corner, start), value), ((*corner, start + size), -value))
        ]
    for corner, value in signed:
        corners[corner] = corners.get(corner, 0) + value
