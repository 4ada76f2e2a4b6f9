"""Says how a tensor is cut into boxes, once for all tensors that are cut alike. Pure.

A DCP folder lists the chunks of each of its tensors: hundreds of thousands, but those of one layer's parameters lie as
those of the next one's do. What is worked out of the boxes alone is worked out once here: whether they cover the
tensor, their order, and which of them have elements of a part of it.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .regions import CoverageError, Laid, Region, check_cover, extent, intersect, row_major_stride
from .strided import Box


@dataclass(frozen=True)
class Division:
    """The boxes of a tensor of one shape. Each lies inside it; whether they cover it, `problem` says."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    """In the order in which the checkpoint lists them; the same one may be there several times."""

    @cached_property
    def starts(self) -> list[tuple[int, ...] | None]:
        """Where each box begins."""
        return [box.starts for box in self.boxes]

    @cached_property
    def problem(self) -> str:
        """Why the boxes, each counted once, are not all of the tensor; empty where they are."""
        try:
            check_cover(self.shape, dict.fromkeys(self.boxes))
        except CoverageError as error:
            return str(error)
        return ""

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The numbers of the boxes that have elements, each box once, in the order of their first elements."""
        first: dict[Box, int] = {}
        for number, box in enumerate(self.boxes):
            if box.numel:
                first.setdefault(box, number)
        return tuple(sorted(first.values(), key=lambda number: extent(self.shape, self.boxes[number])))

    @cached_property
    def place(self) -> tuple[int, ...]:
        """For each box its place in `order`; -1 where it has no elements."""
        at = {self.boxes[number]: place for place, number in enumerate(self.order)}
        return tuple(at.get(box, -1) for box in self.boxes)

    @cached_property
    def _extents(self) -> tuple[list[int], list[int]]:
        """Of the boxes in `order`: where each begins, and how far those up to it reach."""
        extents = [extent(self.shape, self.boxes[number]) for number in self.order]
        return [first for first, _ in extents], list(itertools.accumulate((stop for _, stop in extents), max))

    def meeting(self, regions: Sequence[Region]) -> list[tuple[int, bool]]:
        """The numbers of the boxes with elements of `regions`, each with whether one region has all of it."""
        most: dict[int, int] = {}
        firsts, reaches = self._extents
        for region in regions:
            first, stop = extent(self.shape, region)
            low, high = bisect_right(reaches, first), bisect_left(firsts, stop)
            for number in self.order[low:high]:
                common = _common(self.shape, self.boxes[number], region)
                if common > most.get(number, 0):
                    most[number] = common
        return [(number, most[number] == self.boxes[number].numel) for number in sorted(most)]


def _common(shape: tuple[int, ...], box: Box, region: Region) -> int:
    """How many elements the two have in common."""
    if isinstance(region, Box):
        common = 1
        for start, size, other, other_size in zip(
            box.starts, box.sizes, region.starts, region.sizes, strict=True
        ):
            common *= max(0, min(start + size, other + other_size) - max(start, other))
        return common
    if not box.numel or not region.numel:
        return 0
    here, there = Laid(box, 0, row_major_stride(box.sizes)), Laid(region, 0, (1,))
    return sum(math.prod(layout.shape) for layout, _ in intersect(shape, here, there))
