"""Computes, before a restore begins, which bytes of which storages it will read on this rank. Imports torch.

`wanted_reads` walks every plan in a `Prepared`. It may name more bytes than are read in the end, never fewer; except
where algorithms are still to change the model, whose tensors are not known yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..byte_ranges import ByteRange, once, overlap, union
from ..materialize.tensors import is_plain, torch_dtype
from ..saved.assembled import AssembledTensor, SavedTensor, parts_of, whole_box
from ..saved.strided import Layout
from ..saved.tree import tensors
from ..saved.values import LazyTensor, StorageRef
from ..targets.deepspeed.plan import EnginePlan
from ..targets.deepspeed.target import flat_view
from ..targets.dtensor import is_dtensor, local_part
from ..targets.foreign import ForeignPlan
from ..targets.module import ModulePlan, module_tensors
from ..targets.optimizer import OptimizerPlan, lies_along
from ..targets.restore import Prepared

Read = tuple[StorageRef, ByteRange, str, bool]
"""Bytes of a storage, the name of the tensor that they are for, and whether they can go into its memory unchanged."""


@dataclass
class WantedReads:
    """The bytes of one storage that this rank reads."""

    ranges: list[ByteRange] = field(default_factory=list)
    """Disjoint and in order."""
    names: tuple[str, ...] = ()
    """A few of the tensors that they are for."""
    direct: list[ByteRange] = field(default_factory=list)
    """The part of `ranges` that may be fetched directly: it goes unchanged into one tensor's memory, and is read by one
    `TensorReader.copy` together with others."""

    @property
    def nbytes(self) -> int:
        """How many bytes are read."""
        return sum(stop - start for start, stop in self.ranges)


def wanted_reads(prepared: Prepared) -> dict[StorageRef, WantedReads]:
    """What this rank will read, by storage, in the order of the files."""
    found: dict[StorageRef, WantedReads] = {}
    for storage, span, name, direct in _reads(prepared):
        wanted = found.setdefault(storage, WantedReads())
        wanted.ranges.append(span)
        if direct:
            wanted.direct.append(span)
        if len(wanted.names) < 3 and name and name not in wanted.names:
            wanted.names = (*wanted.names, name)
    for wanted in found.values():
        wanted.direct = list(overlap(once(wanted.ranges), union(wanted.direct)))
        wanted.ranges = list(union(wanted.ranges))
    return {one: found[one] for one in sorted(found, key=lambda storage: (storage.file, storage.offset))}


def _reads(prepared: Prepared) -> Iterator[Read]:
    if prepared.engine is not None:
        yield from _of_engine(prepared.engine)
    if prepared.state is not None:
        if prepared.state.module is not None:
            yield from _of_module(prepared.state.module)
        for optimizer in prepared.state.optimizers:
            yield from _of_optimizer(optimizer)
        yield from _of_tree([saved for *_, saved in prepared.state.objects])
        yield from _of_tree(prepared.state.values)
    if prepared.foreign is not None:
        yield from _of_foreign(prepared.foreign)


def _of_engine(plan: EnginePlan) -> Iterator[Read]:
    flats = plan.target.flats
    for destination, fill in plan.low:
        yield from _of_tensor(fill.source, fill.name, fill.source_start, fill.length, into=destination)
    for index, fill in plan.masters:
        master = flat_view(flats[index].master)
        yield from _of_tensor(fill.source, fill.name, fill.source_start, fill.length, into=master)
    for index, key, fill in plan.states:
        state = _state_of(plan, index, key)
        yield from _of_tensor(fill.source, fill.name, fill.source_start, fill.length, into=state)
    for name, buffer in plan.buffers.items():
        yield from _of_tensor(buffer, f"model/{name}")
    rest = (plan.extra_state, plan.all_scalars, plan.groups, plan.scheduler, plan.counters)
    yield from _of_tree(list(rest))


def _state_of(plan: EnginePlan, index: int, key: str) -> torch.Tensor | None:
    """The optimizer's tensor that will be filled, or one with the layout of the one that will be made; None where that
    layout may differ from its master's."""
    master = plan.target.flats[index].master
    held = plan.target.optimizer.state.get(master, {}).get(key)
    if isinstance(held, torch.Tensor):
        return flat_view(held)
    saved = plan.fresh_keys.get(index, {}).get(key)
    if saved is None or not torch_dtype(saved).is_floating_point:
        return None
    return flat_view(master)


def _of_foreign(plan: ForeignPlan) -> Iterator[Read]:
    if plan.fill_module and plan.module is not None:
        yield from _of_module(plan.module)
    yield from _of_tree(plan.saved)
    for optimizer in plan.optimizers:
        yield from _of_optimizer(optimizer)


def _of_module(plan: ModulePlan) -> Iterator[Read]:
    targets = module_tensors(plan.module)
    for name, value in plan.tensors.items():
        yield from _of_saved(value, targets.get(name), f"model/{name}", direct=not plan.through_hooks)
    yield from _of_tree([value for value in plan.sources.values() if not isinstance(value, SavedTensor)])


def _of_optimizer(plan: OptimizerPlan) -> Iterator[Read]:
    parameters = plan.parameters
    for position, entries in plan.state.items():
        for key, value in entries.items():
            name = f"optimizers/{plan.name}/state/{position}/{key}"
            if isinstance(value, SavedTensor):
                # Other entries are read one by one, and not into memory like the parameter's.
                along = lies_along(value, key, parameters[position])
                yield from _of_saved(value, parameters[position], name, direct=along)
            else:
                yield from _of_tree(value)
    yield from _of_tree(plan.param_groups)


def _of_saved(value: SavedTensor, target: Any, name: str, *, direct: bool) -> Iterator[Read]:
    """All of `value`, or this rank's shard of it where `target` is a DTensor.

    `direct`: it is read together with others, into memory with the layout of `target`.
    """
    shared = target is not None and is_dtensor(target) and tuple(target.shape) == value.shape
    if isinstance(value, AssembledTensor) or shared:
        box, local = local_part(target, name) if shared else (whole_box(value.shape), target)
        for part, _ in parts_of(value, box):
            yield from _of_tensor(part, name, into=local if direct else None)
    else:
        yield from _of_tensor(value, name, into=target if direct else None)


def _of_tree(tree: Any) -> Iterator[Read]:
    for path, tensor in tensors(tree):
        yield from _of_tensor(tensor, path)


def _of_tensor(
    source: LazyTensor,
    name: str,
    start: int = 0,
    length: int | None = None,
    *,
    into: torch.Tensor | None = None,
) -> Iterator[Read]:
    """The bytes of `length` elements from `start` on; of a strided tensor, all from its first to its last element's."""
    if not source.numel or length == 0:
        return
    if source.is_contiguous:
        first = source.storage_offset + start
        stop = first + (source.numel - start if length is None else length)
    else:
        first = source.storage_offset
        stop = first + Layout(source.shape, source.stride, 0).span
    direct = (
        into is not None
        and source.is_contiguous
        and is_plain(into)
        and into.dtype == torch_dtype(source.dtype)
    )
    yield source.storage, ByteRange(first * source.itemsize, stop * source.itemsize), name, direct
