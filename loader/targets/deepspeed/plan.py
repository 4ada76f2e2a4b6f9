"""Plans which saved elements go into which of a DeepSpeed engine's tensors: all is checked, nothing changed.

`plan_model` plans weights, buffers and masters, then `plan_states` the optimizer's state and numbers. Parameters are
matched by name; the rest is interval arithmetic between the checkpoint's pieces and the engine's slots
(``saved.intervals``), so any two layouts fit as long as the files that it leads to were read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import LayoutError
from ...materialize.tensors import read_tensor
from ...saved.intervals import CoverageError, Piece, Place, intersect
from ...saved.mismatch import Mismatch, dtype_problem
from ...saved.names import match_names
from ...saved.values import LazyTensor, kind_of
from ...sources.zero.contents import FROZEN, KeptParts, ShardedTensor, ZeroContents
from ...sources.zero.optim_states import MASTER
from ..module import dtype_name
from .target import EngineTarget

Saved = LazyTensor | ShardedTensor
"""A whole tensor in one file, or one in pieces in several ranks' files."""


@dataclass(frozen=True, slots=True, eq=False)
class Fill:
    """A run of saved elements that goes into one of the engine's tensors; starts and length count elements."""

    name: str
    """What messages call it: ``model/NAME``, ``fp32/NAME``, ``exp_avg/NAME``."""
    source: LazyTensor
    source_start: int
    target_start: int
    length: int


@dataclass
class EnginePlan:
    """A restore into an engine, checked; nothing is changed yet. Names are the engine's parameters."""

    target: EngineTarget
    zero: ZeroContents | None
    weights_only: bool
    mismatch: Mismatch = field(default_factory=Mismatch)
    renamed: dict[str, str] = field(default_factory=dict)
    cast: dict[str, str] = field(default_factory=dict)
    """``model/NAME`` to ``source dtype -> target dtype``."""
    low: list[tuple[Any, Fill]] = field(default_factory=list)
    """(destination, what goes there): weights that the module computes with, one-dimensional or whole parameters."""
    whole: dict[str, Saved] = field(default_factory=dict)
    """Parameters that this rank computes with whole, to the saved weights for them; all of it is in ``low`` too."""
    masters: list[tuple[int, Fill]] = field(default_factory=list)
    """(index of the flat, what goes there)."""
    filled_masters: set[str] = field(default_factory=set)
    """Parameters whose masters on this rank are all filled from saved masters."""
    states: list[tuple[int, str, Fill]] = field(default_factory=list)
    """(index of the flat, state key, what goes there)."""
    shared: set[str] = field(default_factory=set)
    """Parameters whose weights this rank's node reads once for all its ranks; `leave_out` took them out of ``low``."""
    low_from_master: list[tuple[str, Piece]] = field(default_factory=list)
    """Stage 3: (parameter, slot in a flat) of shares that are cast from this rank's own masters."""
    master_from_low: list[tuple[str, int, Piece]] = field(default_factory=list)
    """(parameter, index of the flat, slot in it) of masters that are cast from the module's weights."""
    buffers: dict[str, LazyTensor] = field(default_factory=dict)
    extra_state: dict[str, Any] = field(default_factory=dict)
    fresh_keys: dict[int, dict[str, str]] = field(default_factory=dict)
    """Index of the flat to the state keys that the optimizer needs there, with the dtype saved."""
    scalars: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Index of the flat to ``step`` and the like, lazy, without the ignored ones."""
    all_scalars: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The same with the ignored ones: a new state needs all of its keys."""
    groups: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Index of the engine's parameter group to the hyperparameters it gets, lazy."""
    scheduler: Any = None
    """The saved state of the lr scheduler, lazy; None where it stays as it is."""
    counters: dict[str, Any] = field(default_factory=dict)
    """Counters, loss scaler and the like, by DeepSpeed's names."""
    not_restored: list[str] = field(default_factory=list)
    saved_names: dict[int, str] = field(default_factory=dict)
    """``id`` of a value in the model file to its name there."""

    @property
    def nbytes(self) -> int:
        """Bytes that this rank reads."""
        fills = [fill for _, fill in self.low] + [fill for _, fill in self.masters]
        fills += [fill for *_, fill in self.states]
        return sum(fill.length * fill.source.itemsize for fill in fills) + sum(
            tensor.nbytes for tensor in self.buffers.values()
        )


