"""Restores a `State`: `plan_state` checks every part, then `apply_state` fills each, in one fixed order.

The order: model, optimizers, then schedulers, scaler, callbacks, timestamp and the other objects through their own
``load_state_dict``, at last plain values.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..materialize.objects import materialize
from ..materialize.tensors import TensorReader
from ..saved.assembled import SavedTensor
from ..saved.contents import Contents
from ..saved.mismatch import Mismatch
from ..saved.values import kind_of
from ..state import PLAIN_PARTS, State, by_class_name
from .module import ModulePlan, NoteChange, apply_module, parameter_names, plan_module
from .optimizer import OptimizerPlan, apply_optimizer, plan_optimizer

_OWN_PARTS = frozenset(
    {"model", "optimizers", "schedulers", "scaler", "algorithms", "callbacks", "timestamp", *PLAIN_PARTS}
)
_RECORDS = frozenset({"integrations", "metadata", "is_model_ddp", "is_model_deepspeed"})
"""Parts of Composer's layout that describe the checkpoint and restore nothing."""


@dataclass
class StatePlan:
    """Which part of a checkpoint goes to which of a `State`'s; checked, nothing changed yet."""

    state: State
    contents: Contents
    module: ModulePlan | None
    optimizers: list[OptimizerPlan]
    objects: list[tuple[str, Any, Any]]
    """(label, object with ``load_state_dict``, lazy state)."""
    values: dict[str, Any]
    """Attribute of the state to its lazy plain value."""
    mismatch: Mismatch
    not_restored: list[str] = field(default_factory=list)


def plan_state(
    state: State,
    contents: Contents,
    unfiltered: Contents,
    *,
    weights_only: bool,
    rename: Mapping[str, str] | None = None,
    with_model: bool = True,
    masters: Mapping[int, SavedTensor] | None = None,
) -> StatePlan:
    """Matches a checkpoint's contents with `state`; changes nothing, and no rank waits.

    Warns of parts that the checkpoint lacks. What does not fit is in the plan's ``mismatch``, for the caller to raise.

    Args:
        contents: the checkpoint's, as ``ignore_keys`` left them.
        unfiltered: the same before ``ignore_keys``.
        weights_only: plan the model alone.
        with_model: False where a DeepSpeed engine restores the model and the optimizers.
        rename, masters: as `plan_module` takes them.
    """
    plan = StatePlan(state, contents, None, [], [], {}, Mismatch())
    saved = contents.state
    if with_model:
        _plan_model(plan, unfiltered, rename, masters)
    if weights_only:
        return plan
    if with_model:
        _plan_optimizers(plan, unfiltered, rename)
    _plan_objects(plan, "schedulers", "scheduler")
    _plan_objects(plan, "scaler", "scaler")
    _plan_objects(plan, "callbacks", "callback")
    _plan_timestamp(plan)
    for part in PLAIN_PARTS:
        if part in saved:
            _plan_plain(plan, part, saved[part])
    plan.not_restored.extend(
        f"state/{part}" for part in saved if part not in _OWN_PARTS and part not in _RECORDS
    )
    return plan


def _plan_model(
    plan: StatePlan,
    unfiltered: Contents,
    rename: Mapping[str, str] | None,
    masters: Mapping[int, SavedTensor] | None,
) -> None:
    whole = unfiltered.state.get("model")
    if whole is None:
        plan.mismatch.missing.append("model: the checkpoint has no weights")
        return
    if "model" not in plan.contents.state:
        return  # ignored as a whole
    saved = plan.contents.state.get("model", {})
    if not isinstance(saved, Mapping) or not isinstance(whole, Mapping):
        plan.mismatch.wrong.append(f"model: expected a dict of tensors, got a {kind_of(saved)}")
        return
    plan.module = plan_module(plan.state.model, saved, all_names=whole, rename=rename, masters=masters)
    plan.mismatch.extend(plan.module.mismatch)


def _plan_optimizers(plan: StatePlan, unfiltered: Contents, rename: Mapping[str, str] | None) -> None:
    saved = plan.contents.state.get("optimizers") or {}
    whole = unfiltered.state.get("optimizers") or {}
    names = parameter_names(plan.state.model)
    own = by_class_name(plan.state.optimizers)
    for name, optimizer in own.items():
        if name in saved and not hasattr(optimizer, "param_groups"):
            plan.objects.append((f"optimizer {name}", optimizer, saved[name]))
        elif name in saved:
            found = plan_optimizer(
                optimizer, name, saved[name], parameter_names=names, unfiltered=whole[name], rename=rename
            )
            plan.optimizers.append(found)
            plan.mismatch.extend(found.mismatch)
        elif name not in whole:
            has = f"the checkpoint has {', '.join(map(str, whole))}" if whole else "the checkpoint has none"
            plan.mismatch.missing.append(f"optimizers/{name}: {has}")
    plan.not_restored.extend(f"state/optimizers/{name}" for name in saved if name not in own)


def _plan_objects(plan: StatePlan, part: str, kind: str) -> None:
    saved = plan.contents.state.get(part)
    if not isinstance(saved, Mapping):
        return
    claimed = set()
    own = getattr(plan.state, part)
    for name, target in by_class_name(own).items():
        key = _key_for(name, target, saved)
        if key is None:
            warnings.warn(f"The checkpoint has nothing for {kind} {name}; it stays as it is", stacklevel=2)
            continue
        if part == "schedulers" and not _same_schedule(target, saved[key]):
            warnings.warn(
                f"The checkpoint's {kind} {key} is of another kind than {name}, which stays as it is",
                stacklevel=2,
            )
            continue
        claimed.add(key)
        if not callable(getattr(target, "load_state_dict", None)):
            target = _PlainItem(own, next(i for i, item in enumerate(own) if item is target))
        elif not saved[key] and kind == "scaler":
            # A disabled GradScaler saves nothing, and an enabled one refuses to load that.
            warnings.warn(f"The checkpoint's {name} was disabled; this job's stays as it is", stacklevel=2)
            continue
        plan.objects.append((f"{kind} {name}", target, saved[key]))
    plan.not_restored.extend(f"state/{part}/{key}" for key in saved if key not in claimed and saved[key])


