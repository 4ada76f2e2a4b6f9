"""Restoring a state object that loads itself, such as Composer's ``State``.

It is handed real values in Composer's layout, after the same checks as anybody else's: names and shapes are
compared before anything is changed, and text that it would evaluate is handed on only where it is one call of a
registered constructor with literal arguments.
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
from ..sources.zero.whole import ENGINE
from ..state import by_class_name
from .algorithms import AlgorithmPass, metrics_logger, without_unregistered
from .module import ModulePlan, NoteChange, apply_module, module_tensors, parameter_names, plan_module
from .optimizer import OptimizerPlan, apply_optimizer, plan_optimizer


@dataclass
class ForeignPlan:
    """What a foreign state object will be handed, checked and not yet begun."""

    state: Any
    saved: dict[str, Any]
    """Composer's ``state`` dict, lazy, or as much of it as the object is to load itself."""
    module: ModulePlan | None
    mismatch: Mismatch
    weights_only: bool
    fill_module: bool = False
    """The module is filled from here: its tensors come in pieces, or go to shards."""
    optimizers: list[OptimizerPlan] = field(default_factory=list)
    """Filled from here: the checkpoint's state of them is partial, in pieces, or keyed by position."""
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
    """Checks `contents` against the model and the optimizers inside `state`; changes nothing.

    `masters` is `plan_module`'s.
    """
    saved = dict(contents.state)
    plan = ForeignPlan(state, saved, None, Mismatch(), weights_only)
    if saved.pop(ENGINE, None):
        plan.not_restored.append(f"state/{ENGINE}")
    # Names are matched with the model's here; the object is not to take a prefix off them once more.
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
        plan.mismatch.wrong.append(
            f"model: expected a dict of tensors, got a {type(saved['model']).__name__}"
        )
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
    """Where the object could not load an optimizer's state as it is, it is filled from here instead.

    Composer's hands it to torch, which wants an entry for every parameter, keyed by name.
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
    realise_options: Mapping[str, Any],
) -> list[str]:
    """Hands the state object its parts; returns them, for the receipt."""
    restored = []
    if plan.fill_module and plan.module is not None:
        apply_module(plan.module, reader, note_change, strict=strict, realise_options=realise_options)
        restored.append(f"model ({len(plan.module.sources)} entries, {plan.module.nbytes:,} bytes)")
    real = materialize(plan.saved, reader=reader, **realise_options)
    exclude = None if exclude_algorithms is None else list(exclude_algorithms)
    passes = None if algorithm_passes is None else list(algorithm_passes)
    logger = metrics_logger(logger)
    note_change(f"{type(plan.state).__qualname__} (all parts)")
    if not plan.weights_only:
        plan.state.load_state_dict(real, logger, exclude_algorithms=exclude, algorithm_passes=passes)
    elif "model" in real:
        # What was ignored or allowed to be missing is known by now, and would be an error once more.
        whole = (
            plan.module is not None
            and plan.module.sources.keys() == module_tensors(plan.module.module).keys()
        )
        plan.state.load_model_state(
            real, logger, strict=strict and whole, exclude_algorithms=exclude, algorithm_passes=passes
        )
    restored += [f"state/{key}" for key in plan.saved]
    for optimizer in plan.optimizers:
        apply_optimizer(optimizer, reader, note_change, **realise_options)
        restored.append(f"optimizer {optimizer.name} ({optimizer.nbytes:,} bytes)")
    return restored
