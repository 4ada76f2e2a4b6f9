"""Lists a live DeepSpeed engine's tensors on this rank: which elements of which parameters each of them holds.

`live_engine` makes the list, a `LiveEngine`. Nothing is changed and no collective is used here. DeepSpeed is not
imported; its classes are found in ``sys.modules`` or by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from ...errors import LayoutError
from ...saved.copies import Memory
from ...saved.demand import Shape
from ...saved.model_parallel import ExpertLayer, Position
from ...saved.partitions import Slot, shares
from ...saved.regions import Run
from ...saved.strided import Layout
from ..dtensor import dtype_name, kept_part
from ..module import extra_states
from .flats import MasterFlat, bf16_flats, plain_flats, unfused_flats, zero3_flats, zero_flats
from .parallel import engine_position, expert_layers, unsaved_prefixes

Kind = Literal["zero", "zero3", "bf16", "unfused", "plain", "none"]
"""DeepSpeed's optimizer, in this order: of stages 1 and 2, of stage 3, BF16_Optimizer, FP16_UnfusedOptimizer (stage 0
in bf16 or fp16), torch's own (stage 0 in fp32), none."""


class LowSlot(NamedTuple):
    """Where elements of a parameter lie that the module computes with, on this rank."""

    flat: torch.Tensor
    """One-dimensional: the row of weights that the parameter lies in; or the whole parameter, where its memory is not
    contiguous."""
    slot: Slot
    key: str
    """Names ``flat`` among the engine's tensors (`Memory.key`)."""

    @property
    def elements(self) -> torch.Tensor:
        """Those of the parameter alone."""
        start, length = self.slot.start, self.slot.run.length
        return self.flat if length == self.flat.numel() else self.flat[start : start + length]


_PLAIN = (torch.Tensor, torch.nn.Parameter)
"""The classes of tensors that are nothing but their memory."""


@dataclass(frozen=True, eq=False)
class LiveEngine:
    """An engine's tensors on this rank, by parameter name."""

    engine: Any
    kind: Kind
    position: Position
    """This rank's part of the model, whose names and shapes these are, and its place in the data-parallel group."""
    shapes: dict[str, Shape]
    """Every parameter's whole shape, by its first name."""
    dtypes: dict[str, str]
    """By the same names: the dtype that the module computes with, such as ``bfloat16``."""
    aliases: dict[str, str]
    """Every further name of a tied parameter to its first."""
    buffers: dict[str, torch.Tensor]
    """Persistent ones, by name."""
    extra_state: tuple[str, ...]
    """Names of submodules' extra state."""
    flats: tuple[MasterFlat, ...]
    low: dict[str, tuple[LowSlot, ...]]
    """Parameter to where its elements lie that the module computes with; () where this rank has none."""
    groups: tuple[tuple[str, ...], ...]
    """Names in the optimizer's parameter groups, in the order that the optimizer was given them."""
    shared_memory: frozenset[str] = field(default_factory=frozenset)
    """Parameters whose master is the module's own tensor."""
    slots_of: dict[str, tuple[tuple[int, Slot], ...]] = field(default_factory=dict)
    """Parameter to (index of the flat, slot in it); no entry where this rank updates none of its elements."""
    frozen: tuple[str, ...] = ()
    """Parameters that are not trained (``requires_grad=False``)."""
    experts: tuple[ExpertLayer, ...] = ()
    """The module's MoE layers. Their experts have the same names on every rank, and are other experts there."""

    @cached_property
    def owned(self) -> frozenset[str]:
        """Parameters that the optimizer updates, on this rank or another."""
        return frozenset(name for group in self.groups for name in group)

    @property
    def names(self) -> tuple[str, ...]:
        """Of everything in the module's state."""
        return (*self.shapes, *self.aliases, *self.buffers, *self.extra_state)

    @property
    def optimizer(self) -> Any:
        """The torch optimizer inside DeepSpeed's; the engine's own at stage 0 in fp32."""
        outer = self.engine.optimizer
        return outer if self.kind == "plain" else getattr(outer, "optimizer", None)


def engine_class() -> type | None:
    """DeepSpeed's class of engines; None where the process has not imported it. Imports nothing."""
    found = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
    return found if isinstance(found, type) else None


def is_deepspeed_engine(model: Any) -> bool:
    """Whether `model` is a DeepSpeed engine. Imports nothing."""
    kind = engine_class()
    return kind is not None and isinstance(model, kind)


