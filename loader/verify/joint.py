"""Comparing storages with their checksums together: each rank sums what it reads, all of it counts as one. Pure.

A checksum is of a whole storage, but a rank reads a part of it. So the ranks tell what they are going to read, and
each is dealt cells of that to sum: every byte of a storage is in one cell, and every byte that a node reads is summed
on that node (its copy of the file may be its own). What nobody reads (paddings, mostly) is dealt to whoever has least
to do. Afterwards the cells' sums, combined, must be the storage's own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..byte_ranges import ByteRange
from ..checksums import crc32_joined
from ..errors import CorruptError

CELL_BYTES = 8 << 20
"""Cells do not reach over multiples of this, so that ranks that read the same can share the summing."""

StorageId = tuple[str, str]
"""The file, as the whole job calls it, and the storage's key in it."""


@dataclass(frozen=True, slots=True)
class StorageRead:
    """What one rank reads of one storage."""

    nbytes: int
    """Of the storage."""
    crc32: int
    ranges: tuple[ByteRange, ...]
    """Disjoint and in order."""
    names: tuple[str, ...] = ()
    """A few of the tensors that it is for."""


@dataclass
class _Dealt:
    """What one storage was cut into, and who sums each cell: one rank of each node that reads it."""

    nbytes: int
    crc32: int
    names: tuple[str, ...]
    cells: list[tuple[ByteRange, tuple[int, ...]]] = field(default_factory=list)


class JointCheck:
    """The deal and its verdict, on the rank that decides. `readings` are by rank, and so is `nodes`.

    Raises `CorruptError` where ranks see different storages under one name: their files are not copies.
    """

    def __init__(self, readings: Sequence[Mapping[StorageId, StorageRead]], nodes: Sequence[int]) -> None:
        self._nodes = nodes
        self._load = [0] * len(readings)
        self._dealt: dict[StorageId, _Dealt] = {}
        for storage in dict.fromkeys(name for each in readings for name in each):
            readers = {rank: each[storage] for rank, each in enumerate(readings) if storage in each}
            self._dealt[storage] = self._deal(storage, readers)

    def shares(self) -> list[dict[StorageId, list[ByteRange]]]:
        """What each rank is to sum, by rank; storages without a cell for it are left out."""
        shares: list[dict[StorageId, list[ByteRange]]] = [{} for _ in self._nodes]
        for storage, dealt in self._dealt.items():
            for cell, ranks in dealt.cells:
                for rank in ranks:
                    shares[rank].setdefault(storage, []).append(cell)
        return shares

    def compare(self, sums: Sequence[Mapping[StorageId, Sequence[int]]]) -> None:
        """Raises `CorruptError` for the first storage that does not match. `sums` are each rank's, by rank: of its
        share's cells, in their order."""
        for storage, dealt in self._dealt.items():
            position = dict.fromkeys((rank for _, ranks in dealt.cells for rank in ranks), 0)
            parts = []
            for (start, stop), ranks in dealt.cells:
                found = {}
                for rank in ranks:
                    found[rank] = sums[rank][storage][position[rank]]
                    position[rank] += 1
                if len(set(found.values())) > 1:
                    raise self._differ(storage, dealt, ByteRange(start, stop), found)
                parts.append((stop - start, next(iter(found.values()))))
            got = crc32_joined(parts)
            if got != dealt.crc32:
                raise CorruptError(
                    f"{storage[0]}: storage {storage[1]}{_used(dealt.names)}, has CRC-32 {got:08x}; the file's "
                    f"directory says {dealt.crc32:08x}. The file is damaged; fetch it again.",
                    path=storage[0],
                )

    def _deal(self, storage: StorageId, readers: Mapping[int, StorageRead]) -> _Dealt:
        first = next(iter(readers.values()))
        for rank, reading in readers.items():
            if (reading.nbytes, reading.crc32) != (first.nbytes, first.crc32):
                raise CorruptError(
                    f"{storage[0]}: storage {storage[1]} has {reading.nbytes:,} bytes and CRC-32 "
                    f"{reading.crc32:08x} on rank {rank}, but {first.nbytes:,} and {first.crc32:08x} on rank "
                    f"{next(iter(readers))}: the ranks see different files of this name",
                    path=storage[0],
                )
        dealt = _Dealt(first.nbytes, first.crc32, first.names)
        cuts = {0, first.nbytes, *range(CELL_BYTES, first.nbytes, CELL_BYTES)}
        for reading in readers.values():
            cuts.update(edge for span in reading.ranges for edge in span)
        edges = sorted(cuts)
        starts = {rank: [start for start, _ in reading.ranges] for rank, reading in readers.items()}
        for start, stop in pairwise(edges):
            holders: dict[int, list[int]] = {}
            for rank, reading in readers.items():
                at = bisect_right(starts[rank], start) - 1
                if at >= 0 and start < reading.ranges[at][1]:
                    holders.setdefault(self._nodes[rank], []).append(rank)
            groups = list(holders.values()) or [list(readers)]
            dealt.cells.append(
                (ByteRange(start, stop), tuple(self._least(ranks, stop - start) for ranks in groups))
            )
        return dealt

    def _least(self, ranks: Sequence[int], nbytes: int) -> int:
        chosen = min(ranks, key=lambda rank: self._load[rank])
        self._load[chosen] += nbytes
        return chosen

    def _differ(
        self, storage: StorageId, dealt: _Dealt, cell: ByteRange, found: Mapping[int, int]
    ) -> CorruptError:
        told = ", ".join(
            f"node {self._nodes[rank]} (rank {rank}) {value:08x}" for rank, value in found.items()
        )
        return CorruptError(
            f"{storage[0]}: storage {storage[1]}{_used(dealt.names)}: bytes {cell[0]:,} to {cell[1]:,} have "
            f"different CRC-32s on different nodes: {told}; at least one node's copy is damaged, fetch it again.",
            path=storage[0],
        )


def _used(names: Sequence[str]) -> str:
    return f", used by {', '.join(names[:3])}" if names else ""


def encode_readings(readings: Mapping[StorageId, StorageRead]) -> list[Any]:
    """As JSON types, for the way between ranks."""
    return [
        [*storage, one.nbytes, one.crc32, [edge for span in one.ranges for edge in span], list(one.names)]
        for storage, one in readings.items()
    ]


def decode_readings(record: Sequence[Any]) -> dict[StorageId, StorageRead]:
    """What `encode_readings` made."""
    return {
        (file, key): StorageRead(nbytes, crc, tuple(map(ByteRange, edges[::2], edges[1::2])), tuple(names))
        for file, key, nbytes, crc, edges, names in record
    }
