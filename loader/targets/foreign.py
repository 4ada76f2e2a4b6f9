"""Restores a state object that loads itself, such as Composer's ``State``: a "foreign" state.

Names and shapes are compared before anything is changed, as for a `State`. Then the object's own ``load_state_dict``
gets real values in Composer's layout. Text that it would evaluate is among them only where it is one call of a
registered constructor with literal arguments. A model or optimizers that it could not load itself, because they are
saved in runs, sharded or partly ignored, are filled from here.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..materialize.objects import materialize
from ..materialize.tensors import TensorReader
from ..saved.assembled import SavedTensor
from ..saved.contents import Contents
from ..saved.mismatch import Mismatch
from ..saved.values import kind_of
from ..sources.zero.whole import ENGINE
from ..state import by_class_name
from .algorithms import AlgorithmPass, metrics_logger, without_unregistered
from .module import ModulePlan, NoteChange, apply_module, module_tensors, parameter_names, plan_module
from .optimizer import OptimizerPlan, apply_optimizer, plan_optimizer


@dataclass
class ForeignPlan:
    """What a foreign state object will load, and what is filled for it; checked, nothing changed yet."""

    state: Any
    saved: dict[str, Any]
    """Composer's ``state`` dict, lazy: as much of it as the object loads itself."""
    module: ModulePlan | None
    mismatch: Mismatch
    weights_only: bool
    fill_module: bool = False
    """Whether the module is filled from here: its tensors are saved in runs, or go to shards."""
    optimizers: list[OptimizerPlan] = field(default_factory=list)
    """Those filled from here: their saved state is partial, in runs, sharded, or keyed by position."""
    not_restored: list[str] = field(default_factory=list)


def plan_foreign(
    state: Any,
    contents: Contents,
    unfiltered: Contents,
    *,
    weights_only: bool,
    rename: Mapping[str, str] | None,
    exclude_algorithms: Collection[str] | None,
    with_model: bool = True,
    masters: Mapping[int, SavedTensor] | None = None,
) -> ForeignPlan:
    """Checks `contents` against the model and the optimizers inside `state`; changes nothing, and no rank waits.

    What does not fit is in the plan's ``mismatch``, for the caller to raise.

    Args:
        contents: the checkpoint's, as ``ignore_keys`` left them.
        unfiltered: the same before ``ignore_keys``.
        weights_only: plan the model and the algorithms alone.
        exclude_algorithms: names of algorithms not to warn of.
        with_model: False where a DeepSpeed engine restores the model and the optimizers.
        rename, masters: as `plan_module` takes them.
    """
    saved = dict(contents.state)
    plan = ForeignPlan(state, saved, None, Mismatch(), weights_only)
    if saved.pop(ENGINE, None):
        plan.not_restored.append(f"state/{ENGINE}")
    # Names are matched with the model's here, so the object must not take DDP's prefix off them.
    saved.pop("is_model_ddp", None)
    if "algorithms" in saved:
        saved["algorithms"] = _evaluable(state, saved["algorithms"], exclude_algorithms)
    if not with_model:
        saved.pop("model", None)
        saved.pop("optimizers", None)
    elif isinstance(saved.get("model"), Mapping):
        plan.module = plan_module(
            state.model,
            saved["model"],
            all_names=unfiltered.state["model"],
            rename=rename,
            masters=masters,
        )
        plan.mismatch.extend(plan.module.mismatch)
        if plan.module.spread:
            plan.fill_module = True
            saved.pop("model", None)
        else:
            saved["model"] = plan.module.sources
    elif "model" in saved:
        plan.mismatch.wrong.append(f"model: expected a dict of tensors, got a {kind_of(saved['model'])}")
    elif "model" not in unfiltered.state:
        plan.mismatch.missing.append("model: the checkpoint has no weights")
    if weights_only:
        plan.saved = {key: saved[key] for key in ("model", "algorithms") if key in saved}
    elif "optimizers" in saved and isinstance(getattr(state, "optimizers", None), list | tuple):
        _plan_optimizers(plan, unfiltered, rename)
    return plan


