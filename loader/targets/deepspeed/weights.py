"""Fills the weights that a DeepSpeed engine of stages 0 to 2 keeps whole on every rank from one copy in each node.

A region is a run of bytes in the node's shared memory (the "image"). The ranks of a node each provide a part of it,
cast from their masters or read (`provide`), and each takes the whole from there (`take`). ``verify.weight_regions``
deals out the parts and ``verify.weights`` runs this; here is what is done to the tensors. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ...byte_ranges import ByteRange, union
from ...materialize.tensors import CopyRequest, TensorReader
from ...saved.intervals import Piece, Place
from ...saved.values import LazyTensor, StorageRef
from ...sources.zero.model_states import EXPERTS
from ...sources.zero.optim_states import MASTER
from ...verify.joint import StorageId
from ...verify.weight_regions import MASTERS, RegionOffer, RegionShare
from ..module import dtype_name
from .plan import EnginePlan, Saved, fills_of
from .target import flat_view

MIN_REGION_BYTES = 1 << 20
"""Weights of smaller regions are read by every rank itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A parameter's weights, and where they lie in a region."""

    name: str
    destination: torch.Tensor
    """One-dimensional: the whole parameter that this rank computes with."""
    source: Saved
    start: int
    """Its first byte in the region."""

    @property
    def span(self) -> ByteRange:
        """Its bytes in the region."""
        return ByteRange(self.start, self.start + self.destination.numel() * self.destination.element_size())


@dataclass
class Region:
    """Weights that lie together in the node's image: a storage of the module's file, or all that only masters give."""

    nbytes: int
    storage: StorageRef | None
    """The module file's storage; None where only the masters give the weights."""
    complete: bool
    """Whether ``weights`` are all that the storage holds, except padding."""
    weights: list[Weight] = field(default_factory=list)


