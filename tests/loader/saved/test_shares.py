"""Pieces in equal shares: made as they are asked for, they are what a list of them would be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.saved.copies import Memory, copies_into
from rankload.loader.saved.partitions import padded_share, shares
from rankload.loader.saved.regions import Laid, Run, check_cover
from rankload.loader.saved.shares import FlatShares, Shares
from rankload.loader.saved.tensor import Piece, SavedTensor, StorageRef, Unread

UNREAD = Unread("was not read")


def storage(rank: int) -> StorageRef:
    return StorageRef(f"rank{rank}", "0", 64, 1 << 20, None)


@st.composite
def parameters(draw: st.DrawFn) -> tuple[Shares, tuple[Piece, ...], int]:
    """A parameter of some elements over some ranks, of which a few that follow each other were read: by shares, as a
    list made one by one, and its number of elements."""
    numel, world_size = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    first = draw(st.integers(0, world_size - 1))
    read = range(first, draw(st.integers(first + 1, world_size)))
    start, offset = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    share = padded_share(numel, world_size)
    slots = shares(numel, world_size, start, read)
    begin, end = min(read.start * share, numel), min(read.stop * share, numel)
    before = [Piece(Run(0, begin), 0, (1,), UNREAD)] if begin else []
    after = [Piece(Run(end, numel - end), 0, (1,), UNREAD)] if end < numel else []
    flats = FlatShares(first, tuple(map(storage, read)), offset, 100)
    made = Shares(flats, numel=numel, share=share, start=start, before=before, after=after)
    listed = [Piece(slot.run, offset + slot.start, (1,), storage(slot.rank)) for slot in slots]
    return made, (*before, *listed, *after), numel


def as_values(pieces: object) -> list[tuple[object, ...]]:
    return [(one.region, one.offset, one.stride, one.storage) for one in pieces]  # type: ignore[attr-defined]


@given(parameters(), st.data())
def test_they_are_the_pieces_that_a_list_would_have(
    found: tuple[Shares, tuple[Piece, ...], int], data: st.DataObject
) -> None:
    made, listed, numel = found
    assert len(made) == len(listed)
    assert as_values(made) == as_values(listed)
    check_cover((numel,), [piece.region for piece in made])
    index = data.draw(st.integers(-len(listed), len(listed) - 1))
    assert as_values([made[index]]) == as_values([listed[index]])
    part = data.draw(st.slices(len(listed)))
    assert as_values(made[part]) == as_values(listed[part])


@given(parameters(), st.data())
def test_copies_are_those_of_a_list(
    found: tuple[Shares, tuple[Piece, ...], int], data: st.DataObject
) -> None:
    made, listed, numel = found
    first = data.draw(st.integers(0, numel - 1))
    into = Laid(Run(first, data.draw(st.integers(1, numel - first))), data.draw(st.integers(0, 5)), (1,))
    memory = Memory("w", "float32", (100,), (1,), plain=True)

    def copies(pieces: Shares | tuple[Piece, ...]) -> list[object] | str:
        try:
            tensor = SavedTensor("float32", (numel,), pieces)
            return [
                (one.storage, one.source, one.target) for one in copies_into(tensor, into, memory, name="w")
            ]
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    assert copies(made) == copies(listed)


def test_storages_at_one_place_of_many_files_are_told_apart_by_their_hashes() -> None:
    # Looking up one among thousands would else compare it with each of them.
    storages = [storage(rank) for rank in range(512)]
    assert len({hash(one) for one in storages}) > 500
