"""Parts of saved tensors against a brute-force oracle: every wanted element once, from where it lies."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.errors import CorruptError, LayoutError
from rankload.loader.saved.assembled import AssembledTensor, Run, SavedTensor, parts_of, whole_box
from rankload.loader.saved.intervals import Piece, Place
from rankload.loader.saved.strided import Box
from rankload.loader.saved.values import LazyTensor, StorageRef
from rankload.loader.sources.zero.contents import ShardedTensor
from rankload.loader.sources.zero.whole import assemble

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def flat(file: str, numel: int, *, offset: int = 0, step: int = 1) -> LazyTensor:
    """`numel` elements of an own file, `step` apart."""
    size = 8 * (offset + numel * step)
    return LazyTensor(StorageRef(file, "0", 0, size, None), "int64", (numel,), (step,), offset)


def indices(box: Box) -> list[tuple[int, ...]]:
    ranges = [range(start, start + size) for start, size in zip(box.starts, box.sizes, strict=True)]
    return list(product(*ranges))


def filled(source: SavedTensor, box: Box) -> dict[tuple[int, ...], tuple[str, int]]:
    """Index in the box to (file, element of its storage), as `parts_of` tells; none may be told twice."""
    found: dict[tuple[int, ...], tuple[str, int]] = {}
    for lazy, place in parts_of(source, box):
        assert lazy.shape == place.sizes
        for index, relative in zip(indices(place), indices(whole_box(lazy.shape)), strict=True):
            assert index not in found
            steps = sum(i * step for i, step in zip(relative, lazy.stride, strict=True))
            found[index] = (lazy.storage.file, lazy.storage_offset + steps)
    return found


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = draw(SHAPES)
    starts = [draw(st.integers(0, size)) for size in shape]
    sizes = [draw(st.integers(0, size - start)) for size, start in zip(shape, starts, strict=True)]
    return shape, Box(tuple(starts), tuple(sizes))


def flattened(shape: tuple[int, ...], index: tuple[int, ...]) -> int:
    position = 0
    for size, i in zip(shape, index, strict=True):
        position = position * size + i
    return position


@given(boxes(), st.data())
def test_runs_of_flat_tensors(case: tuple[tuple[int, ...], Box], data: st.DataObject) -> None:
    shape, box = case
    numel = math.prod(shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, numel), max_size=4)))
    runs, where = [], {}
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, numel], strict=True)):
        before, step = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2))
        source = flat(str(number), before + stop - start + 1, offset=before, step=step)
        runs.append(Run(source, before, start, stop - start))
        for position in range(start, stop):
            where[position] = (str(number), before + (before + position - start) * step)
    found = filled(AssembledTensor("x", "int64", shape, tuple(runs)), box)
    wanted = {
        tuple(i - start for i, start in zip(index, box.starts, strict=True)): where[flattened(shape, index)]
        for index in indices(box)
    }
    assert found == wanted


@given(boxes())
def test_a_whole_tensor_is_narrowed(case: tuple[tuple[int, ...], Box]) -> None:
    shape, box = case
    stride = tuple(3 * math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    lazy = LazyTensor(StorageRef("f", "0", 0, 0, None), "int64", shape, stride, 5)
    assert len(list(parts_of(lazy, box))) == (1 if box.numel else 0)
    wanted = {
        tuple(i - start for i, start in zip(index, box.starts, strict=True)): (
            "f",
            5 + 3 * flattened(shape, index),
        )
        for index in indices(box)
    }
    assert filled(lazy, box) == wanted


def test_whole_rows_are_contiguous_and_few() -> None:
    source = AssembledTensor(
        "x", "int64", (100, 10), (Run(flat("a", 505), 0, 0, 505), Run(flat("b", 500), 5, 505, 495))
    )
    parts = [lazy for lazy, _ in parts_of(source, Box((30, 0), (40, 10)))]
    assert all(lazy.is_contiguous for lazy in parts)
    assert [lazy.numel for lazy in parts] == [200, 5, 5, 190]


def test_runs_must_be_all_of_the_tensor() -> None:
    with pytest.raises(ValueError, match="hold 4 of 6"):
        AssembledTensor("x", "int64", (2, 3), (Run(flat("a", 4), 0, 0, 4),))
    with pytest.raises(ValueError, match="does not follow"):
        AssembledTensor("x", "int64", (2, 3), (Run(flat("a", 4), 0, 1, 4),))
    with pytest.raises(ValueError, match="does not follow"):
        AssembledTensor("x", "int64", (2, 3), (Run(flat("a", 4), 0, 0, 6),))


class OneRank:
    """As much of a `ZeroContents` as `assemble` asks for."""

    def __init__(self, tensor: LazyTensor | None) -> None:
        self.found = tensor

    def tensor(self, kind: str, name: str, piece: Piece) -> LazyTensor | None:
        return self.found


def test_pieces_that_are_not_all_of_a_parameter_are_an_error() -> None:
    def sharded(length: int) -> ShardedTensor:
        return ShardedTensor("x", "exp_avg", "float32", (2, 3), (Piece(Place(1, 0), 2, 0, length),))

    zero = OneRank(flat("a", 8))
    assert assemble(zero, sharded(6)).runs[0].source_start == 2  # type: ignore[arg-type]
    for tensor, length, error, text in (
        (zero.found, 5, CorruptError, "element 5 of the parameter is wanted"),
        (None, 6, LayoutError, "saved rank 1 has no exp_avg of x"),
        (flat("a", 7), 6, CorruptError, "has 7 elements, expected at least 8"),
    ):
        with pytest.raises(error, match=text):
            assemble(OneRank(tensor), sharded(length))  # type: ignore[arg-type]
