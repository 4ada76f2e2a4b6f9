"""State objects that load themselves, made here in the likeness of Composer's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rankload.loader import MismatchError, OptionError, load, register_algorithm
from rankload.loader.targets import algorithms
from rankload.loader.targets.base import RestoreOptions
from torch import nn


class Measure(nn.Module):
    """Saves nothing, and brings a loader of its own, as torchmetrics' do."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)


class Net(nn.Module):
    def __init__(self, seed: int, *layers: str) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(3, 2)
        self.measure = Measure()
        for layer in layers:
            self.add_module(layer, nn.Linear(2, 2))


class Adds:
    """Adds a layer to the model, and its parameters to the optimizer."""

    layer = "first"

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @staticmethod
    def required_on_load() -> bool:
        return True

    def match(self, event: Any, state: Any) -> bool:
        return True

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        logger.log_hyperparameters({"layer": self.layer})
        assert not state.handed_on
        layer = nn.Linear(2, 2)
        state.model.add_module(self.layer, layer)
        state.optimizers[0].param_groups[0]["params"].extend(layer.parameters())
        state.order.append(self.layer)

    def state_dict(self) -> dict[str, Any]:
        return {"repr": repr(self)}


class AddsSecond(Adds):
    layer = "second"


class Remembers:
    """Not required on load, and its text is no call; its state is what matters."""

    @staticmethod
    def required_on_load() -> bool:
        return False


class Job:
    """Takes what it is handed; would run every text in ``algorithms``."""

    def __init__(self, *layers: str, seed: int = 1, present: tuple[Any, ...] = ()) -> None:
        self.model = Net(seed, *layers)
        self.optimizers = [torch.optim.Adam(self.model.parameters(), lr=0.5)]
        self.algorithms = list(present)
        self.timestamp: Any = None
        self.order: list[str] = []
        self.handed_on: dict[str, Any] = {}
        self.strict: bool | None = None

    def load_state_dict(
        self,
        state: dict[str, Any],
        logger: Any,
        *,
        exclude_algorithms: Any = None,
        algorithm_passes: Any = None,
    ) -> None:
        self.handed_on = state
        self.model.load_state_dict(state.get("model", {}), strict=False)
        self.timestamp = state["timestamp"]["Timestamp"]

    def load_model_state(
        self,
        state_dict: dict[str, Any],
        logger: Any,
        *,
        strict: bool,
        exclude_algorithms: Any = None,
        algorithm_passes: Any = None,
    ) -> None:
        self.handed_on, self.strict = state_dict, strict
        self.model.load_state_dict(state_dict["model"], strict=strict)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "_REGISTRY", {})
    register_algorithm(Adds)
    register_algorithm(AddsSecond)


def saved(tmp_path: Path, *layers: str, entries: Any = (), **more: Any) -> tuple[str, dict[str, Any]]:
    """A checkpoint in Composer's layout: optimizer states by name, one for every parameter."""
    model = Net(0, *layers)
    names = [name for name, _ in model.named_parameters()]
    checkpoint = {
        "state": {
            "model": model.state_dict(),
            "optimizers": {
                "Adam": {
                    "state": {
                        name: {
                            "step": torch.tensor(4.0),
                            "exp_avg": torch.full_like(parameter, 2.0),
                            "exp_avg_sq": torch.full_like(parameter, 3.0),
                        }
                        for name, parameter in model.named_parameters()
                    },
                    "param_groups": [
                        {
                            **torch.optim.Adam(model.parameters()).state_dict()["param_groups"][0],
                            "params": names,
                        }
                    ],
                }
            },
            "algorithms": list(entries),
            "timestamp": {"Timestamp": {"batch": 4}},
            **more,
        },
        "rng": [],
    }
    path = str(tmp_path / "checkpoint.pt")
    torch.save(checkpoint, path)
    return path, checkpoint["state"]


def entry(*kinds: type[Adds]) -> list[tuple[str, dict[str, str]]]:
    return [(kind.__name__, {"repr": f"{kind.__name__}()"}) for kind in kinds]


def assert_model(job: Job, wanted: dict[str, torch.Tensor]) -> None:
    found = job.model.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_it_is_handed_everything_and_real_tensors(tmp_path: Path) -> None:
    path, state = saved(tmp_path)
    job = Job()
    result = load(path, job)
    assert_model(job, state["model"])
    assert set(job.handed_on) == {"model", "optimizers", "algorithms", "timestamp"}
    moment = job.handed_on["optimizers"]["Adam"]["state"]["body.weight"]["exp_avg"]
    assert torch.equal(moment, torch.full((2, 3), 2.0))
    assert job.timestamp == {"batch": 4}
    assert "state/optimizers" in result.receipt.restored


