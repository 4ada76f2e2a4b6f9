"""Fills the weights that a DeepSpeed engine of stages 0 to 2 keeps whole on every rank from one copy in each node.

A region is a run of bytes in the node's shared memory (the "image"). The ranks of a node each provide a part of it,
cast from their masters or read (`provide`), and each takes the whole from there (`take`). `weight_regions` deals out
the parts and `shared_weights` runs this; here is what is done to the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from ...byte_ranges import ByteRange, union
from ...errors import InternalError
from ...materialize.tensors import TensorReader
from ...saved.contents import Saved
from ...saved.copies import Copy
from ...saved.model_parallel import EXPERTS
from ...saved.strided import Layout
from ...saved.tensor import SavedTensor, StorageId, StorageRef
from ..dtensor import dtype_name
from .live import LiveEngine, flat_view, memory_of
from .step import EngineStep
from .weight_regions import MASTERS, RegionOffer, RegionShare

MIN_REGION_BYTES = 1 << 20
"""Weights of smaller regions are read by every rank itself."""

_ALIGNMENT = 64
"""Where only masters give the weights, each begins at a multiple of this in its region, in bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A parameter's weights, and where they lie in a region."""

    name: str
    destination: torch.Tensor
    """One-dimensional: the whole parameter that this rank computes with."""
    start: int
    """Its first byte in the region."""

    @property
    def span(self) -> ByteRange:
        """Its bytes in the region."""
        return ByteRange(self.start, self.start + self.destination.numel() * self.destination.element_size())


@dataclass(frozen=True)
class Region:
    """Weights that lie together in the node's image: a storage of the module's file, or all that only masters give."""

    nbytes: int
    storage: StorageRef | None
    """The module file's storage; None where only the masters give the weights."""
    complete: bool
    """Whether ``weights`` are all that the storage holds, except padding."""
    weights: tuple[Weight, ...]


def find_regions(step: EngineStep, name_of: Callable[[str], str]) -> dict[StorageId, Region]:
    """The regions of `step` of at least `MIN_REGION_BYTES`, by names that are the same on all ranks with this part of
    the model; {} at stage 3, at stage 0 in fp32, and for a single file.

    `name_of(path)` is the name, the same on all ranks, of the file at a local path.
    """
    live, saved = step.live, step.saved
    if saved.data_parallel_size is None or live.kind not in ("zero", "bf16", "unfused"):
        return {}
    in_storage: dict[StorageRef, list[Weight]] = {}
    by_masters: dict[str, list[Weight]] = {}
    for name, part in step.model.parameters.items():
        if part.source is None or not part.source.numel:
            continue
        destination = live.low[name][0].flat
        dtype = dtype_name(destination.dtype)
        piece = part.source.whole
        if part.low_is_master:
            # Experts of one name are different ones on different ranks.
            if EXPERTS not in name:
                others = by_masters.setdefault(dtype, [])
                others.append(Weight(name, destination, _aligned_end(others)))
            continue
        if piece is None or not isinstance(piece.storage, StorageRef):
            continue
        if part.source.dtype == dtype and part.source.is_contiguous:
            start = piece.offset * part.source.itemsize
            in_storage.setdefault(piece.storage, []).append(Weight(name, destination, start))
    found: dict[StorageId, Region] = {}
    beside = _tensors_in(saved, in_storage.keys())
    for storage, weights in in_storage.items():
        complete = _holds_all(weights, beside[storage])
        found[name_of(storage.file), storage.key] = Region(storage.nbytes, storage, complete, tuple(weights))
    for dtype, weights in by_masters.items():
        region_name = (f"weights of {saved.name}, part {live.position.part}", dtype)
        found[region_name] = Region(_aligned_end(weights), None, True, tuple(weights))
    return {name: region for name, region in found.items() if region.nbytes >= MIN_REGION_BYTES}


