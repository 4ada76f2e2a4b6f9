"""Restores a state object that loads itself, such as Composer's ``State``: a "foreign" state.

Names and shapes are compared before anything is changed, as for a `State`. Then the object's own ``load_state_dict``
gets real values in Composer's layout. Text that it would evaluate is among them only where it is one call of a
registered constructor with literal arguments. A model or optimizers that it could not load itself, because they are
saved in pieces, sharded, or not there under every name, are filled from here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...distributed.printable import warn
from ..saved.contents import ENGINE, Saved
from ..saved.copies import Copy
from ..saved.demand import Demand
from ..saved.masters import name_masters
from ..saved.mismatch import Mismatch
from ..state import as_list, by_class_name
from .algorithms import metrics_logger, without_unregistered
from .base import Change, Plan, RestoreOptions, Work, join
from .demand import demand_of, optimizer_groups
from .module import parameter_names, plan_module
from .optimizer import OptimizerPlan, plan_optimizers, without_hyperparameters
from .parts import holds_state, missing_part, state_problem, warn_of_parts

_PLACE = "state"


@dataclass(frozen=True)
class ForeignStep:
    """Hands the object real values, as much of the checkpoint as it loads itself."""

    state: Any
    trees: Mapping[str, Any]
    """Composer's ``state`` dict: one tree, because tensors in it may share memory."""
    complete: bool
    """Whether the weights in it are all that the module has."""
    copies: tuple[Copy, ...] = ()

    def prepare(self, work: Work) -> Change:
        """Does nothing beforehand: what it makes real may be large, and others hold what they have prepared."""
        return lambda: self._change(work)

    def _change(self, work: Work) -> list[str]:
        """No rank waits for another, but where the object's own loading does. Raises whatever that raises."""
        options = work.options
        real = work.real(self.trees)[_PLACE]
        exclude = None if options.exclude_algorithms is None else list(options.exclude_algorithms)
        passes = None if options.algorithm_passes is None else list(options.algorithm_passes)
        logger = metrics_logger(options.logger)
        work.note_change(f"{type(self.state).__qualname__} (all parts)")
        if not options.weights_only:
            self.state.load_state_dict(real, logger, exclude_algorithms=exclude, algorithm_passes=passes)
        elif "model" in real:
            # Missing names were checked in the plan; strict loading would refuse those that were ignored or allowed.
            self.state.load_model_state(
                real,
                logger,
                strict=options.strict and self.complete,
                exclude_algorithms=exclude,
                algorithm_passes=passes,
            )
        return [f"state/{key}" for key in self.trees[_PLACE]]


