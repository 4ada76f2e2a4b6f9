"""Restores a torch optimizer: matches the saved state to this job's parameters, then hands it to ``load_state_dict``.

`plan_optimizer` checks and changes nothing; `apply_optimizer` reads the tensors and changes the optimizer. State that
lies element by element along a parameter is read into memory like the parameter's, so a DTensor's state has its
placements; everything else, such as ``step``, is made as it was saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..materialize.objects import materialize
from ..materialize.tensors import CopyRequest, TensorReader, torch_dtype
from ..saved.assembled import AssembledTensor, SavedTensor
from ..saved.mismatch import Mismatch
from ..saved.names import match_names
from ..saved.values import LazyTensor, kind_of
from .dtensor import fill_requests, is_dtensor
from .module import NoteChange, dtype_name, parameter_names

TELLING = ("betas", "momentum", "eps", "rho")
"""Hyperparameters by which kinds of optimizers differ: torch's and DeepSpeed's optimizers name them alike."""
STEP = "step"
"""The key of the step count in a parameter's state."""
ELEMENTWISE = frozenset(
    {
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_inf",
        "momentum_buffer",
        "square_avg",
        "grad_avg",
        "acc_delta",
        "sum",
        "prev",
        "step_size",
        "mu_product_buffer",
        "ax",
    }
)
"""Keys of state tensors of torch's optimizers (``torch/optim``) that have an element for each of the parameter's."""


@dataclass(frozen=True)
class Zeros:
    """Zeros in place of a saved tensor that was ignored, where the optimizer needs the entry with the others."""

    shape: tuple[int, ...]
    dtype: str


@dataclass
class OptimizerPlan:
    """Which saved state goes to which of this optimizer's parameters; checked, nothing changed yet."""

    optimizer: Any
    name: str
    state: dict[int, dict[str, Any]]
    """Position of the parameter in the optimizer to its lazy entries."""
    param_groups: list[dict[str, Any]]
    mismatch: Mismatch
    reset: list[str] = field(default_factory=list)
    """Ignored entries that the optimizer needs with the others: set to zero."""
    cast: dict[str, str] = field(default_factory=dict)
    """Entries whose dtype changes: ``optimizers/CLASS/state/NAME/KEY`` to ``source dtype -> target dtype``."""
    keep: set[int] = field(default_factory=set)
    """Positions whose own state stays: the checkpoint does not have the parameter, or its state was ignored."""

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The optimizer's, by position."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensors as they were saved."""
        return sum(
            value.nbytes
            for entries in self.state.values()
            for value in entries.values()
            if isinstance(value, SavedTensor)
        )

    @property
    def spread(self) -> bool:
        """Whether state is saved in runs or goes to shards, so that only `apply_optimizer` can place it."""
        values = (value for entries in self.state.values() for value in entries.values())
        return any(isinstance(value, AssembledTensor) for value in values) or any(
            map(is_dtensor, self.parameters)
        )


def plan_optimizer(
    optimizer: torch.optim.Optimizer,
    name: str,
    saved: Mapping[str, Any],
    *,
    parameter_names: Mapping[int, str],
    unfiltered: Mapping[str, Any] | None = None,
    rename: Mapping[str, str] | None = None,
) -> OptimizerPlan:
    """Matches the optimizer state `saved` with `optimizer`'s parameters; changes nothing, and no rank waits.

    Parameters are matched by name where the checkpoint has names (Composer's keys, torch's ``param_names``),
    by position otherwise. What does not fit is in the plan's ``mismatch``, for the caller to raise.

    Args:
        name: what messages and the receipt call the optimizer.
        saved: ``{"state": ..., "param_groups": ...}``, lazy, as ``ignore_keys`` left it.
        parameter_names: ``id`` of a parameter to its name.
        unfiltered: `saved` before ``ignore_keys``.
        rename: saved name to this job's, before names are matched.
    """
    whole = unfiltered if unfiltered is not None else saved
    plan = OptimizerPlan(optimizer, name, {}, [], Mismatch())
    at = f"optimizers/{name}"
    own_groups = optimizer.param_groups
    own = plan.parameters
    saved_state = saved.get("state", {})
    whole_state = whole.get("state", {})
    if not isinstance(saved_state, Mapping) or not isinstance(whole_state, Mapping):
        plan.mismatch.wrong.append(f"{at}/state: expected a dict, got a {kind_of(saved_state)}")
        return plan
    groups = _groups(whole, at, plan.mismatch)
    if groups is None:
        return plan
    _check_kind(groups, own_groups, at, plan)
    names = _saved_names(groups, whole_state)
    if names is not None:
        keys = _match_by_name(own, own_groups, names, groups, parameter_names, rename, at, plan)
    else:
        keys = _match_by_position(own_groups, groups, at, plan)
    if "param_groups" not in saved:
        plan.param_groups = [dict(group) for group in optimizer.state_dict()["param_groups"]]
    elif not plan.mismatch.wrong:
        _fill_groups(plan, saved["param_groups"], groups)
    ignored = "state" in whole and "state" not in saved
    plan.keep.update(position for position in range(len(own)) if ignored or position not in keys)
    for position, key in keys.items():
        if key not in whole_state:
            continue
        entries = _entries(plan, saved_state.get(key), whole_state[key], own[position], f"{at}/state/{key}")
        if entries is not None:
            _take_step(entries, groups, key)
            plan.state[position] = entries
        else:
            plan.keep.add(position)
    return plan


