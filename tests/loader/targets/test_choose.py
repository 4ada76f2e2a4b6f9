"""Which target takes which parts of a checkpoint, where a DeepSpeed engine is the model (here played by another)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from rankload.loader.errors import OptionError
from rankload.loader.saved.contents import Saved
from rankload.loader.saved.demand import Demand
from rankload.loader.saved.model_parallel import Position
from rankload.loader.state import State
from rankload.loader.targets import algorithms, choose
from rankload.loader.targets.algorithms import register_algorithm
from rankload.loader.targets.base import Plan, RestoreOptions
from rankload.loader.targets.choose import target_of
from torch import nn


class Engine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.own = torch.optim.SGD(self.inner.parameters())


ENGINES = ("model", "optimizers", "engine")
"""The parts that an engine takes."""


class Taking:
    """In place of an engine's target: remembers what it is given."""

    taken: Saved

    def __init__(self, engine: Any, options: RestoreOptions) -> None:
        Taking.engine = engine

    def demand(self, rank: int, world_size: int) -> Demand:
        return Demand(Position(rank, world_size), optimizers=("Its",), schedulers=("Its",), parameters={})

    def plan(self, saved: Saved) -> Plan:
        Taking.taken = saved
        return Plan(not_restored=("engine's",))


class Schedule:
    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None: ...


class Adds:
    @staticmethod
    def required_on_load() -> bool:
        return True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(choose, "EngineTarget", Taking)
    own = Engine()
    monkeypatch.setattr(choose, "engine_behind", lambda model, _: own if model in (own, own.inner) else None)
    monkeypatch.setattr(choose, "is_part_of", lambda engine, optimizer: optimizer is engine.own)
    return own


def saved(**more: Any) -> Saved:
    state = {
        "model": {},
        "optimizers": {},
        "schedulers": {"Schedule": {"value": 3}},
        "timestamp": {"batch": 1},
        "engine": {"a": 1},
    }
    return Saved("a checkpoint", "deepspeed", "deepspeed", state, **{"data_parallel_size": 1, **more})


