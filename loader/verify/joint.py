"""Combines the CRCs of ranks that read different parts of a storage, and compares them with the stored one. Pure.

A stored checksum is that of a whole storage. So all ranks state what they will read of it, and `JointCheck`, on rank 0,
cuts the storage into cells, each byte into one. Each cell is assigned to one rank of every node that reads it, because
nodes may have their own copies of the file. A cell that no rank reads (padding, mostly) is assigned to the rank with
the least to sum. Afterwards `checksums.crc32_joined` of the cells' CRC-32s must be the stored one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..byte_ranges import ByteRange
from ..checksums import CELL_BYTES, crc32_joined
from ..errors import CorruptError
from ..saved.copies import StorageReads
from ..saved.tensor import StorageId, StorageRef

ALONE_BYTES = 64 << 10
"""Each rank that needs any of a storage up to this size reads and sums all of it: to share the work would cost more."""
SHARED_FROM_BYTES = 4 << 20
"""From this size on, ranks that each read a whole storage share the summing of it."""


@dataclass(frozen=True, slots=True)
class StorageRead:
    """What one rank reads of one storage."""

    nbytes: int
    """Of the whole storage."""
    crc32: int
    """Of the whole storage, as the file's directory states it."""
    ranges: tuple[ByteRange, ...]
    """The bytes that are read, from the storage's first on; disjoint and in order."""
    names: tuple[str, ...] = ()
    """A few of the tensors that they are for."""


def split_reads(
    reads: Mapping[StorageRef, StorageReads], *, world_size: int, direct: bool
) -> tuple[dict[StorageRef, StorageRead], tuple[StorageRef, ...]]:
    """Of what one rank of `world_size` reads: what it sums together with other ranks, and what it sums whole by itself.

    Storages without a checksum are in neither. `direct`: ranges may be fetched directly, and so arrive in any order.
    """
    # A job of one rank sums a storage in one pass; only ranges that are fetched directly arrive in any order, as cells.
    together_pays = world_size > 1 or direct
    together: dict[StorageRef, StorageRead] = {}
    alone: list[StorageRef] = []
    for storage, one in reads.items():
        if storage.crc32 is None:
            continue
        if together_pays and _worth_sharing(storage, one, direct):
            together[storage] = StorageRead(storage.nbytes, storage.crc32, tuple(one.ranges), one.names)
        else:
            alone.append(storage)
    return together, tuple(alone)


def _worth_sharing(storage: StorageRef, reads: StorageReads, direct: bool) -> bool:
    if storage.nbytes <= ALONE_BYTES:
        return False
    # Who sums a storage alone reads it in one pass, from the node's file: so it could not be fetched directly.
    return direct or reads.nbytes < storage.nbytes or storage.nbytes >= SHARED_FROM_BYTES


@dataclass
class _Dealt:
    """The cells of one storage, in order, each with the ranks that sum it: one of each node that reads it."""

    nbytes: int
    crc32: int
    names: tuple[str, ...]
    cells: list[tuple[ByteRange, tuple[int, ...]]] = field(default_factory=list)


class JointCheck:
    """Assigns the cells of all storages to ranks, and compares their sums; runs on the rank that decides.

    `reads` and `nodes` are by rank. Raises `CorruptError` where a storage's size or checksum differs between ranks:
    their files of that name are not copies of each other.
    """

    def __init__(self, reads: Sequence[Mapping[StorageId, StorageRead]], nodes: Sequence[int]) -> None:
        self._nodes = nodes
        self._load = [0] * len(reads)
        self._dealt: dict[StorageId, _Dealt] = {}
        for storage in dict.fromkeys(name for each in reads for name in each):
            readers = {rank: each[storage] for rank, each in enumerate(reads) if storage in each}
            self._dealt[storage] = self._deal(storage, readers)

    def shares(self) -> list[dict[StorageId, list[ByteRange]]]:
        """The cells that each rank is to sum, by rank; storages without a cell for it are left out."""
        shares: list[dict[StorageId, list[ByteRange]]] = [{} for _ in self._nodes]
        for storage, dealt in self._dealt.items():
            for cell, ranks in dealt.cells:
                for rank in ranks:
                    shares[rank].setdefault(storage, []).append(cell)
        return shares

    def compare(self, sums: Sequence[Mapping[StorageId, Sequence[int]]]) -> dict[StorageId, CorruptError]:
        """The storages that differ from their checksums, or between nodes, each with the error that says so.

        `sums` are by rank: the CRC-32s of the cells of its share, in their order; of a storage that no rank has summed
        this time there are none.
        """
        found: dict[StorageId, CorruptError] = {}
        for storage, dealt in self._dealt.items():
            if any(storage in own for own in sums):
                error = self._compare(storage, dealt, sums)
                if error is not None:
                    found[storage] = error
        return found

    def _compare(
        self, storage: StorageId, dealt: _Dealt, sums: Sequence[Mapping[StorageId, Sequence[int]]]
    ) -> CorruptError | None:
        position = dict.fromkeys((rank for _, ranks in dealt.cells for rank in ranks), 0)
        parts = []
        for (start, stop), ranks in dealt.cells:
            found = {}
            for rank in ranks:
                found[rank] = sums[rank][storage][position[rank]]
                position[rank] += 1
            if len(set(found.values())) > 1:
                return self._differ(storage, dealt, ByteRange(start, stop), found)
            parts.append((stop - start, next(iter(found.values()))))
        got = crc32_joined(parts)
        if got != dealt.crc32:
            return CorruptError(
                f"{storage[0]}: storage {storage[1]}{_used(dealt.names)} has CRC-32 {got:08x}; the file's "
                f"directory says {dealt.crc32:08x}. The file is damaged; take another copy of it.",
                path=storage[0],
            )
        return None

    def _deal(self, storage: StorageId, readers: Mapping[int, StorageRead]) -> _Dealt:
        first = next(iter(readers.values()))
        for rank, read in readers.items():
            if (read.nbytes, read.crc32) != (first.nbytes, first.crc32):
                raise CorruptError(
                    f"{storage[0]}: storage {storage[1]} has {read.nbytes:,} bytes and CRC-32 "
                    f"{read.crc32:08x} on rank {rank}, but {first.nbytes:,} and {first.crc32:08x} on rank "
                    f"{next(iter(readers))}: the ranks see different files of this name",
                    path=storage[0],
                )
        dealt = _Dealt(first.nbytes, first.crc32, first.names)
        cuts = {0, first.nbytes, *range(CELL_BYTES, first.nbytes, CELL_BYTES)}
        for read in readers.values():
            cuts.update(edge for span in read.ranges for edge in span)
        edges = sorted(cuts)
        starts = {rank: [start for start, _ in read.ranges] for rank, read in readers.items()}
        for start, stop in pairwise(edges):
            holders: dict[int, list[int]] = {}
            for rank, read in readers.items():
                at = bisect_right(starts[rank], start) - 1
                if at >= 0 and start < read.ranges[at][1]:
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
        values = ", ".join(
            f"node {self._nodes[rank]} (rank {rank}) {value:08x}" for rank, value in found.items()
        )
        return CorruptError(
            f"{storage[0]}: storage {storage[1]}{_used(dealt.names)} has in its bytes {cell[0]:,} to {cell[1]:,} "
            f"different CRC-32s on different nodes: {values}; at least one node's copy is damaged; copy it there anew.",
            path=storage[0],
        )


def _used(names: Sequence[str]) -> str:
    return f", used by {', '.join(names[:3])}," if names else ""
