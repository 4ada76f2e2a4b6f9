"""Copies that are planned as runs take the same elements to the same places as those of each part by itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.errors import LayoutError
from rankload.loader.saved.copies import Copy, Memory, NamesOf, copies_into, reads_of
from rankload.loader.saved.partitions import Slot
from rankload.loader.saved.regions import Run, whole_box
from rankload.loader.saved.runs import Runs, laid
from rankload.loader.saved.tensor import Piece, RowTensor, SavedTensor, StorageRef

STORAGES = [StorageRef("file", key, 64 * place, 4000, None) for place, key in enumerate("ab")]
Part = tuple[str, SavedTensor, Slot, Memory]


def elements(copies: list[Copy] | tuple[Copy, ...]) -> dict[tuple[str, int], tuple[str, int, str]]:
    """Each element of a memory that is filled: of which storage, which element there, and as which dtype."""
    found: dict[tuple[str, int], tuple[str, int, str]] = {}
    for copy in copies:
        assert copy.source.stride == copy.target.stride == (1,)
        assert copy.source.shape == copy.target.shape
        for n in range(copy.source.numel):
            place = copy.memory.key, copy.target.offset + n
            assert place not in found
            found[place] = copy.storage.key, copy.source.offset + n, copy.dtype
    return found


@st.composite
def parts(draw: st.DrawFn) -> list[Part]:
    """Parameters that mostly follow each other, in files and in memory."""
    memories = [Memory(f"flat {n}", "float32", (400,), (1,), True) for n in range(2)]
    at, stop = [draw(st.integers(0, 9)) for _ in STORAGES], [0, 0]
    found: list[Part] = []
    for n in range(draw(st.integers(0, 12))):
        where, into = draw(st.integers(0, 1)), draw(st.integers(0, 1))
        shape = draw(st.sampled_from([(), (1,), (4,), (2, 3), (0,), (5, 1)]))
        at[where] += draw(st.sampled_from([0, 0, 0, 2]))
        stop[into] += draw(st.sampled_from([0, 0, 0, 3]))
        dtype = draw(st.sampled_from(["float32", "float32", "float32", "bfloat16"]))
        storage, first = STORAGES[where], at[where]
        kind = draw(st.sampled_from(["row", "whole", "run", "pieces"]))
        numel = RowTensor(storage, dtype, shape, first).numel
        tensor: SavedTensor = RowTensor(storage, dtype, shape, first)
        if kind == "whole":
            stride = tuple(draw(st.just(3)) if size == 1 else 1 for size in shape)
            stride = (3, 1) if shape == (2, 3) else stride
            tensor = SavedTensor(dtype, shape, (Piece(whole_box(shape), first, stride, storage),))
        elif kind == "run":
            tensor = SavedTensor(dtype, shape, (Piece(Run(0, numel), first, (1,), storage),))
        elif kind == "pieces" and numel > 1:
            runs = Run(0, 1), Run(1, numel - 1)
            tensor = SavedTensor(
                dtype, shape, tuple(Piece(one, first + one.start, (1,), storage) for one in runs)
            )
        start = draw(st.integers(0, numel))
        run = Run(start, draw(st.integers(0, numel - start)))
        found.append((f"p{n}", tensor, Slot(0, stop[into], run), memories[into]))
        at[where] += numel
        stop[into] += run.length
    return found


@given(parts())
def test_runs_fill_what_each_part_by_itself_fills(found: list[Part]) -> None:
    runs = Runs("fp32")
    single: list[Copy] = []
    for name, tensor, slot, memory in found:
        runs.add(name, tensor, slot, memory)
        single += copies_into(tensor, laid(slot, memory), memory, name=f"fp32/{name}")
    copies = runs.copies
    assert elements(copies) == elements(single)
    assert len(copies) <= len(single)
    assert set(NamesOf(copies)) == set(NamesOf(single))
    assert len(NamesOf(copies)) == len(list(NamesOf(copies)))
    assert {storage: (reads.ranges, reads.direct) for storage, reads in reads_of(copies).items()} == {
        storage: (reads.ranges, reads.direct) for storage, reads in reads_of(single).items()
    }


def test_what_lies_side_by_side_is_one_copy_with_all_names() -> None:
    memory = Memory("flat", "float32", (40,), (1,), True)
    runs = Runs("fp32")
    for n in range(10):
        runs.add(
            f"p{n}", RowTensor(STORAGES[0], "float32", (2, 2), 7 + 4 * n), Slot(0, 4 * n, Run(0, 4)), memory
        )
    (copy,) = runs.copies
    assert (copy.source.offset, copy.target.offset, copy.source.shape) == (7, 0, (40,))
    assert list(NamesOf([copy])) == [f"fp32/p{n}" for n in range(10)]
    assert NamesOf([copy])[:3] == ["fp32/p0", "fp32/p1", "fp32/p2"]
    assert reads_of([copy])[STORAGES[0]].names == ("fp32/p0", "fp32/p1", "fp32/p2")
    assert str(copy).startswith("fp32/p0 and 9 more: bytes 28 to 188 of a into flat")


def test_elements_that_a_tensor_does_not_have_are_refused() -> None:
    memory = Memory("flat", "float32", (40,), (1,), True)
    tensor = RowTensor(STORAGES[0], "float32", (3,), 0)
    with pytest.raises(LayoutError, match="fp32/w"):
        Runs("fp32").add("w", tensor, Slot(0, 0, Run(0, 4)), memory)
