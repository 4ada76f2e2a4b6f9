"""Brings the weights that every rank of a node needs whole to that node once, through memory that its ranks share.

`plan_weights` runs before the restore: rank 0's `_Dealer` assigns parts of them to ranks (`weight_regions`).
`share_weights` runs after it: each rank fills its parts of the image, all sum them, rank 0 compares the checksums, and
each rank copies the weights into its engine. Where cast masters turn out to be other bytes than the file's, those
regions are assigned and filled again, from the file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ...distributed.session import Session
from ..byte_ranges import ByteRange
from ..cache.homes import available_bytes
from ..check import Checked
from ..checkpoint import Checkpoint
from ..checksums import crc32, crc32_joined
from ..errors import AccessError, CorruptError, after_first_change
from ..saved.values import StorageRef
from ..stages import Stages
from ..targets.deepspeed.apply import cast_masters
from ..targets.deepspeed.weights import Region, find_regions, leave_out, offer_of, provide, read_apart, take
from .joint import StorageId
from .shared_memory import SPARE, SharedMemory
from .weight_regions import APART, FILE, MASTERS, NodeShare, RegionOffer, RegionShare, deal_regions

Json = Any
"""JSON types, as ranks send them to each other."""


@dataclass
class _Dealer:
    """On rank 0: what all ranks offered, and which regions cannot be cast from masters. Lists are by rank."""

    offers: list[dict[StorageId, RegionOffer]]
    nodes: list[int]
    available: list[int]
    """Bytes of memory that each rank's node has left."""
    refuted: set[StorageId] = field(default_factory=set)
    """Regions whose cast masters are other bytes than the file's."""

    def deal(self) -> list[Json]:
        """Each rank's share, by rank, for `_from_record`; a node without enough memory shares none."""
        shares = deal_regions(self.offers, self.nodes, not_from_masters=frozenset(self.refuted))
        fits = {share.maker: SPARE * share.image_bytes <= self.available[share.maker] for share in shares}
        some = any(
            region.source != APART and fits[share.maker]
            for share in shares
            for region in share.regions.values()
        )
        return [_to_record(share, apart=not fits[share.maker], some=some) for share in shares]

    def compare(self, sums: Sequence[Json], *, verify: bool) -> list[Json]:
        """All regions, so far, whose cast masters are other bytes than the file's.

        `sums` are by rank, as `_compare` makes them. Raises `CorruptError` where a region that was read from its file
        does not match its checksum; with `verify` False only masters are compared.
        """
        refuted: list[Json] = []
        parts: dict[tuple[StorageId, int, str], list[tuple[int, int, int]]] = {}
        for node, record in zip(self.nodes, sums, strict=True):
            for file, key, source, cells in record:
                parts.setdefault(((file, key), node, source), []).extend(map(tuple, cells))
        for (region, node, source), cells in parts.items():
            expected = next(own[region].crc32 for own in self.offers if region in own)
            got = crc32_joined((stop - start, value) for start, stop, value in sorted(cells))
            if expected is None or got == expected or (source == FILE and not verify):
                continue
            if source == FILE:
                raise CorruptError(
                    f"{region[0]}: storage {region[1]}, with the model's weights, has CRC-32 {got:08x} on node "
                    f"{node}; the file's directory says {expected:08x}. The file is damaged; fetch it again.",
                    path=region[0],
                )
            self.refuted.add(region)
        refuted += [list(region) for region in self.refuted]
        return refuted


@dataclass
class SharedWeights:
    """The regions that this rank's node shares, and this rank's part in them."""

    regions: dict[StorageId, Region]
    share: NodeShare
    dealer: list[_Dealer] = field(default_factory=list)
    """On rank 0 one, on the others none."""
    notes: list[str] = field(default_factory=list)
    """What the receipt is to say; filled by `share_weights`."""

    @property
    def reads(self) -> dict[StorageRef, tuple[ByteRange, ...]]:
        """The bytes of module files that this rank reads for its node."""
        found = {}
        for name, region in self.regions.items():
            share = self.share.regions[name]
            if share.source == FILE and region.storage is not None:
                found[region.storage] = share.provide
        return found