@dataclass(frozen=True)
class _PlainItem:
    """A plain value in a list of the state's objects: loading replaces the list's item."""

    items: list[Any]
    index: int

    def load_state_dict(self, value: Any) -> None:
        self.items[self.index] = value


def _key_for(name: str, target: Any, saved: Mapping[Any, Any]) -> Any | None:
    """The key of `target`'s state: its class name, Lightning's ``state_key``, or ``Class{arguments}``."""
    if name in saved:
        return name
    own = getattr(target, "state_key", None)
    if own in saved:
        return own
    base = type(target).__qualname__
    similar = [key for key in saved if isinstance(key, str) and key.startswith(base + "{")]
    return similar[0] if len(similar) == 1 else None


def _same_schedule(target: Any, saved: Any) -> bool:
    """Whether the saved scheduler is torch's where `target` is. DeepSpeed does not save the class's name, and its own
    schedulers save no ``last_epoch``."""
    own = target.state_dict() if callable(getattr(target, "state_dict", None)) else None
    if not isinstance(own, Mapping) or not isinstance(saved, Mapping) or "last_epoch" not in own:
        return True
    return "last_epoch" in saved or not saved


def _plan_timestamp(plan: StatePlan) -> None:
    saved = plan.contents.state.get("timestamp")
    if saved is None:
        return
    if isinstance(saved, Mapping) and len(saved) == 1:
        inner = next(iter(saved.values()))
        saved = inner if isinstance(inner, Mapping) else saved
    _plan_plain(plan, "timestamp", saved)


def _plan_plain(plan: StatePlan, part: str, saved: Any) -> None:
    own = getattr(plan.state, part)
    if callable(getattr(own, "load_state_dict", None)):
        plan.objects.append((part, own, saved))
    elif isinstance(own, Mapping) and isinstance(saved, Mapping) and _has_objects(own):
        for key, target in own.items():
            if key not in saved:
                continue
            if callable(getattr(target, "load_state_dict", None)):
                plan.objects.append((f"{part}/{key}", target, _metric_state(saved[key])))
            elif isinstance(target, Mapping) and isinstance(saved[key], Mapping):
                plan.objects.extend(
                    (f"{part}/{key}/{name}", metric, _metric_state(saved[key][name]))
                    for name, metric in target.items()
                    if name in saved[key] and callable(getattr(metric, "load_state_dict", None))
                )
    elif part == "run_name" and own is not None:
        return  # this run's own name stands
    else:
        plan.values[part] = saved


def _has_objects(own: Mapping[Any, Any]) -> bool:
    return any(
        callable(getattr(value, "load_state_dict", None))
        or (isinstance(value, Mapping) and _has_objects(value))
        for value in own.values()
    )


def _metric_state(saved: Any) -> Any:
    """The metric's state, which Composer saves as ``{"state_dict": ..., "_computed": ...}``."""
    return saved["state_dict"] if isinstance(saved, Mapping) and "state_dict" in saved else saved


def apply_state(
    plan: StatePlan,
    reader: TensorReader,
    note_change: NoteChange,
    *,
    strict: bool,
    materialize_options: Mapping[str, Any],
) -> list[str]:
    """Carries out `plan` on this rank; returns the parts that were restored, for the receipt. No rank waits.

    `note_change` is called with a part's name before that part is first changed. With `strict`, names that a module's
    own ``load_state_dict`` left out are an error. `materialize_options` are `materialize`'s ``safe_types`` and
    ``file``. Raises as `apply_module` and `apply_optimizer`, and whatever a part's ``load_state_dict`` raises.
    """
    restored = []
    if plan.module is not None and plan.module.sources:
        apply_module(plan.module, reader, note_change, strict=strict, materialize_options=materialize_options)
        restored.append(f"model ({len(plan.module.sources)} entries, {plan.module.nbytes:,} bytes)")
    for optimizer in plan.optimizers:
        apply_optimizer(optimizer, reader, note_change, **materialize_options)
        restored.append(f"optimizer {optimizer.name} ({optimizer.nbytes:,} bytes)")
    for label, target, saved in plan.objects:
        real = materialize(saved, reader=reader, **materialize_options)
        note_change(label)
        target.load_state_dict(real)
        restored.append(label)
    for part, saved in plan.values.items():
        real = materialize(saved, reader=reader, **materialize_options)
        note_change(part)
        setattr(plan.state, part, real)
        restored.append(part)
    return restored


def optimizer_classes(state: Any) -> Sequence[str]:
    """Class names of the optimizers of a `State` or foreign state, in order: files without class names take them."""
    return list(by_class_name(_objects(state, "optimizers")))


def scheduler_classes(state: Any) -> Sequence[str]:
    """Class names of its schedulers, in order."""
    return list(by_class_name(_objects(state, "schedulers")))


def scaler_class(state: Any) -> str:
    """Class name of its loss scaler; torch's own where there is none."""
    return next(iter(by_class_name(_objects(state, "scaler"))), "GradScaler")


def _objects(state: Any, part: str) -> list[Any]:
    value = getattr(state, part, None)
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
