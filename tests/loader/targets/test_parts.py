"""Schedulers, scalers and callbacks without a counterpart, and those of another kind than was saved."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rankload.loader import MismatchError, OptionError, State, load
from rankload.loader.targets.parts import kind_problem, state_problem
from torch import nn
from torch.optim import lr_scheduler as lr
from torch.optim.swa_utils import SWALR


def optimizer(groups: int = 1) -> torch.optim.SGD:
    return torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(groups)], lr=0.1, momentum=0.9
    )


def made(groups: int = 1) -> dict[str, Any]:
    """One of each of torch's schedulers."""

    def each(make: Any) -> Any:
        return make(optimizer(groups))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "step": each(lambda o: lr.StepLR(o, 2)),
            "multi": each(lambda o: lr.MultiStepLR(o, [2])),
            "constant": each(lr.ConstantLR),
            "linear": each(lr.LinearLR),
            "exponential": each(lambda o: lr.ExponentialLR(o, 0.9)),
            "polynomial": each(lr.PolynomialLR),
            "cosine": each(lambda o: lr.CosineAnnealingLR(o, 9)),
            "restarts": each(lambda o: lr.CosineAnnealingWarmRestarts(o, 9)),
            "plateau": each(lr.ReduceLROnPlateau),
            "cyclic": each(lambda o: lr.CyclicLR(o, 0.1, 0.2)),
            "one": each(lambda o: lr.OneCycleLR(o, 0.1, 9)),
            "lambda": each(lambda o: lr.LambdaLR(o, lambda step: 1.0)),
            "sequence": each(lambda o: lr.SequentialLR(o, [lr.StepLR(o, 1), lr.ExponentialLR(o, 0.9)], [2])),
            "chain": each(lambda o: lr.ChainedScheduler([lr.StepLR(o, 1), lr.ExponentialLR(o, 0.9)])),
            "swa": each(lambda o: SWALR(o, 0.1)),
            "scaler": torch.amp.GradScaler("cpu"),
            "optimizer": torch.optim.AdamW([nn.Parameter(torch.zeros(1))]),
            "deepspeed": Counting(),
        }


class Counting:
    """Saves what DeepSpeed's own schedulers do."""

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_a_state_of_one_kind_fits_that_kind_alone() -> None:
    jobs, saved = made(), {name: one.state_dict() for name, one in made().items()}
    for name, job in jobs.items():
        for other, state in saved.items():
            problem = kind_problem(job, state, named=False)
            assert (problem is None) == (name == other), (name, other, problem)
            if problem is None:
                job.load_state_dict(copy.deepcopy(state))


@pytest.mark.parametrize(
    ("name", "dropped", "added"),
    [
        ("step", ["_is_initial", "_get_lr_called_within_step"], {"verbose": False}),
        ("one", ["_anneal_func_type", "use_beta1"], {"anneal_func": None}),
        ("plateau", ["default_min_lr"], {"verbose": False}),
    ],
)
def test_states_of_other_versions_of_torch_fit(name: str, dropped: list[str], added: dict[str, Any]) -> None:
    state = {key: value for key, value in made()[name].state_dict().items() if key not in dropped}
    assert kind_problem(made()[name], {**state, **added}, named=False) is None


def test_schedulers_for_other_parameter_groups_or_inner_schedulers_are_refused() -> None:
    for name in ("step", "plateau", "lambda", "cosine"):
        problem = kind_problem(made(2)[name], made()[name].state_dict(), named=True)
        assert problem is not None
        assert "is for 1 parameter groups" in problem
    sequence = made()["sequence"]
    state = copy.deepcopy(sequence.state_dict())
    state["_schedulers"].reverse()
    assert "of another kind" in (kind_problem(sequence, state, named=True) or "")
    del state["_schedulers"][0]
    assert "is for 1 inner schedulers" in (kind_problem(sequence, state, named=True) or "")


def test_a_users_scheduler_may_have_grown_or_load_itself() -> None:
    class Warm(lr.LRScheduler):
        def __init__(self, optimizer: Any) -> None:
            self.warm = 3
            super().__init__(optimizer)

        def get_lr(self) -> list[float]:
            return [0.1 for _ in self.base_lrs]

    class Scaled(lr.LambdaLR): ...

    job = Warm(optimizer())
    state = job.state_dict()
    assert kind_problem(job, {**state, "since": 1}, named=False) is None
    assert (
        kind_problem(job, {key: value for key, value in state.items() if key != "warm"}, named=False) is None
    )
    assert "of another kind" in (kind_problem(job, made()["step"].state_dict(), named=True) or "")
    plain = {key: value for key, value in made()["lambda"].state_dict().items() if key != "lr_lambdas"}
    assert kind_problem(Scaled(optimizer(), lambda step: 1.0), plain, named=True)
    # What loads itself knows its older states, where the checkpoint names its class.
    assert kind_problem(Counting(), {"iteration": 3}, named=True) is None
    assert "of another kind" in (kind_problem(Counting(), {"iteration": 3}, named=False) or "")
    assert kind_problem(Counting(), [3], named=True) == "is a list, expected a dict"
    assert "disabled" in (state_problem(torch.amp.GradScaler("cpu"), {}, named=True) or "")
    assert state_problem(torch.amp.GradScaler("cpu", enabled=False), {}, named=True) is None