def _groups(saved: Mapping[str, Any], at: str, mismatch: Mismatch) -> list[dict[str, Any]] | None:
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups
    ):
        mismatch.wrong.append(f"{at}/param_groups: expected a list of dicts with params")
        return None
    return [dict(group) for group in groups]


def _check_kind(
    groups: Sequence[Mapping[str, Any]], own_groups: Sequence[Mapping[str, Any]], at: str, plan: OptimizerPlan
) -> None:
    """Notes an optimizer of another kind, by its hyperparameters: DeepSpeed's and hand-written files have no class
    name."""
    theirs = [key for key in TELLING if any(key in group for group in groups)]
    mine = [key for key in TELLING if any(key in group for group in own_groups)]
    if theirs and mine and theirs != mine:
        plan.mismatch.wrong.append(
            f"{at}: expected an optimizer with {', '.join(mine)}, got one with {', '.join(theirs)}: another kind than "
            f"{type(plan.optimizer).__name__}; use the optimizer that was saved, or ignore state/{at}"
        )


def _saved_names(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
) -> dict[str, tuple[int, Any]] | None:
    """Parameter name to (group, key of its state); None where the checkpoint has no names."""
    found: dict[str, tuple[int, Any]] = {}
    for index, group in enumerate(groups):
        names = group.get("param_names")
        if not isinstance(names, list | tuple) or len(names) != len(group["params"]):
            names = group["params"]
        if not all(isinstance(name, str) for name in names):
            return None
        for name, key in zip(names, group["params"], strict=True):
            found[name] = (index, key)
    # Composer 0.32 writes names in ``state``; where a parameter has none there, its group still lists it.
    return found if found or not state else None


def _match_by_name(
    own: Sequence[torch.Tensor],
    own_groups: Sequence[Mapping[str, Any]],
    names: Mapping[str, tuple[int, Any]],
    groups: Sequence[Mapping[str, Any]],
    parameter_names: Mapping[int, str],
    rename: Mapping[str, str] | None,
    at: str,
    plan: OptimizerPlan,
) -> dict[int, Any]:
    own_names = [
        parameter_names.get(id(parameter), f"(unnamed parameter {i})") for i, parameter in enumerate(own)
    ]
    match = match_names(names, own_names, rename)
    source_of = {target: source for source, target in match.target_of.items()}
    # A parameter that is not trained has no saved state; some jobs give it to the optimizer all the same.
    untrained = {name for name, parameter in zip(own_names, own, strict=True) if not parameter.requires_grad}
    plan.mismatch.missing.extend(f"{at}/{name}" for name in match.missing if name not in untrained)
    plan.mismatch.unexpected.extend(f"{at}/{name}" for name in match.unexpected)
    keys: dict[int, Any] = {}
    position = 0
    for group in own_groups:
        saved_groups: list[int] = []
        for _ in group["params"]:
            source = source_of.get(own_names[position])
            if source is not None:
                saved_group, keys[position] = names[source]
                if saved_group not in saved_groups:
                    saved_groups.append(saved_group)
            position += 1
        hyper = [_hyperparameters(groups[index]) for index in saved_groups]
        if any(other != hyper[0] for other in hyper[1:]):
            plan.mismatch.wrong.append(
                f"{at}: one parameter group of this job takes parameters from the checkpoint's groups "
                f"{', '.join(map(str, sorted(saved_groups)))}, whose hyperparameters differ; group the parameters as "
                "they were grouped when the checkpoint was saved"
            )
        plan.param_groups.append({"from": saved_groups[0]} if saved_groups else {})
    return keys


