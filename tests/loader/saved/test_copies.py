"""Planned copies: what they read, what of that may go straight into its place, and what a tree needs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.byte_ranges import ByteRange
from rankload.loader.errors import LayoutError
from rankload.loader.saved.copies import (
    Copy,
    Memory,
    apart,
    copies_into,
    copies_of_tree,
    reads_of,
    shared,
)
from rankload.loader.saved.regions import Laid, Run, row_major_stride, whole_box
from rankload.loader.saved.strided import Box, Layout
from rankload.loader.saved.tensor import Piece, SavedTensor, StorageRef, Unread, fill
from rankload.loader.saved.values import InertObject
from region_cases import SHAPES, laid, regions

ONE = StorageRef("f", "0", 64, 4000, 17)
TWO = StorageRef("f", "1", 5000, 4000, None)
UNREAD = Unread("lies in the files of saved rank 3, which were not read")


def flat(numel: int, *, plain: bool = True, dtype: str = "float32", key: str = "w") -> Memory:
    return Memory(key, dtype, (numel,), (1,), plain)


def contiguous(
    start: int, stop: int, *, storage: StorageRef = ONE, name: str = "w", memory: Memory | None = None
) -> Copy:
    """A copy of elements `start` to `stop` of a storage to the beginning of some memory."""
    memory = memory or flat(stop - start)
    size = (stop - start,)
    return Copy(name, storage, "float32", Layout(size, (1,), start), memory, Layout(size, (1,), 0))


def test_a_part_of_a_tensor_is_copied_into_a_part_of_a_memory() -> None:
    tensor = SavedTensor.in_pieces(
        "float32", (4, 6), [Piece(Run(0, 15), 100, (1,), ONE), Piece(Run(15, 9), 7, (1,), TWO)]
    )
    memory = flat(50)
    copies = list(copies_into(tensor, Laid(Run(12, 6), 30, (1,)), memory, name="model/w"))
    assert [(copy.name, copy.storage, copy.dtype, copy.memory) for copy in copies] == [
        ("model/w", ONE, "float32", memory),
        ("model/w", TWO, "float32", memory),
    ]
    assert [(copy.source, copy.target) for copy in copies] == [
        (Layout((3,), (1,), 112), Layout((3,), (1,), 30)),
        (Layout((3,), (1,), 7), Layout((3,), (1,), 33)),
    ]
    assert [copy.span for copy in copies] == [ByteRange(448, 460), ByteRange(28, 40)]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (2, 3), (1, 4, 1), (4, 1, 3)])
def test_all_of_a_tensor_in_order_is_what_its_pieces_fill(shape: tuple[int, ...]) -> None:
    """The short way gives what the long one does."""
    stride = row_major_stride(shape)
    tensor = SavedTensor.in_storage(ONE, "float32", shape, stride, 7)
    into = Laid(whole_box(shape), 5, stride)
    ((_, source, target),) = fill(tensor, into)
    (copy,) = copies_into(tensor, into, flat(50), name="w")
    assert (copy.storage, copy.source, copy.target) == (ONE, source, target)


def test_a_run_of_one_row_is_planned_without_cutting_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What most of an engine's parameters are; the short way gives what the long one does."""
    row_major = row_major_stride((2, 3))
    whole = SavedTensor.in_storage(ONE, "float32", (2, 3), row_major, 7)
    in_row = SavedTensor("float32", (2, 3), (Piece(Run(0, 6), 40, (1,), TWO),))
    wanted = [Laid(Run(start, 3), 9, (1,)) for start in range(4)] + [Laid(whole_box((2, 3)), 9, row_major)]
    expected = [next(fill(tensor, into)) for tensor in (whole, in_row) for into in wanted]
    monkeypatch.setattr("rankload.loader.saved.copies.fill", None)
    found = [
        copy
        for tensor in (whole, in_row)
        for into in wanted
        for copy in copies_into(tensor, into, flat(50), name="w")
    ]
    assert [(copy.storage, copy.source, copy.target) for copy in found] == [
        (piece.storage, source, target) for piece, source, target in expected
    ]