@dataclass(frozen=True)
class ForeignTarget:
    """A state object that loads itself, with a module and optimizers that are compared before."""

    state: Any
    options: RestoreOptions
    with_model: bool = True
    """False where a DeepSpeed engine restores the model and the optimizers."""
    by_engine: Any = None
    """The scheduler that the engine restores itself, which the state may hold too."""

    def demand(self, rank: int, world_size: int) -> Demand:
        """What this rank keeps; see `Target`."""
        return demand_of(self.state, self.options, rank, world_size)

    def plan(self, saved: Saved) -> Plan:
        """Checks `saved` against the model and the optimizers inside the state; see `Target`."""
        options = self.options
        handed_on = dict(saved.state)
        told = Plan(not_restored=(f"state/{ENGINE}",) if handed_on.pop(ENGINE, None) else ())
        # Names are matched with the model's here, so the object must not take DDP's prefix off them.
        handed_on.pop("is_model_ddp", None)
        if "algorithms" in handed_on:
            handed_on["algorithms"] = _evaluable(
                self.state, handed_on["algorithms"], options.exclude_algorithms
            )
        model, complete = Plan(), False
        if self.with_model and getattr(self.state, "model", None) is None:
            if handed_on.pop("model", None) is not None:
                told = told.joined(Plan(not_restored=("state/model",)))
        elif self.with_model and "model" not in options.leave_out:
            named = name_masters(saved, optimizer_groups(self.state), options.rename)
            module = plan_module(self.state.model, named, options)
            complete = "model" in handed_on and module.complete
            # Buffers whose values are still to be compared are compared by the step that fills the module. And a full
            # load cannot tell the object that names may be missing, which were ignored, or are tied to one that is
            # there.
            filled = "model" in handed_on and (
                module.spread or bool(module.unchecked) or not (complete or options.weights_only)
            )
            model = module.as_plan(filled=filled)
            if filled:
                del handed_on["model"]
            elif "model" in handed_on:
                handed_on["model"] = module.sources
        optimizers = Plan()
        if options.weights_only:
            handed_on = {key: handed_on[key] for key in ("model", "algorithms") if key in handed_on}
        elif (
            self.with_model
            and "optimizers" not in options.leave_out
            and isinstance(getattr(self.state, "optimizers", None), list | tuple)
        ):
            optimizers, filled = self._optimizers(saved)
            if filled:
                handed_on.pop("optimizers", None)
        if not options.weights_only:
            for part in ("schedulers", "scaler"):
                told = told.joined(self._objects(saved, part, handed_on))
            warn_of_parts(told.joined(optimizers), saved, strict=options.strict)
        own = Plan((ForeignStep(self.state, {_PLACE: handed_on}, complete),))
        return join([told, model, own, optimizers])

    def _objects(self, saved: Saved, part: str, handed_on: dict[str, Any]) -> Plan:
        """Tells of the part's objects for which the checkpoint has nothing, or a state of another kind; takes that out
        of `handed_on`. The object loads all others itself, and knows what it does not hold."""
        if part in self.options.leave_out:
            return Plan()
        whole = saved.whole.state.get(part)
        states = dict(handed_on[part]) if isinstance(handed_on.get(part), Mapping) else {}
        known: Mapping[Any, Any] = whole if isinstance(whole, Mapping) else {}
        missing, left = [], []
        for name, target in by_class_name(as_list(getattr(self.state, part, None))).items():
            if target is self.by_engine and target is not None:
                continue
            if name not in known:
                if holds_state(target):
                    missing.append(missing_part(f"{part}/{name}", known))
            elif name in states:
                problem = state_problem(target, states[name], named=saved.layout == "composer")
                if problem:
                    missing.append(f"{part}/{name}: the checkpoint's {problem}")
                    if states.pop(name):
                        left.append(f"state/{part}/{name}")
        if part in handed_on and known:
            handed_on[part] = states
        return Plan(mismatch=Mismatch(missing), not_restored=tuple(left))

    def _optimizers(self, saved: Saved) -> tuple[Plan, bool]:
        """The optimizers' plan, and whether they are filled from here: where the object could not load their state.

        Composer's ``State`` passes it to torch, which needs an entry for every parameter, keyed by name.
        """
        plans, rest = plan_optimizers(self.state, saved, self.options)
        whole = saved.whole.state.get("optimizers") or {}
        left = saved.state.get("optimizers") or {}
        names = parameter_names(getattr(self.state, "model", None))
        told = join([*(plan.as_plan(ahead=False) for plan in plans), rest])
        if told.mismatch.wrong or (
            not rest.not_restored
            and all(
                not plan.spread
                and plan.takes_as_saved
                and _loads_as_it_is(plan, left[plan.name], whole[plan.name], names)
                for plan in plans
            )
        ):
            # What the object loads itself is neither cast nor completed from here.
            return replace(told, steps=(), cast={}, reset=()), False
        return replace(told, notes=(*told.notes, *without_hyperparameters(plans, saved))), True


def _evaluable(state: Any, entries: Any, exclude: Collection[str] | None) -> Any:
    kept, refused = without_unregistered(entries, getattr(state, "algorithms", None) or ())
    for name in refused:
        if name not in (exclude or ()):
            warn(
                f"The checkpoint was trained with {name}, whose text is not one call of a registered constructor "
                "with literal arguments; it is not handed on. Weights of layers that it changes may fail to load",
                stacklevel=2,
            )
    return kept


def _loads_as_it_is(
    plan: OptimizerPlan, saved: Mapping[str, Any], whole: Mapping[str, Any], names: Mapping[int, str]
) -> bool:
    own = {names.get(id(param)) for param in plan.parameters}
    state = saved.get("state", {})
    return (
        "param_groups" in saved
        and own <= state.keys()
        and all(len(state[name]) == len(whole["state"][name]) for name in own)
    )