def live_engine(engine: Any) -> LiveEngine:
    """What `engine` holds on this rank. Reads its attributes only; no rank waits for another.

    Raises `LayoutError` for engines with AutoEP, with experts together with pipeline or tensor parallelism, with state
    on NVMe, with quantised shares, or with an optimizer that is not known.
    """
    _refuse_other_engines(engine)
    experts = expert_layers(engine)
    optimizer = engine.optimizer
    kind = optimizer_kind(optimizer)
    first, aliases = _names(engine.module)
    parameters = {name: parameter for parameter, name in first}
    name_of = {id(parameter): name for parameter, name in first}
    position = engine_position(engine)
    place = position.rank, position.world_size
    in_shares = any(hasattr(parameter, "ds_shape") for parameter in parameters.values())
    shapes = {
        name: tuple(getattr(p, "ds_shape", p.shape) if in_shares else p.shape)
        for name, p in parameters.items()
    }
    build = {
        "zero": zero_flats,
        "bf16": bf16_flats,
        "zero3": zero3_flats,
        "unfused": unfused_flats,
        "plain": plain_flats,
    }.get(kind)
    flats: list[MasterFlat] = []
    groups: list[list[str]] = []
    if build is not None:
        flats, groups = build(optimizer, name_of, *place)
    shared: frozenset[str] = frozenset()
    if kind == "plain" or (
        kind == "zero3"
        and any(
            flat.master.data_ptr() == low.data_ptr()
            for flat, low in zip(flats, optimizer.fp16_partitioned_groups_flat, strict=True)
            if flat.master.numel()
        )
    ):
        shared = frozenset(name for flat in flats for name, _ in flat.slots)
    slots_of: dict[str, list[tuple[int, Slot]]] = {}
    for index, flat in enumerate(flats):
        for name, slot in flat.slots:
            slots_of.setdefault(name, []).append((index, slot))
    buffers, extra = _module_rest(engine.module, parameters, aliases)
    return LiveEngine(
        engine=engine,
        kind=kind,
        position=position,
        shapes=shapes,
        dtypes={name: dtype_name(parameter.dtype) for name, parameter in parameters.items()},
        aliases=aliases,
        buffers=buffers,
        extra_state=extra,
        flats=tuple(flats),
        low=_low(kind, optimizer, parameters, flats, *place),
        groups=tuple(tuple(group) for group in groups),
        shared_memory=shared,
        slots_of={name: tuple(slots) for name, slots in slots_of.items()},
        frozen=tuple(name for name, parameter in parameters.items() if not parameter.requires_grad),
        experts=experts,
    )


def _refuse_other_engines(engine: Any) -> None:
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise LayoutError(
            "the engine keeps state on NVMe: restoring into it is not supported; offload to the CPU"
        )


def optimizer_kind(optimizer: Any) -> Kind:
    """The kind of an engine's optimizer. Raises `LayoutError` for one that is not known."""
    if optimizer is None:
        return "none"
    name = type(optimizer).__name__
    known: dict[str, Kind] = {
        "DeepSpeedZeroOptimizer": "zero",
        "DeepSpeedZeroOptimizer_Stage3": "zero3",
        "BF16_Optimizer": "bf16",
        "FP16_UnfusedOptimizer": "unfused",
        "DeepSpeedZeRoOffload": "none",
    }
    for base in type(optimizer).__mro__:
        if base.__name__ in known and base.__module__.startswith("deepspeed."):
            return known[base.__name__]
    if isinstance(optimizer, torch.optim.Optimizer):
        return "plain"
    raise LayoutError(f"the engine's optimizer is a {name}, which rankload does not know how to restore")


def _names(module: torch.nn.Module) -> tuple[list[tuple[torch.Tensor, str]], dict[str, str]]:
    first: dict[int, tuple[torch.Tensor, str]] = {}
    aliases: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            aliases[name] = first[id(parameter)][1]
        else:
            first[id(parameter)] = (parameter, name)
    return list(first.values()), aliases


def _low(
    kind: Kind,
    optimizer: Any,
    parameters: dict[str, torch.Tensor],
    flats: Sequence[MasterFlat],
    rank: int,
    world_size: int,
) -> dict[str, tuple[LowSlot, ...]]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        rows = tuple(_rows_of_weights(kind, optimizer))
        return {name: (_in_a_row(name, parameter, rows),) for name, parameter in parameters.items()}
    found: dict[str, tuple[LowSlot, ...]] = {}
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    if kind == "zero3":
        for index, flat in enumerate(flats):
            low = optimizer.fp16_partitioned_groups_flat[index]
            key = f"weights of flat {index}"
            found.update({name: (LowSlot(low, slot, key),) for name, slot in flat.slots})
            for parameter in optimizer.fp16_groups[index]:
                # This rank may have no element of a small parameter.
                found.setdefault(name_of[id(parameter)], ())
    for name, parameter in parameters.items():
        if name not in found:
            found[name] = tuple(_share(name, parameter, rank, world_size))
    return found