def plan_weights(
    checkpoint: Checkpoint, checked: Checked, session: Session, stages: Stages, *, verify: str
) -> SharedWeights | None:
    """Agrees on the weights that come to each node once, and takes them out of the engine's plan. Every rank must call.

    None on all ranks where there is nothing to share. So it is with ``verify="before"``, because weights that are cast
    from restored masters cannot be compared before those are restored: each rank reads the module's file itself.
    """
    plan = checked.prepared.engine
    with stages.stage("plan weights"):
        name_of = {index.path: index.name for index in checkpoint.indexes}
        found = (
            find_regions(plan, lambda path: name_of[path]) if plan is not None and verify != "before" else {}
        )
        offers = [
            [*name, asdict(offer_of(plan, region))] for name, region in found.items() if plan is not None
        ]
    record = {"node": session.topology.node_rank, "available": available_bytes(), "offers": offers}
    dealer: list[_Dealer] = []

    def deal(records: Sequence[Json]) -> list[Json]:
        dealer.append(
            _Dealer(
                [{(file, key): _to_offer(offer) for file, key, offer in one["offers"]} for one in records],
                [one["node"] for one in records],
                [one["available"] for one in records],
            )
        )
        return dealer[0].deal()

    share, some = _from_record(session.channel.deal("weights", record, deal))
    if not some:
        return None
    regions = {name: found[name] for name, one in share.regions.items() if one.source != APART}
    if plan is not None:
        leave_out(plan, regions)
    return SharedWeights(regions, share, dealer)


def share_weights(
    shared: SharedWeights | None,
    checkpoint: Checkpoint,
    checked: Checked,
    session: Session,
    stages: Stages,
    fetch: Callable[[Mapping[StorageRef, Sequence[ByteRange]]], None],
    *,
    verify: str,
) -> None:
    """Fills the weights of each rank's engine, once its masters are restored. Every rank must call.

    `shared` is what `plan_weights` returned. `fetch` makes ranges of storages available on this node; all ranks call it
    together. Where the ranks of some node cannot share memory, every rank of the job reads its weights itself.

    Raises `PartialRestoreError` on all ranks where the module's file is damaged.
    """
    if shared is None:
        return
    with after_first_change(checkpoint.name, ["all parts"]), contextlib.ExitStack() as leaving:
        image = _common_image(shared, session, stages, leaving)
        if image is None:
            fetch(
                {
                    region.storage: [ByteRange(0, region.nbytes)]
                    for region in shared.regions.values()
                    if region.storage is not None
                }
            )
            with stages.stage("weights"):
                if checked.prepared.engine is not None:
                    read_apart(checked.prepared.engine, shared.regions, checked.reader)
                    cast_masters(checked.prepared.engine, shared=True)
            shared.notes.append("each rank read the model's weights: its node's ranks cannot share memory")
            return
        refuted: set[StorageId] = set()
        todo = set(shared.regions)
        while True:
            _fill(shared, checked, image, todo, stages)
            failed = _compare(shared, image, todo, session, stages, verify=verify) - refuted
            if not failed:
                break
            refuted |= failed
            dealt = session.channel.deal("weights again", None, lambda _: shared.dealer[0].deal())
            shared.share, _ = _from_record(dealt)
            todo = failed & shared.regions.keys()
            fetch(shared.reads)
        with stages.stage("take weights"):
            if image.nbytes:
                memory = torch.frombuffer(image.memory, dtype=torch.uint8)
                for name, region in shared.regions.items():
                    take(region, shared.share.regions[name], memory)
                del memory
            if checked.prepared.engine is not None:
                cast_masters(checked.prepared.engine, shared=True)
        _note_sources(shared)


