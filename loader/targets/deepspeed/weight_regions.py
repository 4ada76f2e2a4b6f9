"""Decides which rank of a node provides which bytes of the weights that all of them need whole. Pure.

A region is one storage of a module file, or weights that can only be cast from fp32 masters (`lay_regions`). The
regions of a node lie one after another in its image, the memory that its ranks share. `deal_regions` assigns to each
rank a part to provide: to be cast from its masters, where the node's ranks hold all of them and, for a storage of a
file, a checksum can prove that the cast gives the same bytes; to be read from the module file otherwise.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ...byte_ranges import ByteRange, subtract, union
from ...checksums import CELL_BYTES
from ...saved.dtypes import ITEMSIZE
from ...saved.model_parallel import EXPERTS
from ...saved.regions import Run
from ...saved.tensor import SavedTensor, StorageId, StorageRef

Provider = Literal["masters", "file", "apart"]
"""Where a region's bytes come from; ``apart``: each rank reads the weights by itself, and the image lacks them."""
MASTERS: Provider = "masters"
FILE: Provider = "file"
APART: Provider = "apart"

MIN_REGION_BYTES = 1 << 20
"""Weights of smaller regions are read by every rank itself."""
_ALIGNMENT = 4096
"""Regions begin at multiples of this in the image, in bytes."""
_WEIGHT_ALIGNMENT = 64
"""Where only masters give the weights, each begins at a multiple of this in its region, in bytes."""


@dataclass(frozen=True, slots=True)
class WholeWeight:
    """Weights that a rank computes with as a whole."""

    name: str
    source: SavedTensor
    """What they are filled from."""
    dtype: str
    """That the module computes with."""
    from_master: bool
    """Whether ``source`` is a saved master."""
    cast: tuple[Run, ...]
    """The elements that this rank can cast from masters that it restores from the checkpoint."""


@dataclass(frozen=True)
class LaidRegion:
    """Weights that lie together in the node's image: a storage of the module's file, or all that only masters give."""

    nbytes: int
    storage: StorageRef | None
    """The module file's storage; None where only the masters give the weights."""
    complete: bool
    """Whether the weights are all that the storage holds, except padding."""
    spans: Mapping[str, ByteRange]
    """The bytes of each weight in the region."""
    cast: tuple[ByteRange, ...]
    """The bytes that this rank can cast from masters."""

    @property
    def offer(self) -> RegionOffer:
        """The facts about it, for all ranks to see."""
        crc = self.storage.crc32 if self.storage is not None else None
        spans = union(self.spans.values()) if self.complete else ()
        return RegionOffer(self.nbytes, crc, self.storage is not None, spans, self.cast)


@dataclass(frozen=True, slots=True)
class RegionOffer:
    """What one rank knows of a region, and can provide of it. Ranges count bytes from the region's first."""

    nbytes: int
    crc32: int | None
    """The storage's checksum; None where the file has none, or the region is no storage."""
    in_file: bool
    """Whether it is a module file's storage, which the cast masters must be proven equal to."""
    weights: tuple[ByteRange, ...]
    """The bytes of weights, where these and zeros between them are the whole region; else empty."""
    masters: tuple[ByteRange, ...]
    """The bytes that this rank can cast from masters that it restores."""


@dataclass(frozen=True, slots=True)
class RegionShare:
    """What one rank is to do for a region. Ranges count bytes from the region's first."""

    offset: int
    """Where the region begins in the image, in bytes."""
    source: Provider
    provide: tuple[ByteRange, ...]
    """The bytes that this rank puts into the image."""
    sums: tuple[ByteRange, ...]
    """The bytes of the filled image that this rank sums; together the node's ranks sum each byte once."""


@dataclass(frozen=True, slots=True)
class NodeShare:
    """What one rank is to do for its node's image."""

    image_bytes: int
    maker: int
    """The rank that makes the image; the others of the node open it."""
    regions: dict[StorageId, RegionShare]


def lay_regions(
    weights: Iterable[WholeWeight],
    model: Mapping[str, Any],
    name_of: Callable[[str], str],
    name_by_masters: str,
) -> dict[StorageId, LaidRegion]:
    """The regions of `weights` of at least `MIN_REGION_BYTES`, by names that are the same on all ranks.

    Args:
        model: the saved weights before ``ignore_keys``, by name.
        name_of: gives the name, the same on all ranks, of the file at a local path.
        name_by_masters: the file's part in the names of regions that only masters give.
    """
    spans: dict[StorageRef | str, dict[str, ByteRange]] = {}
    cast: dict[StorageRef | str, list[ByteRange]] = {}
    for one in weights:
        source, piece, size = one.source, one.source.whole, ITEMSIZE[one.dtype]
        if not source.numel:
            continue
        where: StorageRef | str
        if one.from_master:
            # Experts of one name are different ones on different ranks.
            if EXPERTS in one.name:
                continue
            where = one.dtype
            start = _aligned_end(spans.get(where, {}))
        else:
            if piece is None or not isinstance(piece.storage, StorageRef):
                continue
            # Its region would be too small. Most are, where each of many weights has a storage of its own.
            if piece.storage.nbytes < MIN_REGION_BYTES:
                continue
            if source.dtype != one.dtype or not source.is_contiguous:
                continue
            where, start = piece.storage, piece.offset * size
        spans.setdefault(where, {})[one.name] = ByteRange(start, start + source.numel * size)
        cast.setdefault(where, []).extend(
            ByteRange(start + run.start * size, start + run.stop * size) for run in one.cast
        )
    beside = _tensors_in(model, [where for where in spans if isinstance(where, StorageRef)])
    found: dict[StorageId, LaidRegion] = {}
    for where, own in spans.items():
        if isinstance(where, StorageRef):
            complete = _holds_all(union(own.values()), beside[where])
            region = LaidRegion(where.nbytes, where, complete, own, union(cast[where]))
            found[name_of(where.file), where.key] = region
        else:
            region = LaidRegion(_aligned_end(own), None, True, own, union(cast[where]))
            found[name_by_masters, where] = region
    return {name: region for name, region in found.items() if region.nbytes >= MIN_REGION_BYTES}