def _aligned_end(weights: Sequence[Weight]) -> int:
    """Where the next weight begins in a region that only masters give."""
    return -(-weights[-1].span[1] // _ALIGNMENT) * _ALIGNMENT if weights else 0


def _tensors_in(saved: Saved, storages: Collection[StorageRef]) -> dict[StorageRef, list[SavedTensor]]:
    """The tensors of the module's file that lie in each of `storages`."""
    found: dict[StorageRef, list[SavedTensor]] = {storage: [] for storage in storages}
    for value in saved.whole.state["model"].values():
        piece = value.whole if isinstance(value, SavedTensor) and value.numel else None
        if piece is not None and isinstance(piece.storage, StorageRef) and piece.storage in found:
            found[piece.storage].append(value)
    return found


def _holds_all(weights: Sequence[Weight], tensors: Iterable[SavedTensor]) -> bool:
    """Whether `tensors`, which lie in the storage of `weights`, have no byte outside of them."""
    spans = union([weight.span for weight in weights])
    for tensor in tensors:
        first = tensor.whole.offset * tensor.itemsize if tensor.whole is not None else 0
        if not tensor.is_contiguous or not any(
            start <= first and first + tensor.nbytes <= stop for start, stop in spans
        ):
            return False
    return True


def offer_of(step: EngineStep, region: Region) -> RegionOffer:
    """The bytes of `region` that this rank's masters can be cast to, and the facts about it, for all ranks to see."""
    cast: list[ByteRange] = []
    for weight in region.weights:
        if step.model.parameters[weight.name].from_saved_masters:
            for _, slot in step.live.slots_of.get(weight.name, ()):
                size = weight.destination.element_size()
                first = weight.start + slot.run.start * size
                cast.append(ByteRange(first, first + slot.run.length * size))
    spans = union([weight.span for weight in region.weights]) if region.complete else ()
    crc = region.storage.crc32 if region.storage is not None else None
    return RegionOffer(region.nbytes, crc, region.storage is not None, spans, union(cast))


def provide(
    step: EngineStep, region: Region, share: RegionShare, image: torch.Tensor, reader: TensorReader
) -> None:
    """Puts this rank's part of `region` into the node's `image` (uint8): cast from its masters, or read.

    The masters must have been restored. Raises `CorruptError` where bytes are missing; what was read is compared with
    its checksum by `shared_weights`.
    """
    memory = image[share.offset : share.offset + region.nbytes]
    if share.source == MASTERS:
        with torch.no_grad():
            for weight in region.weights:
                _cast_from_masters(step.live, weight, share, memory)
        return
    if region.storage is None:
        raise InternalError("a region that is in no file can only come from masters")
    name = f"model/{region.weights[0].name}"
    into = memory_of("image", memory)
    copies = [
        Copy(name, region.storage, "uint8", bytes_there, into, bytes_there)
        for bytes_there in (Layout((stop - start,), (1,), start) for start, stop in share.provide)
    ]
    reader.copy(copies, {"image": memory})


def _cast_from_masters(live: LiveEngine, weight: Weight, share: RegionShare, memory: torch.Tensor) -> None:
    size = weight.destination.element_size()
    low = memory[weight.span[0] : weight.span[1]].view(weight.destination.dtype)
    for index, slot in live.slots_of.get(weight.name, ()):
        master = flat_view(live.flats[index].master)
        first = weight.start + slot.run.start * size
        last = first + slot.run.length * size
        for start, stop in share.provide:
            begin, end = (max(start, first) - first) // size, (min(stop, last) - first) // size
            if begin < end:
                low[slot.run.start + begin : slot.run.start + end].copy_(
                    master[slot.start + begin : slot.start + end]
                )


def take(region: Region, share: RegionShare, image: torch.Tensor) -> None:
    """Copies the region's weights from the node's `image` into the engine. All ranks must have provided their parts."""
    with torch.no_grad():
        for weight in region.weights:
            start, stop = (share.offset + edge for edge in weight.span)
            weight.destination.copy_(image[start:stop].view(weight.destination.dtype))


def low_copies(step: EngineStep) -> list[Copy]:
    """The copies that fill the shared weights of `step` where no memory is shared."""
    return [copy for name in sorted(step.shared) for copy in step.model.parameters[name].low]


def read_apart(step: EngineStep, reader: TensorReader) -> None:
    """Reads the shared weights of `step` for this rank alone, where its node's ranks cannot share memory."""
    reader.copy(low_copies(step), step.memories())
