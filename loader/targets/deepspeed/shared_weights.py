"""Brings the weights that every rank of a node needs whole to that node once, through memory that its ranks share.

`plan_weights` runs before the restore: rank 0's `_Dealer` assigns parts of them to ranks (`weight_regions`).
`share_weights` runs after it: each rank fills its parts of the image, all sum them, rank 0 compares the checksums, and
each rank copies the weights into its engine. Where cast masters turn out to be other bytes than the file's, those
regions are assigned and filled again, from the file. Of a local file that is in the page cache, nothing is shared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ....distributed.session import Session
from ...byte_ranges import ByteRange
from ...cache.memory import available_bytes
from ...cache.page_cache import is_cached
from ...checksums import crc32, crc32_joined
from ...errors import AccessError, CorruptError, fetched_twice
from ...materialize.tensors import TensorReader
from ...options import Verify
from ...saved.copies import reads_of
from ...saved.tensor import StorageId, StorageRef
from ...stages import Stages
from ...wire import Json, decode, encode
from ..base import NoteChange, Plan
from .shared_memory import SPARE, SharedMemory
from .step import EngineStep
from .weight_regions import (
    APART,
    FILE,
    MASTERS,
    NodeShare,
    Provider,
    RegionOffer,
    RegionShare,
    deal_regions,
)
from .weights import Region, find_regions, low_copies, provide, read_apart, take


@dataclass(frozen=True)
class Sharing:
    """What the sharing of weights works with."""

    session: Session
    stages: Stages
    reader: TensorReader
    name: str
    """What messages call the checkpoint."""
    verify: Verify
    name_of: Callable[[str], str]
    """The name, the same on all ranks, of the file at a local path."""
    note_change: NoteChange
    """As in `Work`."""
    from_store: bool = False
    """Whether the files are from a store, so that what is damaged can be fetched again."""


@dataclass(frozen=True)
class _Offers:
    """What one rank tells of its node, and can provide of each region."""

    node: int
    available: int
    """Bytes of memory that the node has left."""
    regions: dict[StorageId, RegionOffer]


@dataclass(frozen=True)
class _Task:
    """What one rank is to do; and whether any rank shares any region."""

    share: NodeShare
    some: bool


@dataclass(frozen=True)
class _Sums:
    """The CRC-32s of one rank's part of a region in its node's image."""

    source: Provider
    cells: tuple[tuple[int, int, int], ...]
    """First byte, the byte after the last one, and the sum of each cell."""


@dataclass(frozen=True)
class _Compared:
    """What the image's sums show."""

    refuted: frozenset[StorageId]
    damaged: Mapping[StorageId, str]


@dataclass
class _Dealer:
    """On rank 0: what all ranks offered, by rank, and which regions cannot be cast from masters."""

    offers: Sequence[_Offers]
    refuted: set[StorageId] = field(default_factory=set)
    """Regions whose cast masters are other bytes than the file's."""
    damaged: dict[StorageId, str] = field(default_factory=dict)
    """Regions that were read from their files and did not match, each with what was wrong."""

    def deal(self) -> list[_Task]:
        """Each rank's task, by rank; a node without enough memory shares nothing."""
        shares = deal_regions(
            [one.regions for one in self.offers],
            [one.node for one in self.offers],
            not_from_masters=frozenset(self.refuted),
        )
        shares = [
            share if SPARE * share.image_bytes <= self.offers[share.maker].available else _apart(share)
            for share in shares
        ]
        some = any(region.source != APART for share in shares for region in share.regions.values())
        return [_Task(share, some) for share in shares]

    def compare(
        self, sums: Sequence[Mapping[StorageId, _Sums]], *, verify: bool, from_store: bool
    ) -> _Compared:
        """All regions, so far, whose cast masters are other bytes than the file's, and those that came damaged this
        time; `sums` are by rank.

        Raises `CorruptError` where a region that was read from its file does not match its checksum, unless it is
        `from_store` and did so for the first time; with `verify` False only masters are compared.
        """
        damaged: dict[StorageId, str] = {}
        parts: dict[tuple[StorageId, int, Provider], list[tuple[int, int, int]]] = {}
        for offer, own in zip(self.offers, sums, strict=True):
            for region, one in own.items():
                parts.setdefault((region, offer.node, one.source), []).extend(one.cells)
        for (region, node, source), cells in parts.items():
            expected = next(one.regions[region].crc32 for one in self.offers if region in one.regions)
            got = crc32_joined((stop - start, value) for start, stop, value in sorted(cells))
            if expected is None or got == expected or (source == FILE and not verify):
                continue
            if source == FILE:
                error = CorruptError(
                    f"{region[0]}: storage {region[1]}, with the model's weights, has CRC-32 {got:08x} on node "
                    f"{node}; the file's directory says {expected:08x}. The file is damaged; take another copy of it.",
                    path=region[0],
                )
                if region in self.damaged:
                    raise fetched_twice(error)
                if not from_store:
                    raise error
                damaged[region] = error.message.removeprefix(f"{region[0]}: ")
                continue
            self.refuted.add(region)
        self.damaged |= damaged
        return _Compared(frozenset(self.refuted), damaged)


