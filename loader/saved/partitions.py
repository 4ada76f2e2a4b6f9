"""Cuts rows of elements into the partitions that DeepSpeed's ZeRO keeps on its ranks: equal ones, or padded shares.

Pure. A parameter's elements are a run of a group's row, or of its own; each rank's partition has some of them, from an
element of its own on. Both a saved checkpoint and a live engine are laid out by these rules: those of DeepSpeed's
``runtime/zero/stage_1_and_2.py`` and ``runtime/zero/partition_parameters.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .regions import CoverageError, Run


class Slot(NamedTuple):
    """A run of a parameter's elements, and where a partition has them: on a rank, from element ``start`` on."""

    rank: int
    start: int
    run: Run


def cut(
    row_start: int, length: int, partition: int, count: int, ranks: Sequence[int] | None = None
) -> list[Slot]:
    """Where the `length` elements of a parameter lie that begins at element `row_start` of a row of partitions.

    The row is `count` partitions of `partition` elements each, one on each of `ranks` in that order, by default
    0, 1, 2 ... Raises `CoverageError` where the parameter reaches beyond the row.
    """
    if length < 0 or row_start < 0 or partition < 0 or row_start + length > partition * count:
        raise CoverageError(
            f"elements [{row_start}, {row_start + length}) do not lie in {count} partitions of {partition}"
        )
    index = row_start // partition if partition else 0
    if length and row_start + length <= (index + 1) * partition:
        # As nearly all parameters lie.
        rank = index if ranks is None else ranks[index]
        return [Slot(rank, row_start - index * partition, Run(0, length))]
    slots = []
    position, stop = row_start, row_start + length
    while position < stop:
        index = position // partition
        end = min(stop, (index + 1) * partition)
        rank = index if ranks is None else ranks[index]
        slots.append(Slot(rank, position - index * partition, Run(position - row_start, end - position)))
        position = end
    return slots


def shares(numel: int, world_size: int, offset: int, ranks: Iterable[int] | None = None) -> list[Slot]:
    """Stage 3: where a parameter's elements lie, given its `offset` in every rank's flat tensor.

    Rank r has elements [r * p, (r + 1) * p), where p is `padded_share`; its padding is in no slot. With `ranks`, only
    the slots of these, in their order.
    """
    share = padded_share(numel, world_size)
    count = -(-numel // share) if share else 0
    return [
        Slot(rank, offset, Run(rank * share, min(share, numel - rank * share)))
        for rank in (range(count) if ranks is None else ranks)
        if rank < count
    ]


def padded_partition(numel: int, ranks: int) -> int:
    """Stages 1, 2: elements of each partition, padding included, of a group that is cut over `ranks` ranks.

    The group's `numel` elements, alignment paddings included, are padded to the next multiple of 2 * `ranks`.
    """
    return 2 * -(-numel // (2 * ranks))


def padded_share(numel: int, world_size: int) -> int:
    """Stage 3: elements of each rank's share, padding included, of a parameter of `numel` elements."""
    return -(-numel // world_size)
