"""What of a checkpoint's optimizer becomes a DeepSpeed engine's: state, numbers and hyperparameters, only checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...materialize.tensors import read_tensor
from ...saved.intervals import Piece, Place
from ...saved.values import LazyTensor
from ...sources.zero.contents import ShardedTensor, Wanted
from ...sources.zero.optim_states import MASTER
from .plan import EnginePlan, fills_of
from .target import EngineTarget


def plan_states(plan: EnginePlan, found: Mapping[str, str], wanted: Wanted, optimizer_class: str) -> None:
    """Plans the optimizer's state, its numbers and its hyperparameters. `found` is what `plan_model` returned."""
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
    """Nothing of one of its group's parameters, for a partition that is padding alone.

    DeepSpeed's optimizer keeps state there too, and counts its steps.
    """
    for name in target.groups[target.flats[index].param_group]:
        if name in saved_of:
            yield name, Piece(Place(target.rank, index), 0, 0, 0)
            return


def _number(value: Any) -> Any:
    return read_tensor(value).item() if isinstance(value, LazyTensor) else value


def _is_wanted(wanted: Wanted, name: str, number: int, key: str) -> bool:
    return (name, key) in wanted.states or (number, key) in wanted.states


def _plan_groups(plan: EnginePlan, saved_of: Mapping[str, str], wanted: Wanted, optimizer_class: str) -> None:
    zero = plan.zero
    optim = zero.any_optim if zero is not None else None
    if zero is None or optim is None or optim.groups is None:
        return
    at = f"optimizers/{optimizer_class}/param_groups"
    for index, names in enumerate(plan.target.groups):
        origins = sorted(
            {optim.group_of[zero.checkpoint.parameters[saved_of[n]].group] for n in names if n in saved_of}
        )
        if not origins:
            continue
        first = optim.groups[origins[0]]
        if any(optim.groups[other] != first for other in origins[1:]):
            plan.mismatch.wrong.append(
                f"{at}: this job's group {index} takes parameters from the checkpoint's groups {origins}, whose "
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
        if origins[0] in wanted.groups:
            plan.groups[index] = wanted.groups[origins[0]]