def find_regions(plan: EnginePlan, name_of: Callable[[str], str]) -> dict[StorageId, Region]:
    """The regions of `plan` of at least `MIN_REGION_BYTES`, by names that are the same on all ranks; {} at stage 3, at
    stage 0 in fp32, and for a single file.

    `name_of(path)` is the name, the same on all ranks, of the file at a local path.
    """
    if plan.zero is None or plan.target.kind not in ("zero", "bf16", "unfused"):
        return {}
    found: dict[StorageId, Region] = {}
    by_masters = f"weights of {plan.zero.model_of(0).file}"
    for name, source in plan.whole.items():
        destination = plan.target.low[name][0].flat
        if not destination.numel():
            continue
        if isinstance(source, LazyTensor):
            if source.dtype != dtype_name(destination.dtype) or not source.is_contiguous:
                continue
            storage = source.storage
            region = found.setdefault(
                (name_of(storage.file), storage.key), Region(storage.nbytes, storage, complete=True)
            )
            region.weights.append(Weight(name, destination, source, source.storage_offset * source.itemsize))
        elif source.kind == MASTER and EXPERTS not in name:
            # Experts of one name are different ones on different ranks.
            region = found.setdefault(
                (by_masters, dtype_name(destination.dtype)), Region(0, None, complete=True)
            )
            weight = Weight(name, destination, source, region.nbytes)
            region.weights.append(weight)
            region.nbytes = -(-weight.span[1] // 64) * 64
    for region in found.values():
        if region.storage is not None:
            _set_complete(plan, region)
    return {name: region for name, region in found.items() if region.nbytes >= MIN_REGION_BYTES}


def _set_complete(plan: EnginePlan, region: Region) -> None:
    """Clears ``complete`` where some tensor of the module file lies in the storage and not in the region's weights."""
    spans = union([weight.span for weight in region.weights])
    module = plan.zero.model_of(plan.target.rank).module if plan.zero is not None else {}
    for value in module.values():
        if isinstance(value, LazyTensor) and value.storage == region.storage and value.numel:
            first = value.storage_offset * value.itemsize
            inside = any(start <= first and first + value.nbytes <= stop for start, stop in spans)
            region.complete &= value.is_contiguous and inside


def offer_of(plan: EnginePlan, region: Region) -> RegionOffer:
    """The bytes of `region` that this rank's masters can be cast to, and the facts about it, for all ranks to see."""
    cast: list[ByteRange] = []
    for weight in region.weights:
        if weight.name in plan.filled_masters:
            for _, slot in plan.target.slots_of.get(weight.name, ()):
                size = weight.destination.element_size()
                first = weight.start + slot.param_start * size
                cast.append(ByteRange(first, first + slot.length * size))
    spans = union([weight.span for weight in region.weights]) if region.complete else ()
    crc = region.storage.crc32 if region.storage is not None else None
    return RegionOffer(region.nbytes, crc, region.storage is not None, spans, union(cast))


def leave_out(plan: EnginePlan, regions: Mapping[StorageId, Region]) -> None:
    """Moves the regions' weights from ``plan.low``, which this rank reads itself, to ``plan.shared``."""
    plan.shared = {weight.name for region in regions.values() for weight in region.weights}
    names = {f"model/{name}" for name in plan.shared}
    plan.low = [(destination, fill) for destination, fill in plan.low if fill.name not in names]


def provide(
    plan: EnginePlan, region: Region, share: RegionShare, image: torch.Tensor, reader: TensorReader
) -> None:
    """Puts this rank's part of `region` into the node's `image` (uint8): cast from its masters, or read.

    The masters must have been restored. Raises `CorruptError` where bytes are missing; what was read is compared with
    its checksum by ``verify.weights``.
    """
    memory = image[share.offset : share.offset + region.nbytes]
    if share.source == MASTERS:
        with torch.no_grad():
            for weight in region.weights:
                _cast_from_masters(plan, weight, share, memory)
        return
    storage = region.storage
    if storage is None:
        raise ValueError("a region that is in no file can only come from masters")
    whole = LazyTensor(storage, "uint8", (storage.nbytes,), (1,))
    reader.copy(
        [
            CopyRequest(whole, memory[start:stop], region.weights[0].name, start, stop - start)
            for start, stop in share.provide
        ]
    )


def _cast_from_masters(plan: EnginePlan, weight: Weight, share: RegionShare, memory: torch.Tensor) -> None:
    size = weight.destination.element_size()
    low = memory[weight.span[0] : weight.span[1]].view(weight.destination.dtype)
    for index, slot in plan.target.slots_of.get(weight.name, ()):
        master = flat_view(plan.target.flats[index].master)
        first = weight.start + slot.param_start * size
        last = first + slot.length * size
        for start, stop in share.provide:
            begin, end = (max(start, first) - first) // size, (min(stop, last) - first) // size
            if begin < end:
                low[slot.param_start + begin : slot.param_start + end].copy_(
                    master[slot.start + begin : slot.start + end]
                )


def take(region: Region, share: RegionShare, image: torch.Tensor) -> None:
    """Copies the region's weights from the node's `image` into the engine. All ranks must have provided their parts."""
    with torch.no_grad():
        for weight in region.weights:
            start, stop = (share.offset + edge for edge in weight.span)
            weight.destination.copy_(image[start:stop].view(weight.destination.dtype))


def read_apart(plan: EnginePlan, regions: Mapping[StorageId, Region], reader: TensorReader) -> None:
    """Reads the regions' weights for this rank alone, where its node's ranks cannot share memory."""
    requests = []
    for region in regions.values():
        for weight in region.weights:
            slot = Piece(Place(0, 0), 0, 0, weight.destination.numel())
            for fill in fills_of(plan, f"model/{weight.name}", weight.source, [slot]):
                part = weight.destination[fill.target_start : fill.target_start + fill.length]
                requests.append(CopyRequest(fill.source, part, fill.name, fill.source_start, fill.length))
    reader.copy(requests)
