"""Weights that every rank of a node needs whole: which, and which rank provides which bytes of them. Pure.

A region is one storage of a module file, or weights that only the fp32 masters tell. Its bytes come to a node once:
cast from the masters, where the ranks of the node hold all of them and, for a module file's storage, the checksum can
prove that the cast gives the same bytes; read from the module file otherwise. Either way each rank provides a part,
and all take the whole from memory that they share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..byte_ranges import ByteRange, subtract, union
from .joint import CELL_BYTES, StorageId

MASTERS, FILE, APART = "masters", "file", "apart"
"""Where a region comes from; ``apart``: each rank reads it for itself."""

_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class RegionOffer:
    """What one rank says of a region."""

    nbytes: int
    crc32: int | None
    """The storage's; None where the file keeps none, or the region is no storage."""
    in_file: bool
    """Whether it is a module file's storage, which the cast masters have to be proven equal to."""
    weights: tuple[ByteRange, ...]
    """Bytes that weights take; the others are zeros, where the masters tell the whole. Empty where they do not."""
    masters: tuple[ByteRange, ...]
    """Bytes that are this rank's to cast from masters that it restores."""


@dataclass(frozen=True, slots=True)
class RegionShare:
    """What one rank is to do for a region."""

    offset: int
    """Of the region in the node's image."""
    source: str
    """``masters``, ``file`` or ``apart``."""
    provide: tuple[ByteRange, ...]
    sums: tuple[ByteRange, ...]
    """Bytes to sum once all are there; together the node's ranks sum each once."""


@dataclass(frozen=True, slots=True)
class NodeShare:
    """What one rank is to do for its node's image."""

    image_bytes: int
    maker: int
    """The rank that makes the image."""
    regions: dict[StorageId, RegionShare]


def deal_regions(
    offers: Sequence[Mapping[StorageId, RegionOffer]],
    nodes: Sequence[int],
    *,
    not_from_masters: frozenset[StorageId] = frozenset(),
) -> list[NodeShare]:
    """Each rank's share, by rank. `offers` and `nodes` are by rank; `not_from_masters` are regions whose masters turned
    out to be another thing than their bytes."""
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
    """Ranges of about the same length for each of `count` ranks, cut where cells are; [] where there are too few."""
    cells = -(-nbytes // CELL_BYTES)
    edges = [min(nbytes, index * cells // count * CELL_BYTES) for index in range(count)] + [nbytes]
    return [[ByteRange(start, stop)] if start < stop else [] for start, stop in pairwise(edges)]


def _provided(
    holders: Mapping[int, RegionOffer], *, from_masters: bool
) -> tuple[str, dict[int, list[ByteRange]]]:
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