def _match_by_position(
    own_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    at: str,
    plan: OptimizerPlan,
) -> dict[int, Any]:
    expected = [len(group["params"]) for group in own_groups]
    got = [len(group["params"]) for group in groups]
    if expected != got:
        plan.mismatch.wrong.append(
            f"{at}: expected parameter groups of {expected} parameters, got {got}; the checkpoint does not name "
            "its optimizer's parameters, so they can only be matched by position"
        )
        return {}
    plan.param_groups = [{"from": index} for index in range(len(groups))]
    keys = [key for group in groups for key in group["params"]]
    return dict(enumerate(keys))


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _fill_groups(plan: OptimizerPlan, left: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Puts the saved hyperparameters over this optimizer's own, and its own positions as ``params``.

    `left` are the saved `groups` that ``ignore_keys`` left. Their positions have shifted, so their parameters identify
    them.
    """
    kept = {
        str(group["params"]): group
        for group in (left if isinstance(left, list) else ())
        if isinstance(group, Mapping) and "params" in group
    }
    filled = []
    for match, current in zip(plan.param_groups, plan.optimizer.state_dict()["param_groups"], strict=True):
        group = dict(current)
        if "from" in match:
            group.update(_hyperparameters(kept.get(str(groups[match["from"]]["params"]), {})))
        filled.append(group)
    plan.param_groups = filled


def _entries(
    plan: OptimizerPlan, saved: Any, whole: Any, parameter: torch.Tensor, at: str
) -> dict[str, Any] | None:
    """One parameter's entries: the checkpoint's; where some were ignored, this optimizer's own, or zeros. None where
    all were, or none were saved."""
    if not isinstance(whole, Mapping):
        plan.mismatch.wrong.append(f"{at}: expected a dict, got a {kind_of(whole)}")
        return None
    if not saved:
        return None
    entries: dict[str, Any] = {}
    current = plan.optimizer.state.get(parameter, {})
    for key, value in whole.items():
        if key in saved:
            entries[key] = saved[key]
        elif key in current:
            entries[key] = current[key]
        elif isinstance(value, SavedTensor):
            entries[key] = Zeros(value.shape, value.dtype)
            plan.reset.append(f"{at}/{key}")
        elif isinstance(value, int | float):
            entries[key] = type(value)(0)
            plan.reset.append(f"{at}/{key}")
        _check_entry(value, key, parameter, f"{at}/{key}", plan.mismatch)
        cast = _cast_of(entries.get(key), key, parameter)
        if cast is not None:
            plan.cast[f"{at}/{key}"] = cast
    return entries


def _check_entry(value: Any, key: str, parameter: torch.Tensor, at: str, mismatch: Mismatch) -> None:
    """Notes in `mismatch` a saved `value` that should have the shape of `parameter` and has another one."""
    if not isinstance(value, SavedTensor) or isinstance(parameter, torch.nn.UninitializedParameter):
        return
    along = value.shape == tuple(parameter.shape)
    if isinstance(value, AssembledTensor):
        wrong = not along
    elif is_dtensor(parameter) and key != STEP and value.numel != 1:
        if not along:
            mismatch.wrong.append(
                f"{at}: has shape {value.shape} for a parameter of shape {tuple(parameter.shape)} that is sharded; "
                "only state that lies element by element along the parameters can be spread over the ranks"
            )
        return
    else:
        wrong = key in ELEMENTWISE and not along and not parameter.is_meta
    if wrong:
        mismatch.wrong.append(f"{at}: expected shape {tuple(parameter.shape)}, got {value.shape}")


def _cast_of(value: Any, key: str, parameter: torch.Tensor) -> str | None:
    """``source -> target`` where the entry will have another dtype than saved; else None."""
    if not isinstance(value, SavedTensor) or not lies_along(value, key, parameter):
        return None
    target = dtype_name(_dtype_along(value, parameter))
    return None if target == value.dtype else f"{value.dtype} -> {target}"


def _take_step(entries: dict[str, Any], groups: Sequence[Mapping[str, Any]], key: Any) -> None:
    """Adds the group's step count: some of DeepSpeed's optimizers keep it there, torch's in each parameter's state."""
    if STEP not in entries:
        for group in groups:
            if STEP in group and key in group["params"]:
                entries[STEP] = group[STEP]


def apply_optimizer(
    plan: OptimizerPlan, reader: TensorReader, note_change: NoteChange, **materialize_options: Any
) -> None:
    """Carries out `plan` through the optimizer's own ``load_state_dict``, which keeps the new tensors as they are.

    A parameter that the checkpoint does not have, or whose state was ignored, keeps its state; one that was saved
    without state has none afterwards. `note_change` is called with the part's name before the change;
    `materialize_options` are `materialize`'s ``safe_types`` and ``file``. No rank waits for another.

    Raises `CorruptError` where bytes are missing or do not match their checksum; the optimizer is unchanged then.
    """
    current = plan.optimizer.state_dict()["state"]
    kept = {position: entries for position, entries in current.items() if position in plan.keep}
    fresh = _real_entries(plan.state, plan.parameters, name=plan.name, reader=reader, **materialize_options)
    groups = materialize(plan.param_groups, reader=reader, **materialize_options)
    note_change(f"optimizer {plan.name}")
    plan.optimizer.load_state_dict({"state": {**kept, **fresh}, "param_groups": groups})


def _real_entries(
    state: Mapping[int, Mapping[str, Any]],
    parameters: Sequence[torch.Tensor],
    *,
    name: str,
    reader: TensorReader,
    **materialize_options: Any,
) -> dict[int, dict[str, Any]]:
    """`state` (by position in `parameters`) as real values; `name` is the optimizer's in messages.

    An entry that `lies_along` its parameter is read into new memory such as the optimizer would have made: of the
    parameter's device, dtype and placements. Everything else is as it was saved.
    """
    found: dict[int, dict[str, Any]] = {}
    requests: list[CopyRequest] = []
    for position, entries in state.items():
        parameter = parameters[position]
        along = {key for key, value in entries.items() if lies_along(value, key, parameter)}
        # One call for each parameter, so that no two share a step, which is counted up in place.
        real = materialize(
            {key: entries[key] for key in entries if key not in along}, reader=reader, **materialize_options
        )
        for key in along:
            value = entries[key]
            dtype = _dtype_along(value, parameter)
            if isinstance(value, Zeros):
                real[key] = torch.zeros_like(parameter.detach(), dtype=dtype)
                continue
            real[key] = torch.empty_like(parameter.detach(), dtype=dtype)
            requests.extend(fill_requests(value, real[key], f"optimizers/{name}/state/{position}/{key}"))
        found[position] = {key: _zeros(real[key]) for key in entries}
    reader.copy(requests)
    return found


def lies_along(value: Any, key: str, parameter: torch.Tensor) -> bool:
    """Whether the entry is read into memory like the parameter's, rather than made as it was saved.

    So are tensors saved in runs, and what has the shape of a DTensor parameter. A tensor that is saved whole and goes
    to an ordinary parameter is made as it was saved.
    """
    if isinstance(value, AssembledTensor):
        return True
    if isinstance(value, LazyTensor) and not is_dtensor(parameter):
        return False
    return key != STEP and isinstance(value, LazyTensor | Zeros) and value.shape == tuple(parameter.shape)


def _dtype_along(value: SavedTensor | Zeros, parameter: torch.Tensor) -> torch.dtype:
    """The dtype of state along `parameter`: torch's optimizers cast floating-point state to the parameter's dtype."""
    saved = torch_dtype(value.dtype)
    floats = saved.is_floating_point and parameter.is_floating_point()
    return parameter.dtype if floats else saved


def _zeros(value: Any) -> Any:
    if not isinstance(value, Zeros):
        return value
    return torch.zeros(value.shape, dtype=torch_dtype(value.dtype))


def optimizer_groups(state: Any) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Name and shape of each parameter of each group of the first optimizer in `state`; [] where it has none.

    With ZeRO stage 0, whose files do not name the optimizer's parameters, these names are assigned by position.
    """
    optimizers = getattr(state, "optimizers", None)
    first = next(iter(optimizers), None) if isinstance(optimizers, list | tuple) else optimizers
    names = parameter_names(state.model)
    return [
        [(names.get(id(parameter), "(unnamed)"), tuple(parameter.shape)) for parameter in group["params"]]
        for group in getattr(first, "param_groups", ())
    ]
