"""Which elements a rank of a mesh keeps, against brute force and torch's own arithmetic."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.saved.shards import REPLICATE, SHARD, STRIDED, Placement, Spread, SpreadError, kept_boxes

Shape = tuple[int, ...]


def chunks(items: list[int], count: int) -> list[list[int]]:
    """As ``torch.chunk``, with empty ones for those that it leaves out."""
    share = -(-len(items) // count) if items else 0
    return [items[at * share : (at + 1) * share] for at in range(count)]


def cut(items: list[int], placement: Placement, ranks: int, at: int) -> list[int]:
    parts = chunks(items, placement.split_factor if placement.kind == STRIDED else 1)
    return [item for part in parts for item in chunks(part, ranks)[at]]


def kept(shape: Shape, spread: Spread) -> list[list[int]]:
    """The indices of each dimension that a rank keeps, by the placements in their order."""
    indices = [list(range(size)) for size in shape]
    for placement, ranks, at in zip(spread.placements, spread.mesh, spread.coordinate or (), strict=True):
        if placement.cuts:
            indices[placement.dim] = cut(indices[placement.dim], placement, ranks, at)
    return indices


def sizes_of(indices: list[list[int]]) -> Shape:
    return tuple(map(len, indices))


def held(shape: Shape, spread: Spread, sizes: Shape) -> dict[Shape, Shape]:
    """Where in the whole each element of a rank's tensor lies, by its place in that."""
    found: dict[Shape, Shape] = {}
    for box, start in kept_boxes(shape, spread, sizes):
        for offset in itertools.product(*map(range, box.sizes)):
            place = tuple(a + b for a, b in zip(start, offset, strict=True))
            assert place not in found
            found[place] = tuple(a + b for a, b in zip(box.starts, offset, strict=True))
    return found


def every_spread(mesh: Shape, placements: tuple[Placement, ...]) -> list[Spread]:
    return [Spread(mesh, at, placements, 0) for at in itertools.product(*map(range, mesh))]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Shape, Shape, tuple[Placement, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dims = st.integers(0, len(shape) - 1)
    one = st.one_of(
        st.just(Placement(REPLICATE)),
        st.builds(Placement, st.just(SHARD), dims),
        st.builds(Placement, st.just(STRIDED), dims, st.integers(1, 5)),
    )
    return shape, mesh, tuple(draw(one) for _ in mesh)


@given(layouts())
def test_ranks_keep_what_brute_force_says_where_sizes_are_those_of_the_placements(
    layout: tuple[Shape, Shape, tuple[Placement, ...]],
) -> None:
    shape, mesh, placements = layout
    plain = all(one.kind != STRIDED for one in placements)
    times: Counter[Shape] = Counter()
    for spread in every_spread(mesh, placements):
        indices = kept(shape, spread)
        found = held(shape, spread, sizes_of(indices))
        assert len(found) == math.prod(sizes_of(indices))
        times.update(found.values())
        if plain:
            for place, whole in found.items():
                assert whole == tuple(each[at] for each, at in zip(indices, place, strict=True))
    if plain:
        copies = math.prod(n for one, n in zip(placements, mesh, strict=True) if not one.cuts)
        assert times == Counter(dict.fromkeys(itertools.product(*map(range, shape)), copies))


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 4))
def test_fully_shard_over_tensor_parallelism_cuts_last(size: int, data: int, tensor: int) -> None:
    placements = (Placement(STRIDED, 0, tensor), Placement(SHARD, 0))
    for spread in every_spread((data, tensor), placements):
        row, column = spread.coordinate or ()
        mine = chunks(chunks(list(range(size)), tensor)[column], data)[row]
        assert [whole for (whole,) in held((size,), spread, (len(mine),)).values()] == mine


@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
def test_a_strided_shard_alone_is_of_each_share(size: int, ranks: int, other: int, factor: int) -> None:
    placements = (Placement(SHARD, 0), Placement(STRIDED, -1, factor))
    if factor == 1:
        return  # then it is read as one that cuts last, which is the same here
    for spread in every_spread((other, ranks), placements):
        row, column = spread.coordinate or ()
        mine = cut(chunks(list(range(size)), other)[row], placements[1], ranks, column)
        found = held((size,), spread, (len(mine),))
        assert [found[place,][0] for place in range(len(mine))] == mine


@given(layouts())
def test_sizes_and_starts_are_torchs(layout: tuple[Shape, Shape, tuple[Placement, ...]]) -> None:
    utils = pytest.importorskip("torch.distributed.tensor._utils")
    types = pytest.importorskip("torch.distributed.tensor.placement_types")
    compute = getattr(utils, "_compute_local_shape_and_global_offset", None)
    if compute is None:
        pytest.skip("this torch computes them elsewhere")
    shape, mesh, placements = layout
    theirs = [
        types.Replicate()
        if one.kind == REPLICATE
        else types.Shard(one.dim)
        if one.kind == SHARD
        else types._StridedShard(one.dim, split_factor=one.split_factor)
        for one in placements
    ]
    for spread in every_spread(mesh, placements):
        sizes, offsets = compute(shape, mesh, list(spread.coordinate or ()), theirs)
        assert tuple(sizes) == sizes_of(kept(shape, spread))
        boxes = kept_boxes(shape, spread, tuple(sizes))
        if boxes and all(one.kind != STRIDED for one in placements):
            assert boxes[0][0].starts == tuple(offsets)


@pytest.mark.parametrize(
    ("spread", "sizes", "part"),
    [
        (Spread((2,), (0,), (), 0), (2, 3), "0 placements for a mesh of 1 dimensions"),
        (Spread((2,), (2,), (Placement(SHARD),), 0), (2, 3), r"coordinate \(2,\), outside of its mesh of \(2,\)"),
        (Spread((2,), (0, 0), (Placement(SHARD),), 0), (2, 3), "outside of its mesh"),
        (Spread((2,), None, (Placement(SHARD),), 0), (2, 3), "coordinate None"),
        (Spread((2,), (0,), (Placement(SHARD, 2),), 0), (2, 3), r"placed as Shard\(2\), and has 2 dimensions"),
        (Spread((2,), (0,), (Placement(SHARD, -3),), 0), (2, 3), "has 2 dimensions"),
        (Spread((2,), (0,), (Placement(STRIDED, 0, 0),), 0), (2, 3), "split_factor is not 1 to"),
        (Spread((2,), (0,), (Placement(STRIDED, 0, 1 << 40),), 0), (2, 3), "split_factor is not 1 to"),
        (Spread((2,), (0,), (Placement(SHARD),), 0), (3, 3), r"shape \(3, 3\), expected \(2, 3\) of \(4, 3\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(spread: Spread, sizes: Shape, part: str) -> None:
    with pytest.raises(SpreadError, match=part):
        kept_boxes((4, 3), spread, sizes)


def test_a_file_cannot_ask_for_parts_without_end() -> None:
    placements = (Placement(STRIDED, 0, 1024), Placement(STRIDED, 0, 1023))
    with pytest.raises(SpreadError, match="more than 1024 parts"):
        kept_boxes((1 << 60,), Spread((7, 2), (3, 1), placements, 0), (9,))
