"""Fills the weights that a DeepSpeed engine of stages 0 to 2 keeps whole on every rank from one copy in each node.

A region is a run of bytes in the node's shared memory (the "image"). The ranks of a node each provide a part of it,
cast from their masters or read (`provide`), and each takes the whole from there (`take`). `weight_regions` deals out
the parts and `shared_weights` runs this; here is what is done to the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ...byte_ranges import ByteRange
from ...errors import InternalError
from ...materialize.tensors import TensorReader
from ...ranges.destinations import FirstWrite
from ...saved.copies import Copy
from ...saved.strided import Layout
from ...saved.tensor import SavedTensor, StorageId, StorageRef
from ..base import NoteChange
from ..dtensor import dtype_name
from .live import LiveEngine, flat_view, memory_of
from .step import EngineStep
from .weight_regions import MASTERS, LaidRegion, RegionShare, WholeWeight, in_small_storage, lay_regions


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
    """A region, and the tensors of this rank's engine that its weights go to."""

    laid: LaidRegion
    weights: tuple[Weight, ...]

    @property
    def nbytes(self) -> int:
        return self.laid.nbytes

    @property
    def storage(self) -> StorageRef | None:
        """The module file's storage; None where only the masters give the weights."""
        return self.laid.storage


def find_regions(
    step: EngineStep, name_of: Callable[[str], str], is_apart: Callable[[StorageRef], bool]
) -> dict[StorageId, Region]:
    """The regions of `step`, by names that are the same on all ranks with this part of the model; {} at stage 3, at
    stage 0 in fp32, and for a single file.

    `name_of(path)` is the name, the same on all ranks, of the file at a local path. `is_apart` says of a storage
    whether this rank reads it by itself: it has no region then.
    """
    live, saved = step.live, step.saved
    if saved.data_parallel_size is None or live.kind not in ("zero", "bf16", "unfused"):
        return {}
    apart = _Apart(is_apart)
    weights = (
        WholeWeight(
            name,
            part.low,
            dtype_name(live.low[name][0].flat.dtype),
            part.low_is_master,
            tuple(slot.run for _, slot in live.slots_of.get(name, ())) if part.from_saved_masters else (),
        )
        for name, part in step.model.parameters.items()
        if part.low is not None
        and (part.low_is_master or not (in_small_storage(part.low) or apart.has(part.low)))
        and live.low[name][0].flat.dim() == 1
    )
    by_masters = f"weights of {saved.name}, part {live.position.part}"
    laid = lay_regions(weights, saved.whole.state["model"], name_of, by_masters)
    return {
        region_id: Region(
            one,
            tuple(Weight(name, live.low[name][0].elements, span.start) for name, span in one.spans.items()),
        )
        for region_id, one in laid.items()
    }


class _Apart:
    """Asks once of each storage whether it `is_apart`: the tensors in it mostly have one object for it."""

    def __init__(self, is_apart: Callable[[StorageRef], bool]) -> None:
        self._is_apart = is_apart
        self._found: dict[int, tuple[StorageRef, bool]] = {}

    def has(self, source: SavedTensor) -> bool:
        row = source.row
        if row is None:
            return False
        storage, _ = row
        found = self._found.get(id(storage))
        if found is None:
            found = self._found[id(storage)] = storage, self._is_apart(storage)
        return found[1]


def provide(
    step: EngineStep,
    regions: Sequence[tuple[Region, RegionShare]],
    image: torch.Tensor,
    reader: TensorReader,
) -> None:
    """Puts this rank's parts of `regions` into the node's `image` (uint8): cast from its masters, or read, all at once.

    The masters must have been restored. Raises `CorruptError` where bytes are missing; what was read is compared with
    its checksum by `shared_weights`.
    """
    copies: list[Copy] = []
    memories: dict[str, torch.Tensor] = {}
    for number, (region, share) in enumerate(regions):
        memory = image[share.offset : share.offset + region.nbytes]
        if share.source == MASTERS:
            with torch.no_grad():
                for weight in region.weights:
                    _cast_from_masters(step.live, weight, share, memory)
            continue
        if region.storage is None:
            raise InternalError("a region that is in no file can only come from masters")
        key, name = f"image {number}", f"model/{region.weights[0].name}"
        into = memory_of(key, memory)
        memories[key] = memory
        for start, stop in share.provide:
            bytes_there = Layout((stop - start,), (1,), start)
            copies.append(Copy(name, region.storage, "uint8", bytes_there, into, bytes_there))
    if copies:
        reader.copy(copies, memories)


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
    return list(step.model.low_of(step.live, step.shared))


def read_apart(step: EngineStep, reader: TensorReader, note_change: NoteChange) -> None:
    """Reads the shared weights of `step` for this rank alone, where its node's ranks cannot share memory."""
    first = {part: FirstWrite(partial(note_change, part)) for part in ("model", "fp32 masters")}
    changes = {key: first[part] for key, part in step.changes().items() if part in first}
    reader.copy(low_copies(step), step.memories(), changes)
