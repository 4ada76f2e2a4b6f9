"""Finds the parts of a checkpoint in the state dict of a DCP folder, whatever program saved it. Pure.

The programs' own forms become those that a single file has, whose layouts `single_file.read_layout` knows:

    torchtitan       weights at the top level, beside ``optimizer``, ``lr_scheduler``, ``train_state`` ...
    Lightning        ``state_dict`` or ``model``, ``optimizer_0`` ..., and ``meta.pt`` beside the folder's files
    older Composers  ``optimizers`` beside ``state``
    others           ``model``, ``optim``, ``scheduler``, or a bare state dict: as a single file has them
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...saved.contents import Saved
from ...saved.demand import Demand
from ...saved.names import match_names
from ...saved.tensor import SavedTensor
from ..single_file import has_model, is_weight, parts_for, rng_list
from .optimizers import GROUPS, STATE, numbered, torch_form, with_names

KIND = "dcp"
_LIGHTNING_OPTIMIZER = re.compile(r"optimizer_(\d{1,4})")
_LIGHTNING_WEIGHTS = ("state_dict", "model")
_RANKS_RNG = re.compile(r"rng_(\d{1,6})")
"""A key for each rank's random states: DCP keeps one rank's value of what all ranks save under one key."""


def parts_of(tree: Mapping[str, Any], demand: Demand, *, name: str) -> Saved:
    """The checkpoint's parts, given its nested state dict with that of ``meta.pt``; `name` is what messages call it.

    Where the target is a DeepSpeed engine, an optimizer whose parameters have numbers gets the names of the engine's.
    Raises as `parts_for`.
    """
    found = parts_for(demand, _as_single_file(tree), file=name)
    state = dict(found.state)
    optimizers, schedulers = state.get("optimizers"), state.get("schedulers")
    if isinstance(optimizers, Mapping):
        made = {key: torch_form(one) for key, one in optimizers.items()}
        if demand.in_parts:
            made = _of_engine(made, state.get("model"), demand)
        state["optimizers"] = made
    if isinstance(schedulers, Mapping):
        state["schedulers"] = {key: _with_numbers(one) for key, one in schedulers.items()}
    return replace(found, kind=KIND, state=state)


def _as_single_file(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in a form that a single file may have."""
    tree = _with_rng(dict(tree))
    numbers = {int(found[1]): key for key in tree if (found := _LIGHTNING_OPTIMIZER.fullmatch(key))}
    weights = next((key for key in _LIGHTNING_WEIGHTS if isinstance(tree.get(key), Mapping)), None)
    if "pytorch-lightning_version" in tree and weights is not None:
        optimizers = [tree.pop(numbers[number]) for number in sorted(numbers)]
        return {**tree, "optimizer_states": optimizers, "state_dict": tree.pop(weights)}
    if numbers and weights is not None and "optimizer_states" not in tree:
        # Without its ``meta.pt``, or by Fabric.
        optimizers = [tree.pop(numbers[number]) for number in sorted(numbers)]
        return {**tree, "optimizers": optimizers}
    state = tree.get("state")
    if isinstance(state, Mapping) and "model" in state and isinstance(tree.get("optimizers"), Mapping):
        return {**tree, "state": {**state, "optimizers": tree.pop("optimizers")}}
    at_top = {key: value for key, value in tree.items() if is_weight(key, value)}
    if at_top and len(at_top) < len(tree) and not has_model(tree):
        return {"model": at_top, **{key: value for key, value in tree.items() if key not in at_top}}
    return tree


def _with_rng(tree: dict[str, Any]) -> dict[str, Any]:
    """The state dict with the random states of all ranks in a list, where they have keys of their own."""
    keys = {int(found[1]): key for key in tree if (found := _RANKS_RNG.fullmatch(key))}
    if "rng" in tree or sorted(keys) != list(range(len(keys))) or not keys:
        return tree
    states = [tree[keys[rank]] for rank in range(len(keys))]
    if rng_list(states) is None:
        return tree
    return {**{key: value for key, value in tree.items() if key not in keys.values()}, "rng": states}


def _of_engine(optimizers: Mapping[str, Any], model: Any, demand: Demand) -> dict[str, Any]:
    """The optimizers with the names of the saved `model` for their parameters, where these can be told."""
    made = dict(optimizers)
    if not isinstance(model, Mapping):
        return made
    saved_name = {new: old for old, new in match_names(model, demand.names, demand.rename).target_of.items()}
    groups = [[saved_name.get(name, name) for name, _ in group] for group in demand.groups]
    for key, one in optimizers.items():
        if isinstance(one, Mapping) and isinstance(one.get(STATE), Mapping) and numbered(one.get(GROUPS)):
            made[key] = with_names(one, groups) or one
    return made


def _with_numbers(scheduler: Any) -> Any:
    """A scheduler's state, with numbers for keys where all of a dict's are digits, as MultiStepLR's milestones have."""
    if isinstance(scheduler, list):
        return [_with_numbers(one) for one in scheduler]
    if not isinstance(scheduler, dict):
        return scheduler
    if scheduler and all(isinstance(key, str) and key.isdecimal() for key in scheduler):
        return {int(key): _with_numbers(one) for key, one in scheduler.items()}
    return {key: _with_numbers(one) for key, one in scheduler.items()}


def tensors_by_role(saved: Saved) -> list[tuple[str, str, SavedTensor]]:
    """Each tensor of the model and of the optimizers' state: ``model`` or the state's key, the name, the tensor."""
    found: list[tuple[str, str, SavedTensor]] = []
    model = saved.state.get("model")
    if isinstance(model, Mapping):
        found += [("model", name, value) for name, value in model.items() if isinstance(value, SavedTensor)]
    optimizers = saved.state.get("optimizers")
    for optimizer in optimizers.values() if isinstance(optimizers, Mapping) else ():
        state = optimizer.get(STATE) if isinstance(optimizer, Mapping) else None
        for name, entries in state.items() if isinstance(state, Mapping) else ():
            if isinstance(name, str) and isinstance(entries, Mapping):
                found += [
                    (key, name, value) for key, value in entries.items() if isinstance(value, SavedTensor)
                ]
    return found