def test_state_under_another_classs_name_is_restored_from_here(tmp_path: Path) -> None:
    path, state = saved(tmp_path)
    job = Job()
    job.optimizers = [torch.optim.AdamW(job.model.parameters(), lr=0.5)]
    with pytest.warns(UserWarning, match="the state of Adam goes to AdamW"):
        load(path, job)
    assert "optimizers" not in job.handed_on
    entries = job.optimizers[0].state[job.model.body.weight]
    assert torch.equal(entries["exp_avg"], torch.full((2, 3), 2.0))
    assert job.optimizers[0].param_groups[0]["lr"] == 0.001
    assert job.optimizers[0].param_groups[0]["decoupled_weight_decay"]

    job = Job()
    load(path, job, options={"hyperparameters": "job"})
    assert "optimizers" not in job.handed_on
    assert job.optimizers[0].param_groups[0]["lr"] == 0.5

    job = Job()
    job.optimizers = [torch.optim.SGD(job.model.parameters())]
    with pytest.warns(UserWarning, match="another kind than SGD"):
        result = load(path, job, strict_model_weights=False)
    assert "optimizers" not in job.handed_on
    assert "state/optimizers/Adam" in result.receipt.not_restored
    assert_model(job, state["model"])


def test_algorithms_are_applied_first_in_the_checkpoints_order(tmp_path: Path) -> None:
    path, state = saved(tmp_path, "second", "first", entries=entry(AddsSecond, Adds))
    job = Job()
    with pytest.warns(UserWarning, match="Added AddsSecond"):
        load(path, job)
    assert job.order == ["second", "first"]
    assert [repr(one) for one in job.algorithms] == ["AddsSecond()", "Adds()"]
    assert_model(job, state["model"])
    assert job.handed_on["algorithms"] == entry(AddsSecond, Adds)


def test_an_order_that_cannot_be_kept_is_refused_before_anything_changes(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, "first", "second", entries=entry(Adds, AddsSecond))
    job = Job("first", present=(Adds(),))
    with pytest.raises(OptionError, match=r"exclude_algorithms=\['AddsSecond'\]"):
        load(path, job, algorithm_passes=[lambda found, event: list(reversed(found))])
    assert len(job.algorithms) == 1
    assert not job.handed_on


def test_names_are_compared_although_a_part_has_a_loader_of_its_own(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, "first", entries=entry(Adds))
    job = Job()
    with pytest.raises(MismatchError) as caught:
        load(path, job, exclude_algorithms=["Adds"])
    assert "model/first.weight" in caught.value.details["unexpected"]
    assert "optimizers/Adam/first.weight" in caught.value.details["unexpected"]
    assert not job.handed_on
    assert not job.optimizers[0].state


def test_what_it_could_not_load_of_an_optimizer_is_filled_for_it(tmp_path: Path) -> None:
    path, state = saved(tmp_path)
    job = Job("first")
    result = load(path, job, strict_model_weights=False)
    assert set(result.receipt.missing) == {
        f"{part}/first.{name}" for part in ("model", "optimizers/Adam") for name in ("weight", "bias")
    }
    assert "optimizers" not in job.handed_on
    optimizer = job.optimizers[0]
    assert torch.equal(optimizer.state[job.model.body.weight]["exp_avg"], torch.full((2, 3), 2.0))
    assert job.model.get_submodule("first").weight not in optimizer.state
    assert optimizer.param_groups[0]["lr"] == 1e-3

    job = Job()
    load(path, job, ignore_keys=["state/optimizers/Adam/state/body.bias"])
    assert job.model.body.bias not in job.optimizers[0].state
    assert torch.equal(job.optimizers[0].state[job.model.body.weight]["exp_avg_sq"], torch.full((2, 3), 3.0))
    assert_model(job, state["model"])


