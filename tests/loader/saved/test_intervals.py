"""Interval arithmetic against a brute-force oracle that moves the elements one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.saved.intervals import Copy, CoverageError, Piece, Place, cut, intersect

lengths = st.lists(st.integers(0, 9), max_size=8)


def chopped(sizes: list[int], rank: int = 0) -> list[Piece]:
    """Runs of the given sizes, each in a flat tensor of its own, three elements in."""
    pieces = []
    position = 0
    for index, size in enumerate(sizes):
        pieces.append(Piece(Place(rank, index), 3, position, size))
        position += size
    return pieces


@given(lengths, lengths, st.data())
def test_every_wanted_element_arrives_from_where_it_lies(
    saved: list[int], wanted: list[int], data: st.DataObject
) -> None:
    total = sum(saved)
    pieces = chopped(saved)
    slots = [slot for slot in chopped(wanted, rank=1) if slot.param_stop <= total]
    slots = data.draw(st.permutations(slots))
    memory = {
        (piece.place, piece.start + i): piece.param_start + i for piece in pieces for i in range(piece.length)
    }
    got: dict[tuple[Place, int], int] = {}
    for copy in intersect(data.draw(st.permutations(pieces)), slots):
        assert copy.length > 0
        for i in range(copy.length):
            assert (copy.target, copy.target_start + i) not in got
            got[copy.target, copy.target_start + i] = memory[copy.source, copy.source_start + i]
    assert got == {
        (slot.place, slot.start + i): slot.param_start + i for slot in slots for i in range(slot.length)
    }


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9), st.integers(1, 8))
def test_cut_follows_the_row_of_partitions(start: int, length: int, partition: int, count: int) -> None:
    if start + length > partition * count:
        with pytest.raises(CoverageError):
            cut(start, length, partition, count)
        return
    got = {
        (piece.place.rank, piece.start + i): piece.param_start + i
        for piece in cut(start, length, partition, count)
        for i in range(piece.length)
    }
    assert got == {divmod(start + i, partition): i for i in range(length)}


def test_a_gap_an_overlap_and_a_negative_run_are_refused() -> None:
    wanted = [Piece(Place(9, 0), 0, 0, 6)]
    whole = Piece(Place(0, 0), 0, 0, 6)
    assert intersect([whole], wanted) == [Copy(Place(0, 0), 0, Place(9, 0), 0, 6)]
    with pytest.raises(CoverageError, match=r"element 4 .* no saved piece"):
        intersect([Piece(Place(0, 0), 0, 0, 4), Piece(Place(1, 0), 0, 5, 2)], wanted)
    with pytest.raises(CoverageError, match=r"element 0 .* no saved piece"):
        intersect([], wanted)
    with pytest.raises(CoverageError, match="two saved pieces hold element 3"):
        intersect([Piece(Place(0, 0), 0, 0, 4), Piece(Place(1, 0), 0, 3, 3)], wanted)
    with pytest.raises(CoverageError, match="two wanted pieces"):
        intersect([whole], [*wanted, Piece(Place(9, 1), 0, 5, 1)])
    with pytest.raises(CoverageError, match="before 0"):
        intersect([Piece(Place(0, 0), -1, 0, 6)], wanted)


def test_what_is_not_wanted_is_not_read() -> None:
    pieces = cut(0, 100, 10, 10)
    copies = intersect(pieces, [Piece(Place(0, 0), 0, 35, 10)])
    assert [(copy.source.rank, copy.source_start, copy.length) for copy in copies] == [(3, 5, 5), (4, 0, 5)]
