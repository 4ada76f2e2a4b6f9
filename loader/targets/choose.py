"""Chooses the target by what the caller passed as ``state``, and puts the targets of several parts together.

That is a `State`, an object that loads itself, or either with a DeepSpeed engine as its model, which takes its own
parts first; an engine's module, or a wrapper of either, stands for the engine. Algorithms that the checkpoint needs
come before all others: they change the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import OptionError
from ..saved.contents import ENGINE, Saved
from ..saved.copies import Copy
from ..saved.demand import Demand
from ..saved.mismatch import Mismatch
from ..state import ForeignState, State, as_list, by_class_name
from .algorithms import apply_required, ordered_algorithms, required_algorithms
from .base import Change, Plan, RestoreOptions, Target, Work, join
from .deepspeed.engine import EngineTarget
from .deepspeed.ownership import engine_behind, is_part_of
from .foreign import ForeignTarget
from .parts import kind_problem, loads_state, missing_part, warn_of_parts
from .state import StateTarget


def target_of(state: Any, options: RestoreOptions) -> Target:
    """The target that restores into `state`. Raises `OptionError` for an object of no known kind."""
    if not isinstance(state, State | ForeignState):
        raise OptionError(
            f"state={type(state).__name__}: expected a rankload.State, or an object with load_state_dict "
            "and load_model_state such as Composer's State"
        )
    model, optimizers = getattr(state, "model", None), as_list(getattr(state, "optimizers", None))
    engine = engine_behind(model, optimizers)
    live = engine is not None
    if live and "model" in options.leave_out:
        raise OptionError(
            "leave_out=['model'] with a DeepSpeed engine: its optimizer updates the weights in fp32, so that the one "
            "cannot be restored without the other. To restore other parts alone, load into State(model=None, ...)"
        )
    target: Target
    if isinstance(state, State):
        target = StateTarget(state, options, with_model=not live)
    else:
        target = ForeignTarget(state, options, with_model=not live)
    if live:
        others = tuple(name for name, one in by_class_name(optimizers).items() if not is_part_of(engine, one))
        inner = "" if engine is model else type(model).__name__
        target = _WithEngine(EngineTarget(engine, options), engine, target, state, options, others, inner)
    return _WithAlgorithms(state, target, options, changeable=not live)


@dataclass(frozen=True)
class _WithEngine:
    """A DeepSpeed engine, and the rest of the state that it is in."""

    engine: Target
    live: Any
    """The engine itself."""
    rest: StateTarget | ForeignTarget
    state: Any
    options: RestoreOptions
    others: tuple[str, ...] = ()
    """Names of the state's optimizers that are not the engine's."""
    inner: str = ""
    """The class of the model that stands for the engine; "" where it is the engine itself."""

    @property
    def scheduler(self) -> Any:
        """The engine's lr scheduler, where it takes a saved state; else None."""
        own = getattr(self.live, "lr_scheduler", None)
        return own if loads_state(own) else None

    @property
    def _without_optimizers(self) -> bool:
        return self.options.weights_only or "optimizers" in self.options.leave_out

    def demand(self, rank: int, world_size: int) -> Demand:
        """The engine's, with the names of the other parts' classes."""
        engine, rest = self.engine.demand(rank, world_size), self.rest.demand(rank, world_size)
        own = engine.engine_scheduler
        if self.scheduler is None:
            # What another job's engine saved goes to a scheduler beside this one.
            own = next(iter(rest.schedulers), own)
        return replace(
            engine,
            schedulers=rest.schedulers or engine.schedulers,
            engine_scheduler=own,
            scaler=rest.scaler,
        )

    def plan(self, saved: Saved) -> Plan:
        """Both plans as one: the engine takes its own parts of `saved`, and the rest all others.

        Of the schedulers, the engine takes the one that DeepSpeed saved: Composer keeps its own outside the engine's
        files. Where no engine saved the checkpoint, it takes the one of its scheduler's class. An engine without a
        scheduler leaves that one to the rest too.
        """
        told, schedulers = self._scheduler(saved)
        parts = frozenset({"model", "optimizers", ENGINE})
        own = frozenset({"schedulers"}) if schedulers and not told.mismatch.missing else frozenset()
        engine = self.engine.plan(replace(saved.only(parts | own), engine_schedulers=schedulers))
        others = saved.only(parts, without=True).without_schedulers(schedulers)
        rest = replace(self.rest, by_engine=self.scheduler if schedulers else None)
        return join([self._told(saved), engine, told, rest.plan(others)])

    def _scheduler(self, saved: Saved) -> tuple[Plan, frozenset[str]]:
        """What there is to tell of the engine's scheduler, and the keys of the saved ones that are for it."""
        own = self.scheduler
        options = self.options
        if own is None or options.weights_only or "schedulers" in options.leave_out:
            return Plan(), frozenset()
        name = f"schedulers/{type(own).__name__}"
        whole, left = saved.whole.state.get("schedulers") or {}, saved.state.get("schedulers") or {}
        beside = any(one is own for one in as_list(getattr(self.state, "schedulers", None)))
        keys = frozenset(key for key in whole if key in saved.engine_schedulers)
        if saved.data_parallel_size is None and not beside:
            keys = frozenset({type(own).__name__}.intersection(whole))
        told = Plan()
        if not keys and not beside:
            told = Plan(mismatch=Mismatch([missing_part(name, whole)]))
        for key in sorted(keys & left.keys()):
            problem = kind_problem(own, left[key], named=False)
            if problem:
                missing = Mismatch([f"{name}: the checkpoint's {problem}"])
                told = told.joined(Plan(mismatch=missing, not_restored=(f"state/schedulers/{key}",)))
        warn_of_parts(told, saved, strict=self.options.strict)
        return told, keys

    def _told(self, saved: Saved) -> Plan:
        """What the state holds besides or in place of the engine."""
        missing = [
            f"optimizers/{name}: it is not the engine's, whose own optimizer is all that is restored with it; load it "
            "by a State of its own model"
            for name in (() if self._without_optimizers else self.others)
        ]
        note = f"{self.inner} is the module of a DeepSpeed engine, or wraps one: the engine was restored"
        told = Plan(mismatch=Mismatch(missing), notes=(note,) if self.inner else ())
        warn_of_parts(told, saved, strict=self.options.strict)
        return told


