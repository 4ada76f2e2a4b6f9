"""Lets the ranks of a planned job agree as those of a load do: who reads, sums and fetches which bytes. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..byte_ranges import ByteRange, subtract, union
from ..fetch.plan import FetchPlan, FetchRequest, plan_fetch
from ..fetch.rounds import Parts, WantedRanges
from ..fetch.wanted import parts_of_restore
from ..options import Mode, Verify
from ..saved.copies import Copy, StorageReads, reads_of
from ..saved.tensor import StorageId, StorageRef
from ..targets.deepspeed.weight_regions import APART, FILE, LaidRegion, deal_regions, lay_regions
from ..verify.joint import JointCheck, StorageRead, split_reads
from .restores import Restore

NameAt = Callable[[str], str]
"""Gives the name, the same on all ranks, of the file at a local path."""


@dataclass
class RankReads:
    """What one rank wants of files, by their paths."""

    early: WantedRanges
    """Before anything is restored: of files that come in parts, indexes and early parts."""
    reads: dict[StorageRef, StorageReads]
    """For its restore, but for the weights that its node may share."""
    shareable: Mapping[str, Sequence[Copy]] = field(default_factory=dict)
    regions: Mapping[StorageId, LaidRegion] = field(default_factory=dict)
    """In which those weights lie together."""


def rank_reads(
    restore: Restore, early: WantedRanges, model: Mapping[str, object], name: str, name_at: NameAt
) -> RankReads:
    """What a rank wants that restores `restore`; `model` is the saved one, and messages call the checkpoint `name`."""
    regions = lay_regions(restore.whole_weights, model, name_at, f"weights of {name}")
    in_regions = {weight for region in regions.values() for weight in region.spans}
    apart = (copy for weight, low in restore.shareable.items() if weight not in in_regions for copy in low)
    return RankReads(
        early,
        reads_of([*restore.copies, *apart]),
        {weight: restore.shareable[weight] for weight in in_regions},
        regions,
    )


@dataclass(frozen=True)
class Dealt:
    """What all ranks do, by rank."""

    restores: list[Parts]
    """What each wants while it restores, by path."""
    images: list[int]
    """Bytes of the memory in which its node shares weights."""


def deal(
    ranks: Sequence[RankReads], nodes: Sequence[int], name_at: NameAt, *, verify: Verify, direct: bool
) -> Dealt:
    """What each rank wants while it restores; `nodes` are by rank.

    It is assumed that a node has the memory in which its ranks share weights, and that masters which are cast to
    weights give the bytes that the module's file has.
    """
    offers = [{key: region.offer for key, region in one.regions.items()} for one in ranks]
    shares = deal_regions(offers if verify != "before" else [{} for _ in ranks], nodes)
    reads: list[dict[StorageRef, StorageReads]] = []
    provided: list[dict[StorageRef, tuple[ByteRange, ...]]] = []
    for one, share in zip(ranks, shares, strict=True):
        own = {key: (share.regions[key].source if key in share.regions else APART) for key in one.regions}
        apart = [
            weight for key, source in own.items() if source == APART for weight in one.regions[key].spans
        ]
        more = reads_of(copy for weight in apart for copy in one.shareable[weight])
        reads.append(joined_reads(one.reads, more))
        provided.append(
            {
                region.storage: share.regions[key].provide
                for key, region in one.regions.items()
                if own[key] == FILE and region.storage is not None
            }
        )
    summed, alone = _sums(reads, nodes, name_at, verify=verify, direct=direct)
    return Dealt(
        [
            parts_of_restore(reads[rank], summed[rank], alone[rank], provided[rank], direct=direct)
            for rank in range(len(ranks))
        ],
        [share.image_bytes for share in shares],
    )


def joined_reads(
    one: Mapping[StorageRef, StorageReads], other: Mapping[StorageRef, StorageReads]
) -> dict[StorageRef, StorageReads]:
    """What `reads_of` gives for the copies of both together; the names are those of `one`."""
    found = dict(one)
    for storage, more in other.items():
        known = found.get(storage)
        if known is not None:
            # What both read is not direct: it would have to be fetched twice.
            direct = union(subtract(known.direct, more.ranges), subtract(more.direct, known.ranges))
            more = StorageReads(list(union(known.ranges, more.ranges)), known.names, list(direct))
        found[storage] = more
    return found


def _sums(
    reads: Sequence[Mapping[StorageRef, StorageReads]],
    nodes: Sequence[int],
    name_at: NameAt,
    *,
    verify: Verify,
    direct: bool,
) -> tuple[list[dict[StorageRef, Sequence[ByteRange]]], list[tuple[StorageRef, ...]]]:
    """By rank, what it sums of storages together with others, and the storages that it sums whole, as
    `verify.checks.deal_checks` deals them."""
    if verify == "off":
        return [{} for _ in reads], [() for _ in reads]
    split = [split_reads(one, world_size=len(reads), direct=direct) for one in reads]
    names = [{(name_at(storage.file), storage.key): storage for storage in together} for together, _ in split]
    asked: list[dict[StorageId, StorageRead]] = [
        {key: together[storage] for key, storage in own.items()}
        for own, (together, _) in zip(names, split, strict=True)
    ]
    shares = JointCheck(asked, nodes).shares()
    return (
        [
            {own[key]: ranges for key, ranges in share.items()}
            for own, share in zip(names, shares, strict=True)
        ],
        [alone for _, alone in split],
    )


def fetches(
    early: Sequence[WantedRanges],
    restores: Sequence[Parts],
    nodes: Sequence[int],
    name_at: NameAt,
    mode: Mode,
) -> list[FetchPlan]:
    """Each rank's fetch, by rank, of both rounds: of files by their names."""
    first = plan_fetch(
        [FetchRequest(node, _named(wanted, name_at)) for node, wanted in zip(nodes, early, strict=True)], mode
    )
    held: dict[int, dict[str, list[ByteRange]]] = {}
    for node, wanted in zip(nodes, early, strict=True):
        for name, ranges in _named(wanted, name_at).items():
            held.setdefault(node, {}).setdefault(name, []).extend(ranges)
    second = plan_fetch(
        [
            FetchRequest(
                node,
                _without(_named(parts.wanted, name_at), held.get(node, {})),
                _without(_named(parts.direct, name_at), held.get(node, {})),
            )
            for node, parts in zip(nodes, restores, strict=True)
        ],
        mode,
    )
    for one, more in zip(first, second, strict=True):
        for name, ranges in more.bring.items():
            one.bring.setdefault(name, []).extend(ranges)
        for rank, taken in more.take.items():
            for name, ranges in taken.items():
                one.take.setdefault(rank, {}).setdefault(name, []).extend(ranges)
        one.direct.update(more.direct)
        one.along.update(more.along)
        one.along_bytes.update(more.along_bytes)
    return first


def _named(wanted: WantedRanges, name_at: NameAt) -> dict[str, list[ByteRange]]:
    return {name_at(path): ranges for path, ranges in wanted.items()}


def _without(wanted: Mapping[str, list[ByteRange]], held: Mapping[str, list[ByteRange]]) -> WantedRanges:
    left = {name: list(subtract(ranges, held.get(name, ()))) for name, ranges in wanted.items()}
    return {name: ranges for name, ranges in left.items() if ranges}