def plan_model(
    plan: EnginePlan, saved: Mapping[str, Any], kept: Iterable[str], rename: Mapping[str, str] | None
) -> dict[str, str]:
    """Plans weights, buffers, extra state and masters; returns each of the engine's parameters' name in the checkpoint.

    `saved` is the whole saved model, `kept` the names of it that were not ignored. Raises `LayoutError` where pieces
    of a parameter overlap, or lie in files that were not read.
    """
    target = plan.target
    names = [*target.shapes, *target.aliases, *target.buffers, *target.extra_state]
    match = match_names(saved, names, rename)
    source_of = {new: old for old, new in match.target_of.items()}
    first_of = {name: target.aliases.get(name, name) for name in names}
    matched = {first_of[name] for name in source_of}
    plan.renamed.update(match.renamed)
    wanted = set(kept)
    plan.mismatch.missing.extend(
        f"model/{name}"
        for name in match.missing
        if first_of[name] not in matched and name not in target.extra_state
    )
    plan.mismatch.unexpected.extend(
        f"model/{name}"
        for name in match.unexpected
        if name in wanted and not _is_alias(plan, name, source_of)
    )
    if plan.zero is not None:
        module = plan.zero.model_of(target.rank).module
        plan.saved_names.update({id(value): name for name, value in module.items()})
    found: dict[str, str] = {}
    for name in target.shapes:
        mine = [name, *(alias for alias, first in target.aliases.items() if first == name)]
        sources = [source_of[one] for one in mine if one in source_of]
        if not sources:
            continue
        found[name] = sources[0]
        left = [source for source in sources if source in wanted]
        if left:
            _plan_parameter(plan, name, saved[left[0]])
    for name, buffer in target.buffers.items():
        source = source_of.get(name)
        if source in wanted and _fits(
            plan, name, saved[source], tuple(buffer.shape), dtype_name(buffer.dtype)
        ):
            plan.buffers[name] = saved[source]
    plan.extra_state.update(
        {name: saved[source_of[name]] for name in target.extra_state if source_of.get(name) in wanted}
    )
    return found


def _is_alias(plan: EnginePlan, name: str, source_of: Mapping[str, str]) -> bool:
    """Whether `name` is tied, in the checkpoint, to a name that was matched."""
    if plan.zero is None:
        return False
    parameter = plan.zero.checkpoint.find(name)
    used = set(source_of.values())
    aliases = plan.zero.checkpoint.aliases
    return parameter is not None and any(
        one in used
        for one in (parameter.name, *(a for a, owner in aliases.items() if owner == parameter.name))
    )