def job(*, scheduler: str | None = None, scaler: bool = False, callbacks: Any = None) -> State:
    model = nn.Linear(2, 2)
    own = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    make = {
        "step": lambda: lr.StepLR(own, 2),
        "cosine": lambda: lr.CosineAnnealingLR(own, 9),
        "lambda": lambda: lr.LambdaLR(own, lambda step: 1.0),
    }
    schedulers = None if scheduler is None else make[scheduler]()
    return State(model, own, schedulers, torch.amp.GradScaler("cpu") if scaler else None, callbacks=callbacks)


FORMS = ("composer", "hand-written", "lightning")


def written(path: Path, state: State, form: str) -> str:
    parts = {"model": state.model.state_dict(), "optimizer": state.optimizers[0].state_dict()}
    schedulers = [one.state_dict() for one in state.schedulers]
    scalers = [one.state_dict() for one in state.scaler]
    if form == "composer":
        contents: dict[str, Any] = {"state": state.state_dict(), "rng": None}
    elif form == "hand-written":
        contents = {**parts}
        if schedulers:
            contents["scheduler"] = schedulers[0]
        if scalers:
            contents["scaler"] = scalers[0]
    else:
        contents = {
            "state_dict": parts["model"],
            "optimizer_states": [parts["optimizer"]],
            "lr_schedulers": schedulers,
            "pytorch-lightning_version": "2.5.0",
        }
        if scalers:
            contents["MixedPrecision"] = scalers[0]
    torch.save(contents, path / "a.pt")
    return str(path / "a.pt")


def loaded(path: str, state: State, **arguments: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        receipt = load(path, state, progress_bar=False, **arguments).receipt
    return receipt, [str(one.message) for one in told if "parts of this job" in str(one.message)
                     or "no counterpart" in str(one.message)]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_the_job_holds_and_the_checkpoint_lacks_is_missing(tmp_path: Path, form: str) -> None:
    path = written(tmp_path, job(), form)
    state = job(scheduler="step", scaler=True)
    before = state.model.weight.detach().clone()
    with pytest.raises(MismatchError) as caught:
        load(path, state, progress_bar=False)
    names = ("schedulers/StepLR: the checkpoint has none", "scaler/GradScaler: the checkpoint has none")
    assert caught.value.details["missing"] == list(names)
    assert "a State without the objects that the checkpoint lacks" in str(caught.value)
    assert "rename" not in str(caught.value)
    assert torch.equal(state.model.weight, before)
    receipt, told = loaded(path, state, strict_model_weights=False)
    assert receipt.missing == names
    assert len(told) == 1
    assert all(name in told[0] for name in names)
    assert loaded(path, state, load_weights_only=True)[1] == []


@pytest.mark.parametrize("form", FORMS)
def test_what_the_checkpoint_holds_and_the_job_lacks_is_told(tmp_path: Path, form: str) -> None:
    path = written(tmp_path, job(scheduler="step", scaler=True), form)
    receipt, told = loaded(path, job())
    left = [name.rpartition("/")[0] for name in receipt.not_restored]
    assert left == ["state/schedulers", "state/scaler"]
    assert len(told) == 1
    assert all(name in told[0] for name in receipt.not_restored)
    assert loaded(path, job(), ignore_keys=["state/schedulers", "state/scaler"])[1] == []
    receipt, told = loaded(path, job(scheduler="step", scaler=True))
    assert (receipt.not_restored, receipt.missing, told) == ((), (), [])
    # A disabled scaler would take the state and do nothing with it.
    off = State(job().model, scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert "state/scaler/GradScaler" in loaded(path, off)[0].not_restored


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("then", "now"), [("cosine", "step"), ("step", "lambda"), ("lambda", "cosine")])
def test_another_kind_of_scheduler_is_found_before_anything_changes(
    tmp_path: Path, form: str, then: str, now: str
) -> None:
    path = written(tmp_path, job(scheduler=then), form)
    state = job(scheduler=now)
    before, own = state.model.weight.detach().clone(), dict(state.schedulers[0].state_dict())
    with pytest.raises(
        MismatchError, match=f"schedulers/{type(state.schedulers[0]).__name__}: the checkpoint"
    ):
        load(path, state, progress_bar=False)
    assert torch.equal(state.model.weight, before)
    receipt, told = loaded(path, state, strict_model_weights=False)
    assert state.schedulers[0].state_dict() == own
    assert (len(receipt.missing), len(receipt.not_restored), len(told)) == (1, 1, 2)
    # What is ignored is neither missing nor left.
    receipt, told = loaded(path, state, ignore_keys=["state/schedulers"], strict_model_weights=False)
    assert receipt.not_restored == ()


def test_a_scheduler_in_an_optimizers_place_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, job(), "hand-written")
    state = job(scheduler="step")
    with pytest.raises(
        OptionError, match=r"state.optimizers holds .* StepLR, which is a kind of lr scheduler"
    ):
        load(path, State(state.model, state.schedulers), progress_bar=False)