def _common_image(
    shared: SharedWeights, session: Session, stages: Stages, leaving: contextlib.ExitStack
) -> SharedMemory | None:
    """The image of this rank's node; None on all ranks of the job where any of them cannot open its own."""
    share, rank = shared.share, session.topology.rank
    nbytes = max(1, share.image_bytes)
    image: SharedMemory | None = None
    with stages.stage("share memory"), contextlib.suppress(AccessError):
        if share.maker == rank:
            image = leaving.enter_context(SharedMemory.make(nbytes))
    handles = session.channel.gather("shared memory", image.handle if image is not None else None)
    if share.maker != rank and handles[share.maker] is not None:
        with contextlib.suppress(OSError):
            image = leaving.enter_context(SharedMemory.open(handles[share.maker], nbytes))
    return image if session.channel.decide("memory is shared", image is not None, all) else None


def _fill(
    shared: SharedWeights, checked: Checked, image: SharedMemory, todo: set[StorageId], stages: Stages
) -> None:
    """Puts this rank's parts of the regions `todo` into the image."""
    with stages.stage("weights"):
        plan = checked.prepared.engine
        if plan is None or not todo:
            return
        # Not summed while it is read: all ranks of the node sum parts of the filled image.
        reader = checked.reader.unsummed()
        memory = torch.frombuffer(image.memory, dtype=torch.uint8)
        for name in todo:
            provide(plan, shared.regions[name], shared.share.regions[name], memory, reader)


def _compare(
    shared: SharedWeights,
    image: SharedMemory,
    todo: set[StorageId],
    session: Session,
    stages: Stages,
    *,
    verify: str,
) -> set[StorageId]:
    """Sums this rank's part of the regions `todo` in the image; all regions, so far, that masters must not provide."""
    sums: list[Json] = []
    with stages.stage("sum weights"):
        memory = memoryview(image.memory)
        for name in todo:
            share, region = shared.share.regions[name], shared.regions[name]
            if region.storage is not None and (verify != "off" or share.source == MASTERS):
                cells = [
                    [start, stop, crc32(memory[share.offset + start : share.offset + stop])]
                    for start, stop in share.sums
                ]
                sums.append([*name, share.source, cells])
        memory.release()

    def compare(records: Sequence[Json]) -> list[Json]:
        return shared.dealer[0].compare(records, verify=verify != "off")

    return {(file, key) for file, key in session.channel.decide("weights agree", sums, compare)}


def _note_sources(shared: SharedWeights) -> None:
    """Adds to the notes how many bytes came from where."""
    of = {
        source: sum(r.nbytes for n, r in shared.regions.items() if shared.share.regions[n].source == source)
        for source in (MASTERS, FILE)
    }
    if of[MASTERS]:
        shared.notes.append(
            f"{of[MASTERS]:,} bytes of weights were cast from the fp32 masters that each node's ranks hold, and not "
            "read; where a module file has them, its checksum proves them equal"
        )
    if of[FILE]:
        shared.notes.append(f"{of[FILE]:,} bytes of weights were read from the module's file once per node")


def _to_offer(record: dict[str, Any]) -> RegionOffer:
    spans = {key: _ranges(record[key]) for key in ("weights", "masters")}
    return RegionOffer(
        record["nbytes"], record["crc32"], record["in_file"], spans["weights"], spans["masters"]
    )


def _to_record(share: NodeShare, *, apart: bool, some: bool) -> Json:
    regions = [
        [*name, one.offset, APART if apart else one.source, one.provide, one.sums]
        for name, one in share.regions.items()
    ]
    return [0 if apart else share.image_bytes, share.maker, regions, some]


def _from_record(record: Json) -> tuple[NodeShare, bool]:
    image_bytes, maker, regions, some = record
    return NodeShare(
        image_bytes,
        maker,
        {
            (file, key): RegionShare(offset, source, _ranges(provide), _ranges(sums))
            for file, key, offset, source, provide, sums in regions
        },
    ), some


def _ranges(record: Json) -> tuple[ByteRange, ...]:
    return tuple(ByteRange(*one) for one in record)