@pytest.mark.parametrize("reach", [Run(4, 3), Run(0, 7)])
def test_a_run_beyond_the_tensor_is_told(reach: Run) -> None:
    tensor = SavedTensor("float32", (2, 3), (Piece(Run(0, 6), 40, (1,), TWO),))
    with pytest.raises(LayoutError, match=f"w: {6 - reach.start} of {reach.length} wanted elements"):
        list(copies_into(tensor, Laid(reach, 0, (1,)), flat(50), name="w"))


@given(st.data())
def test_a_part_of_one_piece_is_what_the_piece_fills(data: st.DataObject) -> None:
    """Any part, laid in any way, of any tensor that is one piece."""
    shape = data.draw(SHAPES)
    whole = data.draw(st.sampled_from([Run(0, math.prod(shape)), whole_box(shape)]))
    held, into = data.draw(laid(whole)), data.draw(regions(shape).flatmap(laid))
    tensor = SavedTensor("float32", shape, (Piece(held.region, held.offset, held.stride, ONE),))
    found = [(copy.source, copy.target) for copy in copies_into(tensor, into, flat(50), name="w")]
    assert found == [(source, target) for _, source, target in fill(tensor, into)]


def test_elements_that_no_file_read_has_are_told() -> None:
    tensor = SavedTensor.in_pieces(
        "float32", (10,), [Piece(Run(0, 4), 0, (1,), ONE), Piece(Run(4, 6), 0, (1,), UNREAD)]
    )
    memory = flat(10)
    assert len(list(copies_into(tensor, Laid(Run(0, 4), 0, (1,)), memory, name="w"))) == 1
    with pytest.raises(LayoutError, match="model/w lies in the files of saved rank 3, which were not read"):
        list(copies_into(tensor, memory.whole, memory, name="model/w"))
    # None of it is wanted: whatever is missing does not matter.
    assert not list(copies_into(tensor, Laid(Box((4,), (0,)), 0, (1,)), memory, name="w"))
    partly = SavedTensor("float32", (10,), tensor.pieces[:1])
    with pytest.raises(LayoutError, match="w: 4 of 10 wanted elements are in the saved pieces"):
        list(copies_into(partly, memory.whole, memory, name="w"))


@pytest.mark.parametrize(
    ("memory", "source", "target", "as_it_is"),
    [
        (flat(9), Layout((6,), (1,), 3), Layout((6,), (1,), 2), True),
        (flat(9, plain=False), Layout((6,), (1,), 3), Layout((6,), (1,), 2), False),
        (flat(9, dtype="bfloat16"), Layout((6,), (1,), 3), Layout((6,), (1,), 2), False),
        (flat(12), Layout((6,), (1,), 3), Layout((6,), (2,), 2), False),
        (flat(9), Layout((6,), (2,), 3), Layout((6,), (1,), 2), False),
        (flat(9), Layout((6,), (0,), 3), Layout((6,), (1,), 2), False),
        (flat(9), Layout((2, 3), (3, 1), 3), Layout((2, 3), (3, 1), 2), True),
        (flat(9), Layout((1,), (5,), 3), Layout((1,), (7,), 2), True),
    ],
)
def test_what_can_be_read_unchanged(memory: Memory, source: Layout, target: Layout, as_it_is: bool) -> None:
    assert Copy("w", ONE, "float32", source, memory, target).as_it_is is as_it_is


def test_a_span_has_the_gaps_between_its_elements() -> None:
    copy = Copy("w", ONE, "float16", Layout((2, 3), (10, 2), 5), flat(6), Layout((2, 3), (3, 1), 0))
    assert copy.span == ByteRange(10, 10 + 2 * (10 + 4 + 1))


def test_reads_are_each_byte_once_in_the_order_of_the_files() -> None:
    first = StorageRef("a", "9", 999, 4000, None)
    reads = reads_of(
        [
            contiguous(10, 20, storage=TWO, name="b"),
            contiguous(0, 5, name="c"),
            contiguous(3, 8, name="d"),
            contiguous(20, 21, name="c"),
            contiguous(22, 23, name="e"),
            contiguous(30, 31, name="g"),
            contiguous(0, 1, storage=first),
        ]
    )
    assert list(reads) == [first, ONE, TWO]
    assert reads[ONE].ranges == [(0, 32), (80, 84), (88, 92), (120, 124)]
    assert reads[ONE].nbytes == 44
    assert reads[ONE].names == ("c", "d", "e")
    assert reads[TWO].ranges == [(40, 80)]
    assert reads_of([]) == {}