def _apart(share: NodeShare) -> NodeShare:
    """`share` on a node whose ranks each read the weights themselves."""
    regions = {name: replace(region, source=APART) for name, region in share.regions.items()}
    return NodeShare(0, share.maker, regions)


@dataclass(frozen=True)
class SharedWeights:
    """The regions that this rank's node shares, and this rank's part in them."""

    step: EngineStep | None
    """This rank's, which leaves the weights of ``regions`` out; None on a rank without an engine."""
    regions: Mapping[StorageId, Region]
    share: NodeShare
    dealer: _Dealer | None
    """On rank 0 alone."""

    @property
    def reads(self) -> dict[StorageRef, tuple[ByteRange, ...]]:
        """The bytes of module files that this rank reads for its node."""
        found = {}
        for name, region in self.regions.items():
            share = self.share.regions[name]
            if share.source == FILE and region.storage is not None:
                found[region.storage] = share.provide
        return found

    def deal_again(self, session: Session) -> SharedWeights:
        """The same, once regions were refuted: those are read from the file. Every rank must call."""
        dealer = self.dealer
        dealt = session.channel.deal("weights again", None, lambda _: _deal(dealer))
        return replace(self, share=decode(_Task, dealt).share)


def _is_near(storage: StorageRef) -> bool:
    """Whether the node's page cache has a storage of a local file: every rank reads it from there as fast."""
    return is_cached(storage.file, storage.offset, storage.offset + storage.nbytes)


def _deal(dealer: _Dealer | None) -> list[Json]:
    return [encode(task) for task in dealer.deal()] if dealer is not None else []


def plan_weights(plan: Plan, sharing: Sharing) -> tuple[Plan, SharedWeights | None]:
    """Agrees on the weights that come to each node once; gives the plan without them. Every rank must call.

    None on all ranks where there is nothing to share. So it is with ``verify="before"``, because weights that are cast
    from restored masters cannot be compared before those are restored: each rank reads the module's file itself.
    """
    session = sharing.session
    step = next((one for one in plan.steps if isinstance(one, EngineStep)), None)
    with sharing.stages.announced("plan weights"):
        found: dict[StorageId, Region] = {}
        offers: dict[StorageId, RegionOffer] = {}
        if step is not None and sharing.verify != "before":
            is_apart = (lambda storage: False) if sharing.from_store else _is_near
            found = find_regions(step, sharing.name_of, is_apart)
            offers = {name: region.laid.offer for name, region in found.items()}
    dealer: _Dealer | None = None

    def deal(records: Sequence[Json]) -> list[Json]:
        nonlocal dealer
        dealer = _Dealer([decode(_Offers, one) for one in records])
        return _deal(dealer)

    own = _Offers(session.topology.node_rank, available_bytes(), offers)
    task = decode(_Task, session.channel.deal("weights", encode(own), deal))
    if not task.some:
        return plan, None
    regions = {name: found[name] for name, one in task.share.regions.items() if one.source != APART}
    if step is None:
        return plan, SharedWeights(None, regions, task.share, dealer)
    names = frozenset(weight.name for region in regions.values() for weight in region.weights)
    without = replace(step, shared=names)
    steps = tuple(without if one is step else one for one in plan.steps)
    return replace(plan, steps=steps), SharedWeights(without, regions, task.share, dealer)


def share_weights(
    shared: SharedWeights | None,
    sharing: Sharing,
    fetch: Callable[[Mapping[StorageRef, Sequence[ByteRange]]], None],
) -> list[str]:
    """Fills the weights of each rank's engine, once its masters are restored; returns notes for the receipt.

    Every rank must call. `shared` is what `plan_weights` returned. `fetch` makes ranges of storages available on this
    node; all ranks call it together. Where the ranks of some node cannot share memory, every rank of the job reads its
    weights itself.

    Regions that came damaged are fetched once more, where they are from a store. Raises `CorruptError` on all ranks
    where the module's file is damaged still.
    """
    if shared is None:
        return []
    with contextlib.ExitStack() as leaving:
        image = _common_image(shared.share, sharing, leaving)
        if image is None:
            _read_apart(shared, sharing, fetch)
            return ["each rank read the model's weights: its node's ranks cannot share memory"]
        refuted: frozenset[StorageId] = frozenset()
        todo: Collection[StorageId] = shared.regions.keys()
        while True:
            _fill(shared, sharing, image, todo)
            found = _compare(shared, sharing, image, todo)
            failed = found.refuted - refuted
            if not failed and not found.damaged:
                break
            refuted |= failed
            _fetch_again(shared, sharing, found.damaged)
            if failed:
                shared = shared.deal_again(sharing.session)
                fetch(shared.reads)
            todo = (failed | found.damaged.keys()) & shared.regions.keys()
        _take(shared, sharing, image)
        return _sources(shared)


