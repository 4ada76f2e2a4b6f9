"""ZeRO's partitions against rows that are really cut."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.saved.partitions import Slot, cut, padded_partition, padded_share, shares
from rankload.loader.saved.regions import CoverageError, Run, check_cover


def held(slots: list[Slot]) -> dict[tuple[int, int], int]:
    """(rank, element of its partition) to the parameter's element that lies there."""
    found = {
        (slot.rank, slot.start + i): slot.run.start + i for slot in slots for i in range(slot.run.length)
    }
    assert len(found) == sum(slot.run.length for slot in slots)
    return found


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 9), st.integers(0, 8))
def test_cut_follows_the_row_of_partitions(start: int, length: int, partition: int, count: int) -> None:
    if start + length > partition * count:
        with pytest.raises(CoverageError, match="do not lie in"):
            cut(start, length, partition, count)
        return
    slots = cut(start, length, partition, count)
    assert held(slots) == {divmod(start + i, partition): i for i in range(length)}
    assert all(slot.run.length for slot in slots)
    check_cover((length,), [slot.run for slot in slots])
    ranks = [10 * index for index in range(count)][::-1]
    assert [slot.rank for slot in cut(start, length, partition, count, ranks)] == [
        ranks[slot.rank] for slot in slots
    ]


def test_a_parameter_that_begins_before_the_row_is_refused() -> None:
    for start, length, partition in ((-1, 2, 4), (0, -1, 4), (0, 0, -4)):
        with pytest.raises(CoverageError):
            cut(start, length, partition, 2)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 5))
def test_shares_are_those_of_a_padded_parameter(numel: int, world_size: int, offset: int) -> None:
    share = padded_share(numel, world_size)
    padded = [*range(numel), *[None] * (share * world_size - numel)]
    assert len(padded) - numel < world_size
    assert held(shares(numel, world_size, offset)) == {
        (rank, offset + i): element
        for rank in range(world_size)
        for i, element in enumerate(padded[rank * share : (rank + 1) * share])
        if element is not None
    }
    check_cover((numel,), [slot.run for slot in shares(numel, world_size, offset)])


@given(st.integers(0, 200), st.integers(1, 9))
def test_padded_partitions_hold_a_group(numel: int, ranks: int) -> None:
    partition = padded_partition(numel, ranks)
    assert partition == math.ceil(numel / (2 * ranks)) * 2
    assert numel <= partition * ranks < numel + 2 * ranks


def test_the_last_rank_may_have_nothing() -> None:
    # 5 elements over 4 ranks: shares of 2, of which the third has one and the last none.
    assert shares(5, 4, 7) == [Slot(0, 7, Run(0, 2)), Slot(1, 7, Run(2, 2)), Slot(2, 7, Run(4, 1))]
    assert shares(0, 4, 7) == []
    assert cut(3, 6, 4, 3) == [Slot(0, 3, Run(0, 1)), Slot(1, 0, Run(1, 4)), Slot(2, 0, Run(5, 1))]
