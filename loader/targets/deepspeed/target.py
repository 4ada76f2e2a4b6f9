"""Lists a live DeepSpeed engine's tensors on this rank: which elements of which parameters each of them holds.

`engine_target` makes the list, `wanted_slots` says which of its elements must be read from ZeRO's files. Nothing is
changed and no collective is used here. DeepSpeed is not imported; its classes are found in ``sys.modules`` or by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from ...errors import LayoutError
from ...saved.intervals import Piece, Place
from ...saved.names import match_names
from ...saved.values import LazyTensor
from ...sources.zero.layout import ZeroCheckpoint, share_pieces
from ...sources.zero.model_parallel import UNSPLIT, ParallelLayout
from ...sources.zero.model_states import ExpertLayer, ModelStates, Shape
from ..module import dtype_name
from .flats import MasterFlat, bf16_flats, plain_flats, unfused_flats, zero3_flats, zero_flats
from .parallel import engine_position, expert_layers, unsaved_prefixes

Kind = Literal["zero", "zero3", "bf16", "unfused", "plain", "none"]
"""DeepSpeed's optimizer, in this order: of stages 1 and 2, of stage 3, BF16_Optimizer, FP16_UnfusedOptimizer (stage 0
in bf16 or fp16), torch's own (stage 0 in fp32), none."""


@dataclass(frozen=True, eq=False)
class LowSlot:
    """Where elements of a parameter lie that the module computes with, on this rank."""

    flat: torch.Tensor
    """One-dimensional, or the whole parameter where its memory is not contiguous."""
    slot: Piece


@dataclass(frozen=True, eq=False)
class EngineTarget:
    """An engine's tensors on this rank, by parameter name."""

    engine: Any
    kind: Kind
    rank: int
    """Within the data-parallel group."""
    world_size: int
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
    slots_of: dict[str, tuple[tuple[int, Piece], ...]] = field(default_factory=dict)
    """Parameter to (index of the flat, slot in it); no entry where this rank updates none of its elements."""
    experts: tuple[ExpertLayer, ...] = ()
    """The module's MoE layers. Their experts have the same names on every rank, and are other experts there."""
    layout: ParallelLayout = UNSPLIT
    """Into what the model is split; the names and shapes here are those of this rank's part."""

    @cached_property
    def owned(self) -> frozenset[str]:
        """Parameters that the optimizer updates, on this rank or another."""
        return frozenset(name for group in self.groups for name in group)

    @property
    def optimizer(self) -> Any:
        """The torch optimizer inside DeepSpeed's; the engine's own at stage 0 in fp32."""
        outer = self.engine.optimizer
        return outer if self.kind == "plain" else getattr(outer, "optimizer", None)


def is_deepspeed_engine(model: Any) -> bool:
    """Whether `model` is a DeepSpeed engine. Imports nothing."""
    module = sys.modules.get("deepspeed.runtime.engine")
    kind = getattr(module, "DeepSpeedEngine", None)
    return kind is not None and isinstance(model, kind)


def engine_target(engine: Any) -> EngineTarget:
    """What `engine` holds on this rank. Reads its attributes only; no rank waits for another.

    Raises `LayoutError` for engines with AutoEP, with experts together with pipeline or tensor parallelism, with state
    on NVMe, with quantised shares, or with an optimizer that is not known.
    """
    _refuse_other_engines(engine)
    experts = expert_layers(engine)
    optimizer = engine.optimizer
    kind = _kind(optimizer)
    first, aliases = _names(engine.module)
    parameters = {name: parameter for parameter, name in first}
    name_of = {id(parameter): name for parameter, name in first}
    position = engine_position(engine)
    rank, world_size = position.rank, position.world_size
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
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
        flats, groups = build(optimizer, name_of, rank, world_size)
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
    slots_of: dict[str, list[tuple[int, Piece]]] = {}
    for index, flat in enumerate(flats):
        for name, slot in flat.slots:
            slots_of.setdefault(name, []).append((index, slot))
    buffers, extra = _module_rest(engine.module, parameters, aliases)
    return EngineTarget(
        engine=engine,
        kind=kind,
        rank=rank,
        world_size=world_size,
        shapes=shapes,
        dtypes={name: dtype_name(parameter.dtype) for name, parameter in parameters.items()},
        aliases=aliases,
        buffers=buffers,
        extra_state=extra,
        flats=tuple(flats),
        low=_low(kind, optimizer, parameters, flats, rank, world_size),
        groups=tuple(tuple(group) for group in groups),
        shared_memory=shared,
        slots_of={name: tuple(slots) for name, slots in slots_of.items()},
        experts=experts,
        layout=position.layout,
    )