def _evaluable(state: Any, entries: Any, exclude: Collection[str] | None) -> Any:
    kept, refused = without_unregistered(entries, getattr(state, "algorithms", None) or ())
    for name in refused:
        if name not in (exclude or ()):
            warnings.warn(
                f"The checkpoint was trained with {name}, whose text is not one call of a registered constructor "
                "with literal arguments; it is not handed on. Weights of layers that it changes may fail to load",
                stacklevel=2,
            )
    return kept


def _plan_optimizers(plan: ForeignPlan, unfiltered: Contents, rename: Mapping[str, str] | None) -> None:
    """Takes the optimizers out of what the object loads where it could not load their state as it is.

    Composer's ``State`` passes it to torch, which needs an entry for every parameter, keyed by name.
    """
    saved, whole = plan.saved["optimizers"] or {}, unfiltered.state["optimizers"] or {}
    names = parameter_names(plan.state.model)
    own = by_class_name(list(plan.state.optimizers))
    found: list[OptimizerPlan] = []
    for name, optimizer in own.items():
        if name in saved:
            found.append(
                plan_optimizer(
                    optimizer,
                    name,
                    saved[name],
                    parameter_names=names,
                    unfiltered=whole[name],
                    rename=rename,
                )
            )
            plan.mismatch.extend(found[-1].mismatch)
        elif name not in whole:
            plan.mismatch.missing.append(
                f"optimizers/{name}: the checkpoint has {', '.join(whole) or 'none'}"
            )
    plan.not_restored.extend(f"state/optimizers/{name}" for name in saved if name not in own)
    if not plan.mismatch.wrong and not all(
        not one.spread and _loads_as_it_is(one, saved[one.name], whole[one.name], names) for one in found
    ):
        plan.optimizers = found
        del plan.saved["optimizers"]


def _loads_as_it_is(
    plan: OptimizerPlan, saved: Mapping[str, Any], whole: Mapping[str, Any], names: Mapping[int, str]
) -> bool:
    own = {names.get(id(param)) for group in plan.optimizer.param_groups for param in group["params"]}
    state = saved.get("state", {})
    return (
        "param_groups" in saved
        and own <= state.keys()
        and all(len(state[name]) == len(whole["state"][name]) for name in own)
    )


def apply_foreign(
    plan: ForeignPlan,
    logger: Any,
    reader: TensorReader,
    note_change: NoteChange,
    *,
    strict: bool,
    exclude_algorithms: Collection[str] | None,
    algorithm_passes: Sequence[AlgorithmPass] | None,
    materialize_options: Mapping[str, Any],
) -> list[str]:
    """Carries out `plan` on this rank; returns the parts that were restored, for the receipt. No rank waits, but where
    the object's own loading does.

    `exclude_algorithms` and `algorithm_passes` are passed on to the object. `note_change` is called with a part's name
    before that part is first changed; `materialize_options` are `materialize`'s ``safe_types`` and ``file``. Raises as
    `apply_module` and `apply_optimizer`, and whatever the object raises.
    """
    restored = []
    if plan.fill_module and plan.module is not None:
        apply_module(plan.module, reader, note_change, strict=strict, materialize_options=materialize_options)
        restored.append(f"model ({len(plan.module.sources)} entries, {plan.module.nbytes:,} bytes)")
    real = materialize(plan.saved, reader=reader, **materialize_options)
    exclude = None if exclude_algorithms is None else list(exclude_algorithms)
    passes = None if algorithm_passes is None else list(algorithm_passes)
    logger = metrics_logger(logger)
    note_change(f"{type(plan.state).__qualname__} (all parts)")
    if not plan.weights_only:
        plan.state.load_state_dict(real, logger, exclude_algorithms=exclude, algorithm_passes=passes)
    elif "model" in real:
        # Missing names were checked in the plan; strict loading would refuse those that were ignored or allowed.
        whole = (
            plan.module is not None
            and plan.module.sources.keys() == module_tensors(plan.module.module).keys()
        )
        plan.state.load_model_state(
            real, logger, strict=strict and whole, exclude_algorithms=exclude, algorithm_passes=passes
        )
    restored += [f"state/{key}" for key in plan.saved]
    for optimizer in plan.optimizers:
        apply_optimizer(optimizer, reader, note_change, **materialize_options)
        restored.append(f"optimizer {optimizer.name} ({optimizer.nbytes:,} bytes)")
    return restored