@dataclass(frozen=True)
class _WithAlgorithms:
    """A state whose model may lack algorithms that the checkpoint was trained with."""

    state: Any
    target: Target
    options: RestoreOptions
    changeable: bool
    """Whether algorithms can change the model: the parameters of a DeepSpeed engine are laid out already."""

    def demand(self, rank: int, world_size: int) -> Demand:
        """The state's, as it is without those algorithms."""
        return self.target.demand(rank, world_size)

    def plan(self, saved: Saved) -> Plan:
        """The algorithms' plan where there are some to add, whose ``rest`` plans all else against the changed model.

        Raises `OptionError` where they cannot be added.
        """
        present = getattr(self.state, "algorithms", None)
        options = self.options
        if not isinstance(present, list) or {"model", "algorithms"} & options.leave_out:
            return self.target.plan(saved)
        if getattr(self.state, "model", None) is None:
            return self.target.plan(saved)
        missing = required_algorithms(saved.state.get("algorithms"), present, options.exclude_algorithms)
        if missing and not self.changeable:
            names = [type(algorithm).__qualname__ for algorithm in missing]
            raise OptionError(
                f"The checkpoint needs {[repr(a) for a in missing]}, which change the model, but the model is a "
                "DeepSpeed engine, whose parameters are laid out already. Apply them before "
                f"deepspeed.initialize and pass them in State(algorithms=...), or use exclude_algorithms={names!r}"
            )
        ordered = ordered_algorithms(missing, present, options.algorithm_passes)
        if not ordered:
            return self.target.plan(saved)
        return Plan((AlgorithmsStep(self.state, ordered),), rest=lambda: self.target.plan(saved))


@dataclass(frozen=True)
class AlgorithmsStep:
    """Adds algorithms to a state, and lets them change its model."""

    state: Any
    algorithms: Sequence[Any]
    """New objects, in the order in which they are applied."""
    copies: tuple[Copy, ...] = ()
    trees: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, work: Work) -> Change:
        """The rest raises `AlgorithmError` where applying one fails."""

        def change() -> list[str]:
            apply_required(self.algorithms, self.state, work.options.logger, work.note_change)
            return [f"algorithm {algorithm!r}" for algorithm in self.algorithms]

        return change