def test_an_optimizer_that_the_checkpoint_lacks_is_told(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["state"]["optimizers"]
    torch.save(checkpoint, path)
    with pytest.raises(MismatchError, match="optimizers/Adam: the checkpoint has none"):
        load(path, Job())
    job = Job()
    with pytest.warns(UserWarning, match="optimizers/Adam: the checkpoint has none"):
        result = load(path, job, strict_model_weights=False)
    assert result.receipt.missing == ("optimizers/Adam: the checkpoint has none",)
    load(path, Job(), load_weights_only=True)


def test_a_buffer_that_loses_values_is_found_before_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = saved(tmp_path)
    job = Job()
    job.model.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["state"]["model"]["count"] = torch.tensor([1.0, 2.0])
    torch.save(checkpoint, path)
    load(path, job)
    assert job.model.get_buffer("count").tolist() == [1, 2]
    checkpoint["state"]["model"]["count"] = torch.tensor([1.0, 2.5])
    torch.save(checkpoint, path)
    with pytest.raises(MismatchError, match=r"model/count: .*with the value 2\.5, which"):
        load(path, job)
    # So it is of a file of which the node keeps only a part: the values are not there when it is planned.
    monkeypatch.setattr(RestoreOptions, "readable", lambda options, tensor: False)
    checkpoint["state"]["model"]["body.weight"] = torch.full((2, 3), 7.0)
    torch.save(checkpoint, path)
    with pytest.raises(MismatchError, match=r"model/count: .*with the value 2\.5, which"):
        load(path, job)
    assert job.model.get_buffer("count").tolist() == [1, 2]
    assert not (job.model.body.weight == 7).any()


def test_weights_only(tmp_path: Path) -> None:
    path, state = saved(tmp_path, "first", entries=entry(Adds))
    job = Job()
    with pytest.warns(UserWarning, match="Added Adds"):
        load(path, job, load_weights_only=True)
    assert set(job.handed_on) == {"model", "algorithms"}
    assert job.strict is True
    assert_model(job, state["model"])

    job = Job("first", present=(Adds(),))
    load(path, job, load_weights_only=True, ignore_keys=["state/model/body.bias"])
    assert job.strict is False


def test_names_of_wrapped_models_are_matched_once(tmp_path: Path) -> None:
    """Old checkpoints of wrapped models say so, and their names are the wrapper's."""
    path, state = saved(tmp_path, is_model_ddp=True)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["state"]["model"] = {f"module.{name}": value for name, value in state["model"].items()}
    torch.save(checkpoint, path)
    job = Job()
    load(path, job)
    assert_model(job, state["model"])
    assert "is_model_ddp" not in job.handed_on


def test_state_without_text_reaches_an_algorithm_of_the_users(tmp_path: Path) -> None:
    run = "__import__('os').system('x')"
    path, _ = saved(
        tmp_path,
        entries=[
            ("Remembers", {"repr": run, "count": 3}),
            ("Stranger", {"repr": run}),
            ("Adds", {"repr": f"Adds({run})"}),
        ],
    )
    job = Job(present=(Remembers(),))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load(path, job)
    assert job.handed_on["algorithms"] == [("Remembers", {"count": 3})]
    text = " ".join(str(one.message) for one in told)
    assert "Stranger" in text
    assert "Adds" in text
    assert "Remembers" not in text


def test_a_model_that_is_ignored_may_differ(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, "first")
    job = Job()
    load(path, job, ignore_keys=["state/model", "state/optimizers"])
    assert set(job.handed_on) == {"algorithms", "timestamp"}


class Tied(Net):
    """A net with one weight under two names."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.head = nn.Linear(3, 2)
        self.head.weight = self.body.weight


class Strict(Job):
    """Loads as torch does by itself: every name of the model must be there."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed=seed)
        self.model = Tied(seed)
        self.optimizers = []

    def load_state_dict(self, state: dict[str, Any], logger: Any, **options: Any) -> None:
        self.handed_on = state
        if "model" in state:
            self.model.load_state_dict(state["model"])


def test_a_model_without_all_of_its_names_is_filled_for_it(tmp_path: Path) -> None:
    path = str(tmp_path / "job.pt")
    whole = Tied(0).state_dict()
    torch.save({"model": whole}, path)
    job = Strict()
    load(path, job)
    assert "model" in job.handed_on
    assert_model(job, whole)
    # As safetensors' writer keeps tied weights: under one name.
    once = {name: value for name, value in whole.items() if name != "head.weight"}
    torch.save({"model": once, "epoch": 3}, path)
    for weights_only in (False, True):
        job = Strict()
        load(path, job, load_weights_only=weights_only)
        assert_model(job, whole)
    job = Strict()
    before = job.model.head.bias.detach().clone()
    result = load(path, job, ignore_keys=["state/model/head.bias"])
    assert "model" not in job.handed_on
    assert result.receipt.ignored == ("state/model/head.bias",)
    assert_model(job, {**whole, "head.bias": before})
    torch.save({"model": {name: value for name, value in once.items() if name != "head.bias"}}, path)
    with pytest.raises(MismatchError, match=r"model/head\.bias"):
        load(path, Strict())
    job = Strict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(path, job, strict_model_weights=False)
    assert torch.equal(job.model.body.weight, whole["body.weight"])
    assert torch.equal(job.model.head.bias, before)