def planned(state: State, whole: Saved, **options: Any) -> tuple[Plan, list[str], list[str]]:
    """The plan, the labels of its steps, and the warnings that came with it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plan = target_of(state, RestoreOptions(**options)).plan(whole.with_tree(whole.as_tree()))
    labels = [getattr(step, "label", getattr(step, "part", "")) for step in plan.steps]
    return plan, labels, [str(one.message) for one in told]


def test_an_engine_takes_the_scheduler_that_deepspeed_saved(engine: Engine) -> None:
    engine.lr_scheduler = Schedule(4)
    theirs = saved(engine_schedulers=frozenset({"Schedule"}), data_parallel_size=1)
    for schedulers in (None, engine.lr_scheduler):
        plan, labels, told = planned(State(engine, schedulers=schedulers), theirs)
        assert set(Taking.taken.state) == set(Taking.taken.whole.state) == {*ENGINES, "schedulers"}
        assert (labels, told) == (["timestamp"], [])
        assert plan.not_restored == ("engine's",)
        assert not plan.mismatch.missing
    # Another object beside the engine's has no counterpart.
    plan, _, _ = planned(State(engine, schedulers=Schedule(4)), theirs)
    assert plan.mismatch.missing == ["schedulers/Schedule: the checkpoint has none"]


def test_an_engine_without_a_scheduler_leaves_the_saved_one_to_the_state(engine: Engine) -> None:
    theirs = saved(engine_schedulers=frozenset({"Schedule"}), data_parallel_size=1)
    for own in (Schedule(4), None):
        plan, labels, told = planned(State(engine, schedulers=own), theirs)
        assert set(Taking.taken.state) == set(ENGINES)
        assert labels == ["scheduler Schedule"] * (own is not None) + ["timestamp"]
        left = () if own else ("state/schedulers/Schedule",)
        assert plan.not_restored == ("engine's", *left)
        assert ["no counterpart" in text for text in told] == [True] * len(left)


def test_what_the_engines_scheduler_lacks_is_missing(engine: Engine) -> None:
    engine.lr_scheduler = Schedule(4)
    without = saved(data_parallel_size=1)
    del without.state["schedulers"]
    plan, _, told = planned(State(engine), without)
    assert (plan.mismatch.missing, told) == (["schedulers/Schedule: the checkpoint has none"], [])
    plan, _, told = planned(State(engine), without, strict=False)
    assert "lacks parts of this job, which stay as they are: schedulers/Schedule" in told[0]
    # Composer keeps the schedulers outside the engine's files.
    beside = State(engine, schedulers=engine.lr_scheduler)
    plan, labels, told = planned(beside, saved(data_parallel_size=1))
    assert (labels, plan.mismatch.missing, told) == (["scheduler Schedule", "timestamp"], [], [])
    assert set(Taking.taken.state) == set(ENGINES)
    plan, _, _ = planned(beside, without)
    assert plan.mismatch.missing == ["schedulers/Schedule: the checkpoint has none"]
    assert not planned(State(engine), without, weights_only=True)[0].mismatch.missing


def test_a_scheduler_of_another_kind_does_not_reach_the_engine(engine: Engine) -> None:
    engine.lr_scheduler = Schedule(4)
    other = saved(engine_schedulers=frozenset({"Schedule"}), data_parallel_size=1)
    other.state["schedulers"] = {"Schedule": {"last_batch_iteration": 3}}
    plan, _, told = planned(State(engine), other)
    assert plan.mismatch.missing == [
        "schedulers/Schedule: the checkpoint's is of another kind: it has last_batch_iteration; this job's has value"
    ]
    assert "state/schedulers/Schedule" in plan.not_restored
    assert "no counterpart" in told[0]
    assert set(Taking.taken.state) == set(ENGINES)


def test_each_scheduler_of_another_kind_is_named(engine: Engine) -> None:
    engine.lr_scheduler = Schedule(4)
    other = saved(engine_schedulers=frozenset({"One", "Two"}), data_parallel_size=1)
    other.state["schedulers"] = {"One": {"last_batch_iteration": 3}, "Two": {"epoch": 3}}
    plan, _, _ = planned(State(engine), other)
    assert len(plan.mismatch.missing) == 2
    assert {"state/schedulers/One", "state/schedulers/Two"} <= set(plan.not_restored)


def test_the_engine_knows_its_parts_and_the_state_its_other_classes(engine: Engine) -> None:
    demand = target_of(State(engine, schedulers=Schedule()), RestoreOptions()).demand(1, 2)
    assert (demand.optimizers, demand.schedulers, demand.scaler) == (("Its",), ("Schedule",), "GradScaler")
    assert demand.in_parts
    assert target_of(State(engine), RestoreOptions()).demand(1, 2).schedulers == ("Its",)


def test_an_engine_takes_the_scheduler_of_its_class_that_no_engine_saved(engine: Engine) -> None:
    engine.lr_scheduler = Schedule(4)
    one = saved(data_parallel_size=None)
    plan, labels, told = planned(State(engine), one)
    assert set(Taking.taken.state) == {*ENGINES, "schedulers"}
    assert Taking.taken.engine_schedulers == {"Schedule"}
    assert (labels, told, plan.mismatch.missing) == (["timestamp"], [], [])
    # One that the state holds too is restored there.
    plan, labels, _ = planned(State(engine, schedulers=engine.lr_scheduler), one)
    assert set(Taking.taken.state) == set(ENGINES)
    assert (labels, plan.mismatch.missing) == (["scheduler Schedule", "timestamp"], [])
    one.state["schedulers"] = {"StepLR": {"value": 3}}
    plan, _, _ = planned(State(engine), one)
    assert plan.mismatch.missing == ["schedulers/Schedule: the checkpoint has StepLR"]
    assert "state/schedulers/StepLR" in plan.not_restored


def test_an_engines_module_stands_for_it_and_says_so(engine: Engine) -> None:
    whole = saved()
    plan = target_of(State(engine.inner, engine.own), RestoreOptions()).plan(whole)
    assert set(Taking.taken.state) == {"model", "optimizers", "engine"}
    assert plan.notes == (
        "Linear is the module of a DeepSpeed engine, or wraps one: the engine was restored",
    )
    assert not plan.mismatch.missing
    assert not target_of(State(engine, engine.own), RestoreOptions()).plan(whole).notes


def test_an_optimizer_that_is_not_the_engines_is_missed(engine: Engine) -> None:
    other = torch.optim.Adam(nn.Linear(1, 1).parameters())
    (missing,) = (
        target_of(State(engine, [engine.own, other]), RestoreOptions()).plan(saved()).mismatch.missing
    )
    assert missing.startswith("optimizers/Adam: it is not the engine's")
    only = RestoreOptions(weights_only=True)
    assert not target_of(State(engine, [engine.own, other]), only).plan(saved()).mismatch.missing


def test_an_engines_model_cannot_be_changed_by_algorithms(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algorithms, "_REGISTRY", {})
    register_algorithm(Adds)
    whole = saved()
    whole.state["algorithms"] = [("Adds", {"repr": "Adds()"})]
    with pytest.raises(OptionError, match=r"DeepSpeed engine.*exclude_algorithms=\['Adds'\]"):
        target_of(State(engine), RestoreOptions()).plan(whole)
    target_of(State(engine), RestoreOptions(exclude_algorithms=["Adds"])).plan(whole)
    plan = target_of(State(nn.Linear(1, 1)), RestoreOptions()).plan(whole)
    assert [type(step).__name__ for step in plan.steps] == ["AlgorithmsStep"]
    assert plan.rest is not None


def test_anything_else_is_refused() -> None:
    with pytest.raises(OptionError, match=r"state=dict: expected a rankload\.State"):
        target_of({}, RestoreOptions())
