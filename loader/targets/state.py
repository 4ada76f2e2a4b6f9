"""Restores a `State`: `StateTarget` checks every part, and plans a step for each, in one fixed order.

The order: model, optimizers, then schedulers, scaler, callbacks, timestamp and the other objects through their own
``load_state_dict``, at last plain values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..saved.contents import Saved
from ..saved.copies import Copy
from ..saved.demand import Demand
from ..saved.masters import name_masters
from ..saved.mismatch import Mismatch
from ..saved.tree import join_path
from ..state import PLAIN_PARTS, State, by_class_name
from .base import Change, Plan, RestoreOptions, Work, join
from .demand import demand_of, optimizer_groups
from .module import ModuleStep, plan_module
from .optimizer import OptimizerStep, plan_optimizers, without_hyperparameters
from .parts import (
    holds_state,
    kind_problem,
    loads_state,
    missing_part,
    own_state,
    state_problem,
    warn_of_parts,
    with_empty,
)

_OWN_PARTS = frozenset(
    {"model", "optimizers", "schedulers", "scaler", "algorithms", "callbacks", "timestamp", *PLAIN_PARTS}
)
_RECORDS = frozenset({"integrations", "metadata", "is_model_ddp", "is_model_deepspeed"})
"""Parts of Composer's layout that describe the checkpoint and restore nothing."""


@dataclass(frozen=True)
class ObjectStep:
    """Hands an object its saved state, through its own ``load_state_dict``."""

    label: str
    target: Any
    trees: Mapping[str, Any]
    """The one saved state, by its place in the checkpoint."""
    copies: tuple[Copy, ...] = ()

    def prepare(self, work: Work) -> Change:
        (real,) = work.real(self.trees).values()

        def change() -> list[str]:
            work.note_change(self.label)
            self.target.load_state_dict(with_empty(self.target, real))
            return [self.label]

        return change


@dataclass(frozen=True)
class ValueStep:
    """Sets an attribute of the state to a saved plain value."""

    state: State
    part: str
    trees: Mapping[str, Any]
    """The one value, by its place in the checkpoint."""
    copies: tuple[Copy, ...] = ()

    def prepare(self, work: Work) -> Change:
        (real,) = work.real(self.trees).values()

        def change() -> list[str]:
            work.note_change(self.part)
            setattr(self.state, self.part, real)
            return [self.part]

        return change


_ORDER: tuple[type, ...] = (ModuleStep, OptimizerStep, ObjectStep, ValueStep)
"""In which steps are carried out."""