def _share(name: str, parameter: Any, rank: int, world_size: int) -> Iterator[LowSlot]:
    """This rank's share of a parameter that no optimizer updates at stage 3; all of one that is not partitioned."""
    if not hasattr(parameter, "ds_id"):
        yield _whole_slot(name, parameter)
        return
    share = parameter.ds_tensor
    if not share.is_floating_point() and parameter.dtype.is_floating_point:
        raise LayoutError(f"{name} is quantised on this rank, which is not supported")
    for slot in shares(parameter.ds_numel, world_size, 0):
        if slot.rank == rank:
            yield LowSlot(share.data.view(-1), slot, f"model/{name}")


class _Row(NamedTuple):
    """A tensor in which an optimizer keeps the weights of a parameter group side by side."""

    flat: torch.Tensor
    key: str
    start: int
    """Address of its first byte."""
    stop: int
    itemsize: int
    dtype: torch.dtype
    device: torch.device


def _rows_of_weights(kind: Kind, optimizer: Any) -> Iterator[_Row]:
    """The rows of weights of DeepSpeed's stages 1 and 2, and of BF16_Optimizer."""
    found = {"zero": "bit16_groups_flat", "bf16": "bf16_groups_flat"}.get(kind)
    flats = getattr(optimizer, found, None) if found is not None else None
    for index, flat in enumerate(flats if isinstance(flats, list | tuple) else ()):
        if type(flat) in _PLAIN and flat.dim() == 1 and flat.is_contiguous() and flat.numel():
            start, size = flat.data_ptr(), flat.element_size()
            stop = start + flat.numel() * size
            key = f"weights of group {index}"
            yield _Row(flat_view(flat), key, start, stop, size, flat.dtype, flat.device)


def _in_a_row(name: str, parameter: torch.Tensor, rows: Sequence[_Row]) -> LowSlot:
    """Where a whole parameter lies: in one of `rows`, where it is a part of that, else by itself."""
    start = parameter.data_ptr() if rows and type(parameter) in _PLAIN else 0
    for row in rows:
        if row.start <= start < row.stop:
            numel = parameter.numel()
            first, more = divmod(start - row.start, row.itemsize)
            if (
                parameter.dtype == row.dtype
                and parameter.device == row.device
                and parameter.is_contiguous()
                and not more
                and start + numel * row.itemsize <= row.stop
            ):
                return LowSlot(row.flat, Slot(0, first, Run(0, numel)), row.key)
    return _whole_slot(name, parameter)


def _whole_slot(name: str, parameter: torch.Tensor) -> LowSlot:
    return LowSlot(flat_view(parameter), Slot(0, 0, Run(0, parameter.numel())), f"model/{name}")


def _module_rest(
    module: torch.nn.Module, parameters: dict[str, torch.Tensor], aliases: dict[str, str]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    buffers: dict[str, torch.Tensor] = {}
    unsaved = unsaved_prefixes(module)
    for prefix, part in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        if dot.startswith(unsaved):
            continue
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                buffers[dot + name] = buffer
    extra = [name for name in extra_states(module) if not name.startswith(unsaved)]
    return buffers, tuple(extra)


def flat_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in one dimension; the tensor's data as it is where its memory is not contiguous."""
    plain = tensor.data
    return plain.view(-1) if plain.is_contiguous() else plain


def memory_of(key: str, tensor: torch.Tensor) -> Memory:
    """`tensor` as a plan knows it."""
    _, memory = kept_part(tensor, key)
    return memory


class Memories:
    """Engine's tensors as a plan knows them, each made once: copies into one tensor share its `Memory`, by which a
    restore tells that they go to one place."""

    def __init__(self) -> None:
        self._found: dict[str, Memory] = {}

    def of(self, key: str, tensor: torch.Tensor) -> Memory:
        """The `flat_view` of the `tensor` that `key` names."""
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = memory_of(key, flat_view(tensor))
        return found


def flat_memory(memory: Memory) -> Memory:
    """What `flat_view` gives of a tensor with this `memory`."""
    layout = Layout(memory.shape, memory.stride, 0)
    return replace(memory, shape=(layout.numel,), stride=(1,)) if layout.is_contiguous else memory