def in_small_storage(source: SavedTensor) -> bool:
    """Whether `source` certainly lies in a storage that is too small for a region, as most of many weights do."""
    row = source.row
    return row is not None and row[0].nbytes < MIN_REGION_BYTES


def _aligned_end(spans: dict[str, ByteRange]) -> int:
    """Where the next weight begins in a region that only masters give, after those of `spans`, in their order."""
    last = next(reversed(spans.values()), ByteRange(0, 0))
    return -(-last.stop // _WEIGHT_ALIGNMENT) * _WEIGHT_ALIGNMENT


def _tensors_in(
    model: Mapping[str, Any], storages: Collection[StorageRef]
) -> dict[StorageRef, list[SavedTensor]]:
    """The tensors of the module's file that lie in each of `storages`."""
    if not storages:
        return {}
    found: dict[StorageRef, list[SavedTensor]] = {storage: [] for storage in storages}
    for value in model.values():
        piece = value.whole if isinstance(value, SavedTensor) and value.numel else None
        if piece is not None and isinstance(piece.storage, StorageRef) and piece.storage in found:
            found[piece.storage].append(value)
    return found


def _holds_all(spans: Sequence[ByteRange], tensors: Iterable[SavedTensor]) -> bool:
    """Whether `tensors`, which lie in the storage that `spans` are ranges of, have no byte outside of these.

    `spans` are in order, and do not touch each other.
    """
    starts = [start for start, _ in spans]
    for tensor in tensors:
        row, piece = tensor.row, None
        if row is None:
            piece = tensor.whole
            if not tensor.is_contiguous:
                return False
        place = row[1] if row is not None else piece.offset if piece is not None else 0
        first = place * tensor.itemsize
        at = bisect_right(starts, first) - 1
        if at < 0 or first + tensor.nbytes > spans[at].stop:
            return False
    return True


def deal_regions(
    offers: Sequence[Mapping[StorageId, RegionOffer]],
    nodes: Sequence[int],
    *,
    not_from_masters: frozenset[StorageId] = frozenset(),
) -> list[NodeShare]:
    """Each rank's share, by rank, from the `offers` and `nodes` by rank.

    `not_from_masters` are regions whose cast masters have turned out to be other bytes than the file's.
    """
    shares: list[NodeShare] = [NodeShare(0, 0, {})] * len(nodes)
    for node in dict.fromkeys(nodes):
        ranks = [rank for rank, own in enumerate(nodes) if own == node]
        offset = 0
        dealt: dict[int, dict[StorageId, RegionShare]] = {rank: {} for rank in ranks}
        for region in dict.fromkeys(name for rank in ranks for name in offers[rank]):
            holders = {rank: offers[rank][region] for rank in ranks if region in offers[rank]}
            source, provided = _provided(holders, from_masters=region not in not_from_masters)
            nbytes = next(iter(holders.values())).nbytes
            sums = split_evenly(nbytes, len(holders))
            for own, rank in zip(sums, holders, strict=True):
                dealt[rank][region] = RegionShare(offset, source, tuple(provided[rank]), tuple(own))
            offset += -(-nbytes // _ALIGNMENT) * _ALIGNMENT if source != APART else 0
        for rank in ranks:
            shares[rank] = NodeShare(offset, ranks[0], dealt[rank])
    return shares


def split_evenly(nbytes: int, count: int) -> list[list[ByteRange]]:
    """`count` lists of one range, about equally long, cut at multiples of `CELL_BYTES`; [] where those are too few."""
    cells = -(-nbytes // CELL_BYTES)
    edges = [min(nbytes, index * cells // count * CELL_BYTES) for index in range(count)] + [nbytes]
    return [[ByteRange(start, stop)] if start < stop else [] for start, stop in pairwise(edges)]


def _provided(
    holders: Mapping[int, RegionOffer], *, from_masters: bool
) -> tuple[Provider, dict[int, list[ByteRange]]]:
    """A region's source, and the bytes that each of the node's `holders` provides, by rank."""
    first = next(iter(holders.values()))
    if from_masters and first.weights and (first.crc32 is not None or not first.in_file):
        provided: dict[int, list[ByteRange]] = {rank: [] for rank in holders}
        covered: tuple[ByteRange, ...] = ()
        for rank, offer in holders.items():
            provided[rank] = list(subtract(offer.masters, covered))
            covered = union(covered, offer.masters)
        if covered == union(first.weights):
            return MASTERS, provided
    if not first.in_file:
        return APART, {rank: [] for rank in holders}
    return FILE, dict(zip(holders, split_evenly(first.nbytes, len(holders)), strict=True))