def _fits(plan: EnginePlan, name: str, value: Any, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether `value` is a tensor of `shape` that can be cast to `dtype`; notes in the plan where it is not."""
    if not isinstance(value, LazyTensor | ShardedTensor):
        plan.mismatch.wrong.append(f"model/{name}: expected a tensor, got a {kind_of(value)}")
        return False
    if value.shape != shape:
        plan.mismatch.wrong.append(f"model/{name}: expected shape {shape}, got {value.shape}")
        return False
    problem = dtype_problem(value.dtype, dtype)
    if problem:
        plan.mismatch.wrong.append(f"model/{name}: {problem}")
        return False
    return True


def _plan_parameter(plan: EnginePlan, name: str, value: Any) -> None:
    """Plans what the weights and the fp32 masters of `name` are filled from, given its saved `value`."""
    target = plan.target
    dtype = target.dtypes[name]
    if not _fits(plan, name, value, target.shapes[name], dtype):
        return
    master = _master_source(plan, value)
    exact = value.dtype == dtype or master is None
    sharded_master = isinstance(value, ShardedTensor) and value.kind == MASTER
    if value.dtype != dtype and not sharded_master:
        plan.cast[f"model/{name}"] = f"{value.dtype} -> {dtype}"
    slots = target.slots_of.get(name, ())
    owned = name in target.owned
    # A module of another dtype than saved is filled from the masters, which are more precise.
    low_source = value if exact or master is None else master
    if owned and name not in target.shared_memory:
        if master is not None:
            _fill_masters(plan, name, master, slots)
            plan.filled_masters.add(name)
        elif value.dtype == dtype:
            plan.master_from_low.extend((name, index, slot) for index, slot in slots)
        else:
            _fill_masters(plan, name, value, slots)
    if owned and target.kind == "zero3" and isinstance(low_source, ShardedTensor):
        if name in target.shared_memory:
            _fill_masters(plan, name, low_source, slots)
        else:
            plan.low_from_master.extend((name, slot) for _, slot in slots)
        return
    if all(low.flat.dim() == 1 and low.slot.length == low.flat.numel() for low in target.low[name]):
        plan.whole[name] = low_source
    for low in target.low[name]:
        for fill in fills_of(plan, f"model/{name}", low_source, [low.slot]):
            plan.low.append((low.flat, fill))


def _master_source(plan: EnginePlan, value: Saved) -> ShardedTensor | None:
    """The saved fp32 masters of the parameter whose saved weights are `value`; None where the files read have none."""
    if isinstance(value, ShardedTensor):
        return value if value.kind == MASTER else None
    if plan.zero is None or not plan.zero.optims or MASTER not in plan.zero.checkpoint.kinds:
        return None
    parameter = plan.zero.checkpoint.find(plan.saved_names.get(id(value), ""))
    if parameter is None or parameter.frozen:
        return None
    pieces = tuple(plan.zero.checkpoint.pieces(parameter.name))
    return ShardedTensor(parameter.name, MASTER, "float32", parameter.shape, pieces)


def _fill_masters(plan: EnginePlan, name: str, source: Saved, slots: Sequence[tuple[int, Piece]]) -> None:
    for index, slot in slots:
        plan.masters.extend((index, fill) for fill in fills_of(plan, f"fp32/{name}", source, [slot]))


def fills_of(plan: EnginePlan, name: str, source: Saved, slots: Sequence[Piece]) -> list[Fill]:
    """The fills of `slots` from `source`, in the order of the parameter's elements; `name` is for messages.

    Raises `LayoutError` where the pieces do not hold all wanted elements once, or lie in files that were not read.
    """
    if isinstance(source, LazyTensor):
        whole = [Piece(Place(0, 0), 0, 0, source.numel)] if source.numel else []
        return [
            Fill(name, source, copy.source_start, copy.target_start, copy.length)
            for copy in intersect(whole, slots)
        ]
    zero = plan.zero
    if zero is None:
        raise LayoutError(f"{name} is sharded, but no DeepSpeed files were read")
    try:
        copies = intersect(source.pieces, slots)
    except CoverageError as error:
        raise LayoutError(f"{name}: {error}") from error
    fills = []
    for copy in copies:
        piece = Piece(copy.source, copy.source_start, 0, copy.length)
        tensor = zero.tensor(source.kind, source.name, piece)
        if tensor is None:
            what = "share" if source.kind == FROZEN else "state"
            raise LayoutError(f"{name}: saved rank {copy.source.rank} has no {what} for it")
        fills.append(Fill(name, tensor, copy.source_start, copy.target_start, copy.length))
    return fills


def plan_states(plan: EnginePlan, found: Mapping[str, str], wanted: KeptParts, optimizer_class: str) -> None:
    """Plans the optimizer's state tensors, its numbers (``step``) and its hyperparameters.

    `found` is what `plan_model` returned, `wanted` what ``ignore_keys`` left; `optimizer_class` is for messages. Reads
    numbers that are saved as tensors, to compare them.
    """
    zero, target = plan.zero, plan.target
    if zero is None:
        return
    optim = zero.any_optim
    if optim is None:
        return
    checkpoint = zero.checkpoint
    at = f"optimizers/{optimizer_class}/state"
    kinds = [kind for kind in checkpoint.kinds if kind != MASTER]
    saved_of: dict[str, str] = {}
    for name in target.shapes:
        parameter = checkpoint.find(found[name]) if name in found else None
        if name in target.owned and (parameter is None or parameter.frozen):
            plan.mismatch.missing.append(f"{at}/{name}")
        elif name not in target.owned and parameter is not None and not parameter.frozen:
            if any((parameter.name, kind) in wanted.states for kind in kinds):
                plan.mismatch.unexpected.append(f"{at}/{parameter.name}")
        elif parameter is not None and not parameter.frozen and parameter.shape == target.shapes[name]:
            saved_of[name] = parameter.name
    for index, flat in enumerate(target.flats):
        for name, slot in flat.slots or _padding(target, index, saved_of):
            if name not in saved_of:
                continue
            parameter = checkpoint.parameters[saved_of[name]]
            numbers = optim.scalars.get(parameter.group, {})
            for kind in kinds:
                tensor = optim.tensors[kind].get(parameter.group)
                if tensor is None:
                    continue
                if any(
                    _is_wanted(wanted, parameter.name, parameter.group, key) for key in (*kinds, *numbers)
                ):
                    plan.fresh_keys.setdefault(index, {}).setdefault(kind, tensor.dtype)
                if _is_wanted(wanted, parameter.name, parameter.group, kind):
                    source = ShardedTensor(
                        parameter.name, kind, tensor.dtype, parameter.shape,
                        tuple(checkpoint.pieces(parameter.name)),
                    )  # fmt: skip
                    plan.states.extend(
                        (index, kind, fill) for fill in fills_of(plan, f"{kind}/{name}", source, [slot])
                    )
            for key, value in numbers.items():
                known = plan.all_scalars.setdefault(index, {})
                if key in known and known[key] is not value and _number(known[key]) != _number(value):
                    plan.mismatch.wrong.append(
                        f"{at}/{name}/{key}: the engine updates it together with parameters for which the checkpoint "
                        f"has {_number(known[key])}, but here it has {_number(value)}"
                    )
                known[key] = value
                if _is_wanted(wanted, parameter.name, parameter.group, key):
                    plan.scalars.setdefault(index, {})[key] = value
    _plan_groups(plan, saved_of, wanted, optimizer_class)


def _padding(target: EngineTarget, index: int, saved_of: Mapping[str, str]) -> Iterator[tuple[str, Piece]]:
    """For a partition that is padding alone, an empty slot of one of its group's parameters.

    DeepSpeed's optimizer keeps state for such a partition too, and counts its steps.
    """
    for name in target.groups[target.flats[index].param_group]:
        if name in saved_of:
            yield name, Piece(Place(target.rank, index), 0, 0, 0)
            return


def _number(value: Any) -> Any:
    return read_tensor(value).item() if isinstance(value, LazyTensor) else value


def _is_wanted(wanted: KeptParts, name: str, number: int, key: str) -> bool:
    return (name, key) in wanted.states or (number, key) in wanted.states


def _plan_groups(
    plan: EnginePlan, saved_of: Mapping[str, str], wanted: KeptParts, optimizer_class: str
) -> None:
    zero = plan.zero
    optim = zero.any_optim if zero is not None else None
    if zero is None or optim is None or optim.groups is None:
        return
    at = f"optimizers/{optimizer_class}/param_groups"
    for index, names in enumerate(plan.target.groups):
        saved_groups = sorted(
            {optim.group_of[zero.checkpoint.parameters[saved_of[n]].group] for n in names if n in saved_of}
        )
        if not saved_groups:
            continue
        first = optim.groups[saved_groups[0]]
        if any(optim.groups[other] != first for other in saved_groups[1:]):
            plan.mismatch.wrong.append(
                f"{at}: this job's group {index} takes parameters from the checkpoint's groups {saved_groups}, whose "
                "hyperparameters differ; group the parameters as they were grouped when the checkpoint was saved"
            )
            continue
        own = plan.target.optimizer.param_groups[index]
        for key in ("betas", "momentum", "alpha"):
            if len(first) > 1 and (key in first) != (key in own):
                plan.mismatch.wrong.append(
                    f"{at}/{index}: the checkpoint's optimizer is of another kind: it has "
                    f"{', '.join(sorted(first))}; this job's has {', '.join(sorted(set(own) - {'params'}))}"
                )
                break
        if saved_groups[0] in wanted.groups:
            plan.groups[index] = wanted.groups[saved_groups[0]]
