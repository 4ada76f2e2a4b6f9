"""Decides which rank of a node provides which bytes of the weights that all of them need whole. Pure.

A region is one storage of a module file, or weights that can only be cast from fp32 masters. The regions of a node lie
one after another in its image, the memory that its ranks share. `deal_regions` assigns to each rank a part to provide:
to be cast from its masters, where the node's ranks hold all of them and, for a storage of a file, a checksum can prove
that the cast gives the same bytes; to be read from the module file otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ...byte_ranges import ByteRange, subtract, union
from ...checksums import CELL_BYTES
from ...saved.tensor import StorageId

Provider = Literal["masters", "file", "apart"]
"""Where a region's bytes come from; ``apart``: each rank reads the weights by itself, and the image lacks them."""
MASTERS: Provider = "masters"
FILE: Provider = "file"
APART: Provider = "apart"

_ALIGNMENT = 4096
"""Regions begin at multiples of this in the image, in bytes."""


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
