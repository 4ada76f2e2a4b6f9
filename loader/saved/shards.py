"""Computes which part of a tensor each rank of a device mesh keeps, by the tensor's placements. Pure.

A `Spread` says how a tensor lies on a mesh, and which place of the mesh one rank has: what a DTensor says. `kept_boxes`
gives the boxes that this rank keeps. As in torch, the dimensions of the mesh apply in order, and each ``Shard`` cuts
what is left as ``torch.chunk`` does: shares of ceil(size / ranks) elements, the last ones smaller or empty.

Where ``fully_shard`` shards a dimension that tensor parallelism shards too, its mesh dimension comes first, but cuts
last. Torch writes that as a ``_StridedShard`` over the ``split_factor`` shares that the other makes. Where shares are
uneven, what torch then keeps and what it computes for such placements may differ: `kept_boxes` takes the reading that
gives the size of what the rank holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .strided import Box

SHARD = "Shard"
STRIDED = "_StridedShard"
REPLICATE = "Replicate"

_MOST_PARTS = 1024
"""Of one dimension that a rank keeps: a tensor-parallel group has far fewer ranks, and a file could ask for any."""

Shape = tuple[int, ...]


class SpreadError(ValueError):
    """Placements that do not fit the tensor, the mesh, or what a rank holds."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What one dimension of a mesh does with a tensor."""

    kind: str
    """`SHARD`, `STRIDED`, `REPLICATE`, or the name of a class that is not known."""
    dim: int = 0
    """The dimension of the tensor that is cut."""
    split_factor: int = 1
    """Of a strided one: into how many shares the dimension is cut before each of them is."""

    def __str__(self) -> str:
        factor = f", split_factor={self.split_factor}" if self.kind == STRIDED else ""
        return self.kind if self.kind == REPLICATE else f"{self.kind}({self.dim}{factor})"

    @property
    def cuts(self) -> bool:
        """Whether ranks along this dimension of the mesh keep different elements."""
        return self.kind in (SHARD, STRIDED)


@dataclass(frozen=True, slots=True)
class Spread:
    """How a tensor lies on a device mesh, as one of its ranks has saved it."""

    mesh: Shape
    """Ranks along each dimension of the mesh."""
    coordinate: Shape | None
    """The rank's place; None where it is not in the mesh, and holds nothing of the tensor."""
    placements: tuple[Placement, ...]
    """One for each dimension of the mesh."""
    origin: int | None
    """The rank with the coordinate 0, which tells meshes of one shape apart; None where the file does not say."""

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.placements))}) on a mesh of {self.mesh}"

    @property
    def share(self) -> Shape:
        """The coordinate without the dimensions along which all ranks keep the same."""
        places = zip(self.placements, self.coordinate or (), strict=False)
        return tuple(at for placement, at in places if placement.cuts)


def kept_boxes(shape: Shape, spread: Spread, sizes: Shape) -> list[tuple[Box, Shape]]:
    """The boxes of a tensor of `shape` that a rank keeps, which holds a tensor of `sizes`, each with its start in that.

    Raises `SpreadError` where the placements do not fit the tensor or the mesh, or give a part of another size.
    """
    placements = _checked(shape, spread)
    expected: list[Shape] = []
    for steps in _readings(placements, spread):
        runs = [[(0, size)] if size else [] for size in shape]
        for placement, ranks, at in steps:
            runs[placement.dim] = _cut(runs[placement.dim], ranks, at, placement.split_factor)
        kept = tuple(_length(each) for each in runs)
        if kept == sizes or math.prod(kept) == math.prod(sizes) == 0:
            return list(_boxes(runs))
        expected.append(kept)
    given = " or ".join(map(str, dict.fromkeys(expected)))
    raise SpreadError(
        f"holds a shard of shape {sizes}, expected {given} of {shape} by its placements {spread}"
    )


def chunk(size: int, ranks: int, at: int) -> tuple[int, int]:
    """The first element that the rank `at` of `ranks` keeps of a dimension of `size`, and how many, as ``torch.chunk``
    cuts it."""
    share = -(-size // ranks)
    start = min(size, at * share)
    return start, min(share, size - start)


_Step = tuple[Placement, int, int]
"""A placement that cuts, the ranks that it cuts for, and which of them this one is."""


def _checked(shape: Shape, spread: Spread) -> tuple[Placement, ...]:
    """The placements, whose dimensions count from the front. Raises `SpreadError` where something does not fit."""
    at = spread.coordinate
    if len(spread.placements) != len(spread.mesh):
        raise SpreadError(
            f"has {len(spread.placements)} placements for a mesh of {len(spread.mesh)} dimensions"
        )
    if at is None or len(at) != len(spread.mesh) or any(a >= n for a, n in zip(at, spread.mesh, strict=True)):
        raise SpreadError(f"is of coordinate {at}, outside of its mesh of {spread.mesh}")
    placements = []
    for placement in spread.placements:
        if not placement.cuts:
            placements.append(placement)
            continue
        if not -len(shape) <= placement.dim < len(shape):
            raise SpreadError(f"is placed as {placement}, and has {len(shape)} dimensions")
        if not 1 <= placement.split_factor <= _MOST_PARTS:
            raise SpreadError(f"is placed as {placement}, whose split_factor is not 1 to {_MOST_PARTS}")
        placements.append(replace(placement, dim=placement.dim % len(shape)))
    return tuple(placements)


def _readings(placements: tuple[Placement, ...], spread: Spread) -> Iterator[list[_Step]]:
    """The cuts in their order, by each reading of strided placements."""
    steps = [
        step for step in zip(placements, spread.mesh, spread.coordinate or (), strict=True) if step[0].cuts
    ]
    strided = [step for step in steps if step[0].kind == STRIDED]
    if strided and all(
        placement.split_factor == math.prod(n for later, n, _ in steps[i + 1 :] if later.dim == placement.dim)
        for i, (placement, _, _) in enumerate(steps)
        if placement.kind == STRIDED
    ):
        plain = [step for step in steps if step[0].kind == SHARD]
        yield [(replace(one, split_factor=1), n, at) for one, n, at in (*plain, *reversed(strided))]
    yield steps


_Runs = list[tuple[int, int]]
"""What is kept of one dimension: first element and how many, in the order in which the rank holds them."""


def _length(runs: _Runs) -> int:
    return sum(length for _, length in runs)


def _cut(runs: _Runs, ranks: int, at: int, split_factor: int) -> _Runs:
    """What the rank `at` of `ranks` keeps of `runs`: a share of each of the `split_factor` shares of them."""
    total = _length(runs)
    each = max(1, -(-total // split_factor))
    found: _Runs = []
    for first in range(0, total, each):
        size = min(each, total - first)
        start, length = chunk(size, ranks, at)
        found += _part(runs, first + start, first + start + length)
        if len(found) > _MOST_PARTS:
            raise SpreadError(f"is in more than {_MOST_PARTS} parts")
    return found


def _part(runs: _Runs, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The elements number `start` to `stop` of `runs`."""
    position = 0
    for first, length in runs:
        begin, end = max(start, position), min(stop, position + length)
        if begin < end:
            yield first + begin - position, end - begin
        position += length


def _boxes(runs: list[_Runs]) -> Iterator[tuple[Box, Shape]]:
    held = []
    for each in runs:
        starts = itertools.accumulate((length for _, length in each), initial=0)
        held.append([(first, length, start) for (first, length), start in zip(each, starts, strict=False)])
    for cell in itertools.product(*held):
        yield (
            Box(tuple(first for first, _, _ in cell), tuple(length for _, length, _ in cell)),
            tuple(start for _, _, start in cell),
        )