class Mean:
    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value} if self.value else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state.get("value", 0)


def test_callbacks_and_objects_that_hold_something_are_parts_too(tmp_path: Path) -> None:
    path = written(tmp_path, job(), "composer")
    state = job(callbacks=Mean(3))
    state.timestamp, state.dataset_state = Mean(4), Mean(5)
    with pytest.raises(MismatchError) as caught:
        load(path, state, progress_bar=False)
    names = [name.partition(":")[0] for name in caught.value.details["missing"]]
    assert names == ["callbacks/Mean", "timestamp", "dataset_state"]
    assert load(path, job(callbacks=Mean()), progress_bar=False).receipt.missing == ()
    path = written(tmp_path, job(callbacks=Mean(7)), "composer")
    fresh = Mean()
    load(path, job(callbacks=fresh), progress_bar=False)
    assert fresh.value == 7
    assert loaded(path, job())[0].not_restored == ("state/callbacks/Mean",)


class Foreign:
    """Loads itself, in the likeness of Composer's State."""

    def __init__(self, own: State) -> None:
        self.model, self.optimizers, self.schedulers = own.model, own.optimizers, own.schedulers
        self.given: dict[str, Any] = {}

    def load_state_dict(self, state: dict[str, Any], logger: Any, **options: Any) -> None:
        self.given = state

    def load_model_state(self, state_dict: dict[str, Any], logger: Any, **options: Any) -> None: ...


def test_a_state_that_loads_itself_is_not_handed_another_kind(tmp_path: Path) -> None:
    path = written(tmp_path, job(scheduler="step"), "hand-written")
    same = Foreign(job(scheduler="step"))
    load(path, same, progress_bar=False)
    assert same.given["schedulers"]["StepLR"]["step_size"] == 2
    other = Foreign(job(scheduler="cosine"))
    with pytest.raises(
        MismatchError, match="schedulers/CosineAnnealingLR: the checkpoint's is of another kind"
    ):
        load(path, other, progress_bar=False)
    assert other.given == {}
    receipt, told = loaded(path, other, strict_model_weights=False)
    assert other.given["schedulers"] == {}
    assert receipt.not_restored == ("state/schedulers/CosineAnnealingLR",)
    assert len(told) == 2
    without = written(tmp_path, job(), "composer")
    with pytest.raises(MismatchError, match="schedulers/StepLR: the checkpoint has none"):
        load(without, Foreign(job(scheduler="step")), progress_bar=False)


def test_what_a_dcp_folder_stores_nothing_of_is_the_objects_own(tmp_path: Path) -> None:
    """A LambdaLR of a function that is no plain one keeps an empty dict for it, which such a folder leaves out."""
    import torch.distributed.checkpoint as dcp

    def job() -> State:
        module = nn.Linear(2, 2)
        sgd = torch.optim.SGD(module.parameters(), lr=1.0)
        return State(module, sgd, lr.LambdaLR(sgd, functools.partial(lambda base, step: base**step, 0.5)))

    saved, fresh = job(), job()
    (optimizer,), (scheduler,) = saved.optimizers, saved.schedulers
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    tree = {"model": saved.model.state_dict(), "lr_scheduler": scheduler.state_dict()}
    dcp.save(tree, checkpoint_id=tmp_path / "step-3")
    load(tmp_path / "step-3", fresh, options={"leave_out": ["optimizer"]}, progress_bar=False)
    (restored,) = fresh.schedulers
    assert restored.state_dict() == scheduler.state_dict()
    fresh.optimizers[0].step()
    restored.step()
    assert restored.get_last_lr() == [0.0625]