def _common_image(share: NodeShare, sharing: Sharing, leaving: contextlib.ExitStack) -> SharedMemory | None:
    """The image of this rank's node; None on all ranks of the job where any of them cannot open its own."""
    rank, channel = sharing.session.topology.rank, sharing.session.channel
    nbytes = max(1, share.image_bytes)
    image: SharedMemory | None = None
    with sharing.stages.announced("share memory"), contextlib.suppress(AccessError):
        if share.maker == rank:
            image = leaving.enter_context(SharedMemory.make(nbytes))
    handles = channel.gather("shared memory", image.handle if image is not None else None)
    if share.maker != rank and handles[share.maker] is not None:
        with contextlib.suppress(OSError):
            image = leaving.enter_context(SharedMemory.open(handles[share.maker], nbytes))
    return image if channel.decide("memory is shared", image is not None, all) else None


def _read_apart(
    shared: SharedWeights,
    sharing: Sharing,
    fetch: Callable[[Mapping[StorageRef, Sequence[ByteRange]]], None],
) -> None:
    wanted = {
        region.storage: [ByteRange(0, region.storage.nbytes)]
        for region in shared.regions.values()
        if region.storage is not None
    }
    if shared.step is not None:
        # Weights that no module's file has are cast from masters, of which other ranks' parts were not read yet.
        for storage, reads in reads_of(low_copies(shared.step)).items():
            wanted.setdefault(storage, []).extend(reads.ranges)
    fetch(wanted)
    with sharing.stages.stage("weights"):
        if shared.step is not None:
            read_apart(shared.step, sharing.reader, sharing.note_change)
            shared.step.cast_masters(shared.step.shared, sharing.note_change)


def _fill(shared: SharedWeights, sharing: Sharing, image: SharedMemory, todo: Collection[StorageId]) -> None:
    """Puts this rank's parts of the regions `todo` into the image."""
    with sharing.stages.stage("weights"):
        if shared.step is None or not todo:
            return
        # Not summed while it is read: all ranks of the node sum parts of the filled image.
        reader = sharing.reader.unsummed()
        memory = torch.frombuffer(image.memory, dtype=torch.uint8)
        regions = [(shared.regions[name], shared.share.regions[name]) for name in todo]
        provide(shared.step, regions, memory, reader)


def _fetch_again(shared: SharedWeights, sharing: Sharing, damaged: Mapping[StorageId, str]) -> None:
    """Fetches the storages of `damaged` regions once more on this node."""
    with sharing.stages.stage("fetch weights again"):
        for name, why in damaged.items():
            region = shared.regions.get(name)
            if region is not None and region.storage is not None:
                sharing.reader.fetch_again(region.storage, why, None)


def _compare(
    shared: SharedWeights, sharing: Sharing, image: SharedMemory, todo: Collection[StorageId]
) -> _Compared:
    """Sums this rank's part of the regions `todo` in the image; what all ranks' sums show."""
    verify = sharing.verify != "off"
    sums: dict[StorageId, _Sums] = {}
    with sharing.stages.announced("sum weights"):
        memory = memoryview(image.memory)
        for name in todo:
            share = shared.share.regions[name]
            if shared.regions[name].storage is not None and (verify or share.source == MASTERS):
                sums[name] = _Sums(share.source, tuple(_cells(share, memory)))
        memory.release()
    dealer = shared.dealer

    def compare(records: Sequence[Json]) -> Json:
        decoded = [decode(dict[StorageId, _Sums], one) for one in records]
        if dealer is None:
            return encode(_Compared(frozenset(), {}))
        return encode(dealer.compare(decoded, verify=verify, from_store=sharing.from_store))

    found = sharing.session.channel.decide("weights agree", encode(sums), compare)
    return decode(_Compared, found)


def _cells(share: RegionShare, memory: memoryview) -> list[tuple[int, int, int]]:
    return [
        (start, stop, crc32(memory[share.offset + start : share.offset + stop])) for start, stop in share.sums
    ]


def _take(shared: SharedWeights, sharing: Sharing, image: SharedMemory) -> None:
    """Copies the weights from the image into this rank's engine."""
    with sharing.stages.stage("take weights"):
        memory = torch.frombuffer(image.memory, dtype=torch.uint8)
        for name, region in shared.regions.items():
            sharing.note_change("model")
            take(region, shared.share.regions[name], memory)
        if shared.step is not None:
            shared.step.cast_masters(shared.step.shared, sharing.note_change)


def _sources(shared: SharedWeights) -> list[str]:
    """How many bytes came from where."""
    of = {
        source: sum(
            region.nbytes
            for name, region in shared.regions.items()
            if shared.share.regions[name].source == source
        )
        for source in (MASTERS, FILE)
    }
    notes = []
    if of[MASTERS]:
        notes.append(
            f"{of[MASTERS]:,} bytes of weights were cast from the fp32 masters that each node's ranks hold, and not "
            "read; where a module file has them, its checksum proves them equal"
        )
    if of[FILE]:
        notes.append(f"{of[FILE]:,} bytes of weights were read from the module's file once per node")
    return notes
