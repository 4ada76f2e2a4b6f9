"""Regions of tensors against brute force: each common element once, from where it lies to where it is wanted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rankload.loader.saved.regions import (
    CoverageError,
    Laid,
    Region,
    Run,
    check_cover,
    extent,
    hull,
    intersect,
    row_major_stride,
    whole_box,
)
from rankload.loader.saved.strided import Box, Layout
from rankload.loader.saved.tensor import Piece, SavedTensor, StorageRef, fill
from region_cases import SHAPES, Shape, elements, laid, offsets, partitions, places, regions, storage, whole


def moved(pairs: Iterable[tuple[Layout, Layout]]) -> Counter[tuple[int, int]]:
    """How often the element at one offset goes to another, by (from, to)."""
    found: Counter[tuple[int, int]] = Counter()
    for source, target in pairs:
        assert source.shape == target.shape
        assert source.numel
        found.update(
            zip(
                offsets(source.shape, source.stride, source.offset).reshape(-1).tolist(),
                offsets(target.shape, target.stride, target.offset).reshape(-1).tolist(),
                strict=True,
            )
        )
    return found


@given(SHAPES, st.data())
@settings(max_examples=600)
def test_every_common_element_once_from_where_it_lies(shape: Shape, data: st.DataObject) -> None:
    one = data.draw(regions(shape).flatmap(laid), "one")
    other = data.draw(regions(shape).flatmap(laid), "other")
    there = dict(places(shape, other))
    wanted = Counter((offset, there[at]) for at, offset in places(shape, one) if at in there)
    pairs = list(intersect(shape, one, other))
    assert moved(pairs) == wanted
    assert Counter({(b, a): count for (a, b), count in wanted.items()}) == moved(intersect(shape, other, one))
    for source, target in pairs:
        # As few dimensions as can be: none of one element, but for the only one, and no two that could be one.
        assert 1 not in source.shape or source.shape == (1,)
        steps = list(zip(source.stride, target.stride, source.shape, strict=True))
        if 0 not in source.stride and source.numel > 1:
            assert not [
                (outer, inner)
                for outer in steps
                for inner in steps
                if outer[0] == inner[0] * inner[2] and outer[1] == inner[1] * inner[2]
            ]
    # Two boxes have one in common, and a run is at most so many.
    kinds = [isinstance(each.region, Run) for each in (one, other)]
    most = 1 if kinds != [True, False] and kinds != [False, True] else max(1, 2 * len(shape) - 1)
    assert len(pairs) <= most


@given(SHAPES.filter(lambda shape: 0 not in shape), st.data())
def test_what_lies_alike_in_both_is_one_run_of_bytes(shape: Shape, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    dense = [0] * len(shape)
    step = 1
    for dim in order:
        dense[dim] = step
        step *= shape[dim]
    whole = Laid(whole_box(shape), 7, tuple(dense))
    assert [
        (a.shape, a.stride, b.shape, b.stride, a.offset, b.offset)
        for a, b in intersect(shape, whole, Laid(whole_box(shape), 0, tuple(dense)))
    ] == [((step,), (1,), (step,), (1,), 7, 0)]


def test_plain_cases_are_as_simple_as_can_be() -> None:
    shape = (2, 3, 4, 5)
    rows = Laid(whole_box(shape), 0, row_major_stride(shape))
    last = Laid(whole_box(shape), 0, (60, 1, 15, 3))  # channels_last
    ((source, target),) = intersect(shape, rows, rows)
    assert (source.shape, source.stride, target.stride) == ((120,), (1,), (1,))
    ((source, target),) = intersect(shape, last, last)
    assert (source.shape, source.stride, target.stride) == ((120,), (1,), (1,))
    # From one order to the other: batch, channels, pixels.
    ((source, target),) = intersect(shape, rows, last)
    assert (source.shape, source.stride, target.stride) == ((2, 3, 20), (60, 20, 1), (60, 1, 3))
    assert source.is_contiguous
    # A run of a box of whole rows, and the box of a run: no box of rows is cut in two.
    half = Laid(Box((1, 0, 0, 0), (1, 3, 4, 5)), 0, (60, 20, 5, 1))
    for one, other in ((half, Laid(Run(0, 120), 3, (1,))), (rows, Laid(Run(60, 60), 63, (1,)))):
        ((source, target),) = intersect(shape, one, other)
        assert (source.shape, source.stride, target.stride) == ((60,), (1,), (1,))
        assert (source.offset, target.offset) in ((0, 63), (60, 63))
    # A shard of columns: one copy, contiguous where it goes.
    columns = Laid(Box((0, 2), (100, 3)), 0, (3, 1))
    ((source, target),) = intersect((100, 10), Laid(whole_box((100, 10)), 4, (10, 1)), columns)
    assert (source.shape, source.stride, source.offset) == ((100, 3), (10, 1), 6)
    assert target.is_contiguous


def test_an_expanded_tensor_keeps_its_steps() -> None:
    shape = (3, 4)
    ((source, target),) = intersect(shape, Laid(whole_box(shape), 5, (0, 0)), Laid(Run(2, 9), 0, (1,)))
    assert (source.shape, source.stride, source.offset) == ((9,), (0,), 5)
    assert (target.shape, target.stride, target.offset) == ((9,), (1,), 0)


@given(SHAPES, st.data())
def test_extents_and_hulls_are_the_smallest(shape: Shape, data: st.DataObject) -> None:
    region = data.draw(regions(shape))
    found = elements(shape, region).reshape(-1)
    first, stop = extent(shape, region)
    if not found.size:
        assert first == stop
        assert not (shape and hull(shape, region).numel)
        return
    if not shape:
        assert hull(shape, region) == Box((), ())
        return
    assert (first, stop) == (found.min(), found.max() + 1)
    index = np.array(np.unravel_index(found, shape)).reshape(len(shape), -1)
    assert hull(shape, region) == Box(
        tuple(index.min(axis=1).tolist()), tuple((np.ptp(index, axis=1) + 1).tolist())
    )


@given(SHAPES, st.data())
@settings(max_examples=300)
def test_partitions_cover(shape: Shape, data: st.DataObject) -> None:
    found = data.draw(partitions(shape))
    check_cover(shape, found)
    if not math.prod(shape):
        return
    at = data.draw(st.integers(0, len(found) - 1))
    with pytest.raises(CoverageError):
        check_cover(shape, found[:at] + found[at + 1 :])
    with pytest.raises(CoverageError):
        check_cover(shape, [*found, found[at]])
    other = data.draw(regions(shape).filter(lambda region: region.numel))
    with pytest.raises(CoverageError):
        check_cover(shape, [*found, other])
    if Counter(elements(shape, other).reshape(-1)) != Counter(elements(shape, found[at]).reshape(-1)):
        with pytest.raises(CoverageError):
            check_cover(shape, [*found[:at], other, *found[at + 1 :]])


@given(st.lists(st.integers(0, 3), max_size=3).map(tuple), st.data())
@settings(max_examples=300)
def test_any_regions_cover_or_do_not(shape: Shape, data: st.DataObject) -> None:
    found = data.draw(st.lists(regions(shape), max_size=5))
    held = Counter(int(at) for region in found for at in elements(shape, region).reshape(-1))
    if held == Counter(range(math.prod(shape))):
        check_cover(shape, found)
    else:
        with pytest.raises(CoverageError):
            check_cover(shape, found)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([Run(0, 4)], "hold 4 of 6 elements"),
        ([Run(0, 4), Run(5, 1)], "element 4 is in none"),
        ([Run(0, 4), Run(3, 3)], "element 3 is in two"),
        ([Run(0, 7)], "reach to element 7 of 6"),
        ([Run(0, 4), Run(5, -1), Run(4, 2)], "ends before it begins"),
        ([Run(-1, 7)], "begins before 0"),
        ([], "hold 0 of 6 elements"),
        ([Box((0, 0), (2, 2))], "hold 4 of 6 elements"),
        ([Box((0, 0), (2, 2)), Box((0, 1), (2, 1))], "in two of the pieces, and others in none"),
        ([Box((0, 0), (3, 2))], "in two of the pieces, and others in none"),
        ([Box((0, 0), (2, 4)), Box((0, 3), (2, -1))], "ends before it begins"),
        ([Box((-1, 0), (2, 3))], "begins before 0"),
        ([Box((0, 0), (1, 3)), Run(4, 3)], "reach to element 7 of 6"),
        ([Box((0, 0), (1, 3)), Run(2, 3)], "in two of the pieces, and others in none"),
    ],
)
def test_what_does_not_cover_is_told(found: list[Region], text: str) -> None:
    with pytest.raises(CoverageError, match=text):
        check_cover((2, 3), found)


def test_tensors_without_elements_and_of_one() -> None:
    for found in ([], [Run(0, 0)], [whole_box((0, 3))], [Box((0, 1), (0, 2)), Run(0, 0)]):
        check_cover((0, 3), found)
    for wrong in ([Run(0, 1)], [whole_box((0, 3)), Run(0, 1)], [Box((0, 0), (1, 3))]):
        with pytest.raises(CoverageError):
            check_cover((0, 3), wrong)
    check_cover((), [Box((), ())])
    check_cover((), [Run(0, 1)])
    for wrong in ([], [Box((), ()), Run(0, 1)]):
        with pytest.raises(CoverageError):
            check_cover((), wrong)
    ((source, target),) = intersect((), Laid(Box((), ()), 3, ()), Laid(Run(0, 1), 5, (2,)))
    assert (source, target) == (Layout((1,), (1,), 3), Layout((1,), (1,), 5))
    assert not list(intersect((0, 3), Laid(whole_box((0, 3)), 0, (3, 1)), Laid(Run(0, 0), 0, (1,))))


@given(SHAPES, st.data())
@settings(max_examples=300)
def test_a_region_is_filled_from_many_pieces(shape: Shape, data: st.DataObject) -> None:
    found = [data.draw(laid(region)) for region in data.draw(partitions(shape))]
    pieces = [Piece(one.region, one.offset, one.stride, storage(key)) for key, one in enumerate(found)]
    tensor = SavedTensor.in_pieces("float32", shape, pieces)
    firsts = [extent(shape, piece.region) for piece in tensor.pieces]
    assert firsts == sorted(firsts)
    into = data.draw(regions(shape).flatmap(laid))
    lies = {at: (key, offset) for key, one in enumerate(found) for at, offset in places(shape, one)}
    wanted = Counter((*lies[at], offset) for at, offset in places(shape, into))
    got: Counter[tuple[int, int, int]] = Counter()
    for piece, source, target in fill(tensor, into):
        assert isinstance(piece.storage, StorageRef)
        for (a, b), count in moved([(source, target)]).items():
            got[int(piece.storage.key), a, b] += count
    assert got == wanted
    if wanted:
        at = data.draw(st.sampled_from([at for at, _ in places(shape, into)]))
        gone = lies[at][0]
        kept = tuple(
            p for p in tensor.pieces if isinstance(p.storage, StorageRef) and p.storage.key != str(gone)
        )
        with pytest.raises(CoverageError, match="wanted elements are in the saved pieces"):
            list(fill(SavedTensor("float32", shape, kept), into))


def test_only_what_is_near_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def counted(shape: Shape, one: Laid, other: Laid) -> Iterable[tuple[Layout, Layout]]:
        looked.append(one)
        return intersect(shape, one, other)

    monkeypatch.setattr("rankload.loader.saved.tensor.intersect", counted)
    shape = (100, 100)
    rows = [Piece(Box((i, 0), (1, 100)), 0, (100, 1), storage(i)) for i in range(100)]
    columns = [Piece(Box((0, i), (100, 1)), 0, (1, 1), storage(i)) for i in range(100)]
    parts = [Piece(Run(100 * i, 100), 0, (1,), storage(i)) for i in range(100)]
    short = [Piece(Run(50 * i, 50), 0, (1,), storage(i)) for i in range(200)]
    for pieces, region, count in (
        (rows, Box((30, 0), (10, 100)), 10),
        (rows, Run(1234, 100), 2),
        (columns, Box((0, 30), (100, 5)), 5),
        (columns, Run(1230, 40), 40),
        (parts, Run(1234, 100), 2),
        (parts, Box((30, 0), (10, 100)), 10),
        (short, Box((0, 60), (100, 20)), 100),
        ([*rows[:50], *short[100:]], Box((40, 60), (20, 20)), 20),
    ):
        looked.clear()
        list(fill(SavedTensor.in_pieces("float32", shape, pieces[::-1]), whole(region)))
        assert len(looked) == count


def copied(tensor: SavedTensor, targets: Sequence[Region]) -> tuple[int, int]:
    """How many copies fill `targets`, and how many elements they have."""
    count = numel = 0
    for region in targets:
        for _, source, _ in fill(tensor, whole(region)):
            count += 1
            numel += source.numel
    return count, numel


@pytest.mark.takes_long
def test_a_hundred_thousand_pieces_take_as_many_copies_as_they_must() -> None:
    shape = (100_000, 16)
    numel = math.prod(shape)
    rows = [Piece(Box((i, 0), (1, 16)), 0, (16, 1), storage(i)) for i in range(100_000)]
    grid = [
        Piece(Box((i, j), (2, 8)), 0, (8, 1), storage((i, j))) for i in range(0, 100_000, 2) for j in (0, 8)
    ]
    parts = [Piece(Run(16 * i, 16), 0, (1,), storage(i)) for i in range(100_000)]
    by_rows = [Box((12_500 * i, 0), (12_500, 16)) for i in range(8)]
    by_columns = [Box((0, 8 * i), (100_000, 8)) for i in range(2)]
    by_runs = [Run(200_000 * i, 200_000) for i in range(8)]
    for pieces, targets, count in (
        (rows, by_rows, 100_000),
        (rows, by_runs, 100_000),
        (grid, by_rows, 100_000),
        (grid, by_columns, 100_000),
        (parts, by_rows, 100_000),
        (parts, by_runs, 100_000),
    ):
        tensor = SavedTensor.in_pieces("float32", shape, pieces)
        assert copied(tensor, targets) == (count, numel)
    wide = (16, 100_000)
    columns = [Piece(Box((0, i), (16, 1)), 0, (1, 1), storage(i)) for i in range(100_000)]
    tensor = SavedTensor.in_pieces("float32", wide, columns)
    assert copied(tensor, [Box((0, 12_500 * i), (16, 12_500)) for i in range(8)]) == (100_000, numel)
