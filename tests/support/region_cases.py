"""Regions of tensors laid in memory in any way, and what brute force says of them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st
from rankload.loader.saved.regions import Laid, Region, Run, row_major_stride, whole_box
from rankload.loader.saved.strided import Box, row_major_boxes
from rankload.loader.saved.tensor import StorageRef

Shape = tuple[int, ...]
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def elements(shape: Shape, region: Region) -> np.ndarray:
    """The row-major positions of a region's elements, in the region's own shape."""
    numbers = np.arange(math.prod(shape))
    if isinstance(region, Run):
        return numbers[region.start : region.stop]
    parts = tuple(slice(a, a + n) for a, n in zip(region.starts, region.sizes, strict=True))
    return np.asarray(numbers.reshape(shape)[parts])


def positions(shape: Shape, region: Region) -> set[int]:
    """The same as a set."""
    return set(elements(shape, region).reshape(-1).tolist())


def offsets(shape: Shape, stride: Shape, offset: int) -> np.ndarray:
    """Where the elements of a layout lie."""
    found = np.full(shape, offset)
    for dim, (size, step) in enumerate(zip(shape, stride, strict=True)):
        found += (np.arange(size) * step).reshape([-1 if d == dim else 1 for d in range(len(shape))])
    return found


def places(shape: Shape, laid: Laid) -> list[tuple[int, int]]:
    """(row-major position, offset in the memory) of each element of a laid region."""
    region = laid.region
    sizes = region.sizes if isinstance(region, Box) else (region.length,)
    positions = elements(shape, region).reshape(-1).tolist()
    return list(zip(positions, offsets(sizes, laid.stride, laid.offset).reshape(-1).tolist(), strict=True))


@st.composite
def boxes(draw: st.DrawFn, shape: Shape) -> Box:
    starts = [draw(st.integers(0, size)) for size in shape]
    sizes = [draw(st.integers(0, size - start)) for size, start in zip(shape, starts, strict=True)]
    return Box(tuple(starts), tuple(sizes))


@st.composite
def runs(draw: st.DrawFn, shape: Shape) -> Run:
    start = draw(st.integers(0, math.prod(shape)))
    return Run(start, draw(st.integers(0, math.prod(shape) - start)))


@st.composite
def laid(draw: st.DrawFn, region: Region) -> Laid:
    """`region` in any order of its dimensions, with gaps and often without; sometimes expanded."""
    sizes = region.sizes if isinstance(region, Box) else (region.length,)
    stride = [0] * len(sizes)
    step = 1
    for dim in draw(st.permutations(range(len(sizes))) | st.just(range(len(sizes))[::-1])):
        step += draw(st.sampled_from([0, 0, 0, 1, 5]))
        stride[dim] = step
        step *= max(1, sizes[dim])
    if draw(st.sampled_from([False, False, False, True])) and stride:
        stride[draw(st.integers(0, len(stride) - 1))] = 0
    return Laid(region, draw(st.integers(0, 9)), tuple(stride))


@st.composite
def regions(draw: st.DrawFn, shape: Shape) -> Region:
    return draw(boxes(shape) | runs(shape) | st.just(whole_box(shape)))


@st.composite
def partitions(draw: st.DrawFn, shape: Shape) -> list[Region]:
    """Regions that hold each element of a tensor once, in any order: boxes, runs, or both."""
    numel = math.prod(shape)
    cuts = sorted({0, numel, *draw(st.lists(st.integers(0, numel), max_size=6))})
    found: list[Region] = []
    for start, stop in pairwise(cuts):
        if draw(st.booleans()):
            found.append(Run(start, stop - start))
        else:
            found.extend(row_major_boxes(shape, start, stop))
    if not found or draw(st.booleans()):
        found = [whole_box(shape)]
    for _ in range(draw(st.integers(0, 12))):
        at = draw(st.integers(0, len(found) - 1))
        box = found[at]
        if isinstance(box, Box) and max(box.sizes, default=0) > 1:
            dim = draw(st.sampled_from([d for d, size in enumerate(box.sizes) if size > 1]))
            count = draw(st.integers(1, box.sizes[dim] - 1))
            found[at : at + 1] = [
                Box(
                    tuple(start + (first if d == dim else 0) for d, start in enumerate(box.starts)),
                    tuple(size if d == dim else whole for d, whole in enumerate(box.sizes)),
                )
                for first, size in ((0, count), (count, box.sizes[dim] - count))
            ]
    return draw(st.permutations(found))


def storage(key: object, numel: int = 1 << 40) -> StorageRef:
    return StorageRef("f", str(key), 0, numel * 4, None)


def whole(region: Region) -> Laid:
    """`region` by itself in some memory."""
    sizes = region.sizes if isinstance(region, Box) else (region.length,)
    return Laid(region, 0, row_major_stride(sizes))