def _refuse_other_engines(engine: Any) -> None:
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise LayoutError(
            "the engine keeps state on NVMe: restoring into it is not supported; offload to the CPU"
        )


def _kind(optimizer: Any) -> Kind:
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
        return {
            name: (LowSlot(flat_view(p), Piece(Place(0, 0), 0, 0, p.numel())),)
            for name, p in parameters.items()
        }
    found: dict[str, tuple[LowSlot, ...]] = {}
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    if kind == "zero3":
        for index, flat in enumerate(flats):
            low = optimizer.fp16_partitioned_groups_flat[index]
            found.update({name: (LowSlot(low, piece),) for name, piece in flat.slots})
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
        yield LowSlot(flat_view(parameter), Piece(Place(0, 0), 0, 0, parameter.numel()))
        return
    share = parameter.ds_tensor
    if not share.is_floating_point() and parameter.dtype.is_floating_point:
        raise LayoutError(f"{name} is quantised on this rank, which is not supported")
    for piece in share_pieces(parameter.ds_numel, world_size, 0, 0):
        if piece.place.rank == rank:
            yield LowSlot(share.data.view(-1), piece)


def _module_rest(
    module: torch.nn.Module, parameters: dict[str, torch.Tensor], aliases: dict[str, str]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    buffers: dict[str, torch.Tensor] = {}
    extra = []
    unsaved = unsaved_prefixes(module)
    for prefix, part in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        if dot.startswith(unsaved):
            continue
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                buffers[dot + name] = buffer
        if type(part).get_extra_state is not torch.nn.Module.get_extra_state:
            extra.append(f"{dot}_extra_state")
    return buffers, tuple(extra)


def wanted_slots(
    target: EngineTarget, checkpoint: ZeroCheckpoint, model: ModelStates, rename: Mapping[str, str] | None
) -> dict[str, list[Piece]]:
    """Saved parameter's name to the slots of this rank that are filled from the saved ranks' partitions.

    Those are slots of masters and of the optimizer's state; at stage 3 of weights too. `model` is rank 0's model file;
    parameters that only the optimizer's files have count as well. Parameters that do not fit are left out here, and
    reported by the plan.
    """
    names = [*target.shapes, *target.aliases, *target.buffers, *target.extra_state]
    in_no_layer = (
        name for name, one in checkpoint.parameters.items() if name not in model.module and not one.frozen
    )
    match = match_names([*model.module, *in_no_layer], names, rename)
    wanted: dict[str, list[Piece]] = {}
    for saved_name, name in match.target_of.items():
        first = target.aliases.get(name, name)
        parameter = checkpoint.find(saved_name)
        if parameter is None or first not in target.shapes or parameter.shape != target.shapes[first]:
            continue
        slots = wanted.setdefault(parameter.name, [])
        slots += [slot for _, slot in target.slots_of.get(first, ())]
        saved = model.module.get(saved_name)
        # A module of another dtype than saved gets its weights cast from the fp32 masters.
        whole = isinstance(saved, LazyTensor) and saved.dtype == target.dtypes[first]
        if checkpoint.partitioned or not whole:
            slots += [low.slot for low in target.low[first]]
    return wanted


def flat_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in one dimension; the tensor's data as it is where its memory is not contiguous."""
    plain = tensor.data
    return plain.view(-1) if plain.is_contiguous() else plain