@dataclass(frozen=True)
class StateTarget:
    """A `State`, of whose model each rank keeps all, or its shards of DTensors."""

    state: State
    options: RestoreOptions
    with_model: bool = True
    """False where a DeepSpeed engine restores the model and the optimizers."""
    by_engine: Any = None
    """The scheduler that the engine restores itself, which the state may hold too."""

    def demand(self, rank: int, world_size: int) -> Demand:
        """What this rank keeps; see `Target`."""
        return demand_of(self.state, self.options, rank, world_size, by_shards=self.with_model)

    def plan(self, saved: Saved) -> Plan:
        """Matches `saved` with the state's parts. What this job holds and the checkpoint lacks is missing.

        Warns of objects whose state has no place in this job and, without ``strict``, of those that are missing. See
        `Target`.
        """
        plan = join(self._parts(saved))
        plan.mismatch.weights_alone = saved.whole.state.keys() == {"model"}
        if not self.options.weights_only:
            warn_of_parts(plan, saved, strict=self.options.strict, alone=self.state.model is None)
        return replace(plan, steps=tuple(sorted(plan.steps, key=lambda step: _ORDER.index(type(step)))))

    def _parts(self, saved: Saved) -> Iterator[Plan]:
        options = self.options
        if self.with_model and self.state.model is None:
            yield Plan(not_restored=("state/model",) if "model" in saved.state else ())
        elif self.with_model and "model" not in options.leave_out:
            named = name_masters(saved, optimizer_groups(self.state), options.rename)
            yield plan_module(self.state.model, named, options).as_plan()
        if options.weights_only:
            return
        if self.with_model and "optimizers" not in options.leave_out:
            yield from self._optimizers(saved)
        yield self._objects(saved, "schedulers", "scheduler")
        yield self._objects(saved, "scaler", "scaler")
        yield self._objects(saved, "callbacks", "callback")
        yield self._timestamp(saved.state.get("timestamp"))
        yield self._lacking(saved)
        for part in PLAIN_PARTS:
            if part in saved.state:
                yield self._plain(part, saved.state[part])
        rest = (part for part in saved.state if part not in _OWN_PARTS and part not in _RECORDS)
        yield Plan(not_restored=tuple(f"state/{part}" for part in rest))

    def _optimizers(self, saved: Saved) -> Iterator[Plan]:
        plans, rest = plan_optimizers(self.state, saved, self.options)
        yield from (plan.as_plan() for plan in plans)
        yield rest
        yield Plan(notes=without_hyperparameters(plans, saved))
        states = saved.state.get("optimizers") or {}
        for name, optimizer in by_class_name(self.state.optimizers).items():
            if name in states and not hasattr(optimizer, "param_groups"):
                problem = kind_problem(optimizer, states[name], named=_named(saved))
                if problem:
                    wrong = f"optimizers/{name}: the checkpoint's {problem}"
                    yield Plan(mismatch=Mismatch(wrong=[wrong]))
                else:
                    yield _of_object(f"optimizer {name}", optimizer, states[name], f"state/optimizers/{name}")

    def _objects(self, saved: Saved, part: str, kind: str) -> Plan:
        """Restores each of the part's objects that the checkpoint has a state for, of the object's kind."""
        if part in self.options.leave_out:
            return Plan()
        whole, states = saved.whole.state.get(part), saved.state.get(part)
        if whole is not None and not isinstance(whole, Mapping):
            return Plan(not_restored=(f"state/{part}",))
        known: Mapping[Any, Any] = whole or {}
        left = states if isinstance(states, Mapping) else {}
        found: list[Plan] = []
        missing: list[str] = []
        claimed = set()
        own = getattr(self.state, part)
        for name, target in by_class_name(own).items():
            if target is self.by_engine and target is not None:
                continue
            key = _key_for(name, target, known)
            if key is None:
                if holds_state(target):
                    missing.append(missing_part(f"{part}/{name}", known))
                continue
            if key not in left:
                continue  # ignored
            problem = None
            if loads_state(target) and part != "callbacks":
                problem = state_problem(target, left[key], named=_named(saved))
            if problem:
                missing.append(f"{part}/{name}: the checkpoint's {problem}")
            elif part != "scaler" or own_state(target) or not left[key]:
                # A disabled scaler has no place for a state.
                claimed.add(key)
                if left[key] or part != "scaler":
                    if not loads_state(target):
                        target = _PlainItem(own, next(i for i, item in enumerate(own) if item is target))
                    found.append(
                        _of_object(f"{kind} {name}", target, left[key], join_path(f"state/{part}", key))
                    )
        rest = (key for key in left if key not in claimed and left[key])
        told = Plan(mismatch=Mismatch(missing), not_restored=tuple(f"state/{part}/{key}" for key in rest))
        return join([*found, told])

    def _lacking(self, saved: Saved) -> Plan:
        """Tells of the parts with one object, for which the checkpoint has nothing."""
        parts = ("timestamp", *PLAIN_PARTS)
        lacking = [
            part
            for part in parts
            if part not in saved.whole.state
            and part not in self.options.leave_out
            and holds_state(getattr(self.state, part))
        ]
        return Plan(mismatch=Mismatch([missing_part(part, ()) for part in lacking]))

    def _timestamp(self, saved: Any) -> Plan:
        if saved is None:
            return Plan()
        if isinstance(saved, Mapping) and len(saved) == 1:
            inner = next(iter(saved.values()))
            saved = inner if isinstance(inner, Mapping) else saved
        return self._plain("timestamp", saved)

    def _plain(self, part: str, saved: Any) -> Plan:
        own, place = getattr(self.state, part), f"state/{part}"
        if callable(getattr(own, "load_state_dict", None)):
            return _of_object(part, own, saved, place)
        if isinstance(own, Mapping) and isinstance(saved, Mapping) and _has_objects(own):
            return join(_metrics(own, saved, part))
        if part == "run_name" and own is not None:
            return Plan()  # this run's own name stands
        return Plan((ValueStep(self.state, part, {place: saved}),))


def _of_object(label: str, target: Any, saved: Any, place: str) -> Plan:
    return Plan((ObjectStep(label, target, {place: saved}),))


def _metrics(own: Mapping[Any, Any], saved: Mapping[Any, Any], part: str) -> Iterator[Plan]:
    """The objects in a mapping, and in mappings inside it."""
    for key, target in own.items():
        if key not in saved:
            continue
        label = f"{part}/{key}"
        if callable(getattr(target, "load_state_dict", None)):
            yield _of_object(label, target, _metric_state(saved[key]), f"state/{label}")
        elif isinstance(target, Mapping) and isinstance(saved[key], Mapping):
            for name, metric in target.items():
                if name in saved[key] and callable(getattr(metric, "load_state_dict", None)):
                    inner = f"{label}/{name}"
                    yield _of_object(inner, metric, _metric_state(saved[key][name]), f"state/{inner}")


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


def _named(saved: Saved) -> bool:
    """Whether the checkpoint names the classes of its objects itself; else they have this job's names."""
    return saved.layout == "composer"


def _has_objects(own: Mapping[Any, Any]) -> bool:
    return any(
        callable(getattr(value, "load_state_dict", None))
        or (isinstance(value, Mapping) and _has_objects(value))
        for value in own.values()
    )


def _metric_state(saved: Any) -> Any:
    """The metric's state, which Composer saves as ``{"state_dict": ..., "_computed": ...}``."""
    return saved["state_dict"] if isinstance(saved, Mapping) and "state_dict" in saved else saved