def test_only_what_one_copy_alone_reads_unchanged_is_direct() -> None:
    changed = flat(10, dtype="float16")
    reads = reads_of(
        [
            contiguous(0, 10),
            contiguous(5, 15),
            contiguous(20, 30, memory=changed),
            contiguous(28, 40),
            contiguous(50, 60),
            contiguous(60, 70, storage=TWO, memory=changed),
        ]
    )
    assert reads[ONE].ranges == [(0, 60), (80, 160), (200, 240)]
    assert reads[ONE].direct == [(0, 20), (40, 60), (120, 160), (200, 240)]
    assert reads[TWO].direct == []
    alone = reads_of([contiguous(0, 10)])[ONE]
    assert alone.direct == alone.ranges == [(0, 40)]
    # A tied weight, which is read twice, is fetched once.
    assert reads_of([contiguous(0, 10), contiguous(0, 10)])[ONE].direct == []


def test_a_tree_reads_each_storage_once_and_no_more_than_it_reaches() -> None:
    tree = {
        "a": SavedTensor.in_storage(ONE, "float32", (2, 3), (10, 1), 21),
        "b": [SavedTensor.in_storage(ONE, "float32", (), (), 19)],
        "c": SavedTensor.in_storage(TWO, "uint8", (3,), (1,), 17),
        "d": InertObject("x.y", state={"e": SavedTensor.in_storage(TWO, "complex128", (2,), (1,), 2)}),
        "expanded": SavedTensor.in_storage(TWO, "int64", (1 << 40,), (0,), 9),
        "empty": SavedTensor.in_storage(StorageRef("f", "2", 9, 0, None), "float32", (0, 3), (3, 1), 5),
        "none": 3,
    }
    copies = copies_of_tree(tree, path="extra")
    assert [(copy.name, copy.storage, copy.dtype, copy.span) for copy in copies] == [
        # From element 19 to element 33, from a multiple of 16 on.
        ("extra/a", ONE, "uint8", (64, 34 * 4)),
        ("extra/c", TWO, "uint8", (16, 80)),
    ]
    for copy in copies:
        assert copy.memory.key == shared(copy.storage)
        assert copy.memory.shape == copy.source.shape == copy.target.shape
        assert (copy.memory.dtype, copy.target.offset) == ("uint8", 0)
        # Other values of the tree may need the same bytes, so that they go by way of the node's file.
        assert not copy.as_it_is
    assert copies_of_tree({"n": 1}) == []


def test_a_tensor_in_several_pieces_has_memory_of_its_own() -> None:
    parts = [Piece(Run(0, 4), 2, (1,), ONE), Piece(Run(4, 2), 0, (1,), TWO)]
    tensor = SavedTensor.in_pieces("float32", (2, 3), parts)
    one_run = SavedTensor.in_pieces("float32", (6,), [Piece(Run(0, 6), 1, (1,), ONE)])
    copies = copies_of_tree([tensor, one_run], path="p")
    assert [(copy.memory.key, copy.name, copy.storage, copy.span) for copy in copies] == [
        (apart(tensor), "p/0", ONE, (8, 24)),
        (apart(tensor), "p/0", TWO, (0, 8)),
        (apart(one_run), "p/1", ONE, (4, 28)),
    ]
    assert apart(tensor) != apart(one_run)
    assert copies[0].memory == Memory(apart(tensor), "float32", (2, 3), (3, 1), False)
    unread = SavedTensor("float32", (2,), (Piece(Box((0,), (2,)), 0, (1,), UNREAD),))
    with pytest.raises(LayoutError, match="p/w lies in the files of saved rank 3"):
        copies_of_tree({"w": unread}, path="p")


def test_the_whole_of_a_memory() -> None:
    memory = Memory("w", "float32", (2, 3), (1, 2), True)
    assert (memory.whole.region, memory.whole.offset, memory.whole.stride) == (Box((0, 0), (2, 3)), 0, (1, 2))
