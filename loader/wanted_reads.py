"""What a prepared restore is going to read on this rank: which bytes of which storages, told before it begins.

It may tell more than is read in the end, and never less, but for what algorithms make of a model that they change.
Imports torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .engine_plan import EnginePlan, Fill
from .local_shard import is_dtensor, local_part
from .ranges import ByteRange, union
from .restore_foreign import ForeignPlan
from .restore_module import ModulePlan, module_tensors
from .restore_optimizer import OptimizerPlan
from .restore_target import Prepared
from .saved_parts import AssembledTensor, SavedTensor, parts_of, whole_box
from .strided import Layout
from .tree_walk import tensors
from .values import LazyTensor, StorageRef

Read = tuple[StorageRef, ByteRange, str]
"""Bytes of a storage, and the name of what they are for."""


@dataclass
class WantedReads:
    """The bytes of one storage that this rank reads."""

    ranges: list[ByteRange] = field(default_factory=list)
    """Disjoint and in order."""
    names: tuple[str, ...] = ()
    """A few of the tensors that they are for."""

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


def wanted_reads(prepared: Prepared) -> dict[StorageRef, WantedReads]:
    """By storage, in the order of the files."""
    found: dict[StorageRef, WantedReads] = {}
    for storage, span, name in _reads(prepared):
        wanted = found.setdefault(storage, WantedReads())
        wanted.ranges.append(span)
        if len(wanted.names) < 3 and name and name not in wanted.names:
            wanted.names = (*wanted.names, name)
    for wanted in found.values():
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
    fills: Iterable[Fill] = itertools.chain(
        (fill for _, fill in plan.low), (fill for _, fill in plan.masters), (fill for *_, fill in plan.states)
    )
    for fill in fills:
        yield from _of_tensor(fill.source, fill.name, fill.source_start, fill.length)
    for name, buffer in plan.buffers.items():
        yield from _of_tensor(buffer, f"model/{name}")
    rest = (plan.extra_state, plan.all_scalars, plan.groups, plan.scheduler, plan.counters)
    yield from _of_tree(list(rest))


def _of_foreign(plan: ForeignPlan) -> Iterator[Read]:
    if plan.fill_module and plan.module is not None:
        yield from _of_module(plan.module)
    yield from _of_tree(plan.saved)
    for optimizer in plan.optimizers:
        yield from _of_optimizer(optimizer)


def _of_module(plan: ModulePlan) -> Iterator[Read]:
    targets = module_tensors(plan.module)
    for name, value in plan.tensors.items():
        yield from _of_saved(value, targets.get(name), f"model/{name}")
    yield from _of_tree([value for value in plan.sources.values() if not isinstance(value, SavedTensor)])


def _of_optimizer(plan: OptimizerPlan) -> Iterator[Read]:
    parameters = plan.parameters
    for position, entries in plan.state.items():
        for key, value in entries.items():
            name = f"optimizers/{plan.name}/state/{position}/{key}"
            if isinstance(value, SavedTensor):
                yield from _of_saved(value, parameters[position], name)
            else:
                yield from _of_tree(value)
    yield from _of_tree(plan.param_groups)


def _of_saved(value: SavedTensor, target: Any, name: str) -> Iterator[Read]:
    """All of `value`, or this rank's part of it where `target` is spread over the ranks."""
    shared = target is not None and is_dtensor(target) and tuple(target.shape) == value.shape
    if isinstance(value, AssembledTensor) or shared:
        box = local_part(target, name)[0] if shared else whole_box(value.shape)
        for part, _ in parts_of(value, box):
            yield from _of_tensor(part, name)
    else:
        yield from _of_tensor(value, name)


def _of_tree(tree: Any) -> Iterator[Read]:
    for path, tensor in tensors(tree):
        yield from _of_tensor(tensor, path)


def _of_tensor(source: LazyTensor, name: str, start: int = 0, length: int | None = None) -> Iterator[Read]:
    """The bytes that some elements of a lazy tensor lie in; of a strided one, all that it reaches over."""
    if not source.numel or length == 0:
        return
    if source.is_contiguous:
        first = source.storage_offset + start
        stop = first + (source.numel - start if length is None else length)
    else:
        first = source.storage_offset
        stop = first + Layout(source.shape, source.stride, 0).span
    yield source.storage, ByteRange(first * source.itemsize, stop * source.itemsize), name
