"""Loads of some parts of a checkpoint: without a model, without what is left out by name, weights with counters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_server import Behaviour, bad_server
from rankload.loader import FormatError, LoadOptions, MismatchError, State, load

Job = tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.StepLR]


def job(rate: float) -> Job:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, round(10 * rate))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    return model, optimizer, scheduler


@pytest.fixture
def saved() -> Job:
    return job(0.5)


def scripted(saved: Job, path: Path, **more: Any) -> Path:
    model, optimizer, scheduler = saved
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            **more,
        },
        path,
    )
    return path


def by_lightning(saved: Job, path: Path) -> None:
    model, optimizer, scheduler = saved
    own = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [scheduler.state_dict()]}
    more = {"epoch": 3, "pytorch-lightning_version": "2.5", "MixedPrecision": scaler(8.0).state_dict()}
    torch.save({"state_dict": model.state_dict(), **own, **more}, path)


def by_composer(saved: Job, path: Path) -> None:
    torch.save({"state": State(*saved, scaler=scaler(8.0)).state_dict(), "epoch": 3, "rng": []}, path)


def by_hand(saved: Job, path: Path) -> None:
    scripted(saved, path, epoch=3, scaler=scaler(8.0).state_dict())


def scaler(scale: float) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=scale)


@pytest.mark.parametrize("save", [by_hand, by_lightning, by_composer])
def test_any_part_is_restored_alone(saved: Job, tmp_path: Path, save: Callable[[Job, Path], None]) -> None:
    """Without a warning of what was not asked for; the receipt has it."""
    path = tmp_path / "step1.ckpt"
    save(saved, path)
    _, optimizer, scheduler = job(0.3)
    scheduler.last_epoch = 9
    scaling = scaler(2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = load(path, State(model=None, schedulers=scheduler))
        load(path, State(model=None, scaler=scaling))
        named = torch.optim.AdamW(saved[0].named_parameters(), lr=0.1)
        load(path, State(model=None, optimizers=named if save is by_composer else optimizer))
    assert (scheduler.last_epoch, scheduler.step_size, scaling.get_scale()) == (1, 5, 8.0)
    assert result.receipt.restored == ("scheduler StepLR",)
    assert [name.split("/")[1] for name in result.receipt.not_restored] == ["model", "optimizers", "scaler"]
    assert result.extra["epoch"] == 3
    found = (named if save is by_composer else optimizer).state_dict()
    wanted = saved[1].state_dict()
    assert found["param_groups"][0]["lr"] == 0.5
    for key, state in wanted["state"].items():
        assert all(torch.equal(found["state"][key][name], value) for name, value in state.items())


def test_what_is_asked_for_alone_and_lacking_is_told(saved: Job, tmp_path: Path) -> None:
    torch.save({"model": saved[0].state_dict()}, tmp_path / "weights.pt")
    scheduler = job(0.3)[2]
    with pytest.raises(MismatchError, match="schedulers/StepLR: the checkpoint has none"):
        load(tmp_path / "weights.pt", State(model=None, schedulers=scheduler))
    with pytest.warns(
        UserWarning, match="lacks parts of this job, which stay as they are: schedulers/StepLR"
    ):
        load(tmp_path / "weights.pt", State(None, schedulers=scheduler), strict_model_weights=False)


def test_a_file_of_one_part_is_restored(saved: Job, tmp_path: Path) -> None:
    _, optimizer, scheduler = job(0.3)
    scaling = scaler(2.0)
    for name, part in (("optimizer", saved[1]), ("scheduler", saved[2]), ("scaler", scaler(8.0))):
        torch.save(part.state_dict(), tmp_path / f"{name}.pt")
    load(tmp_path / "optimizer.pt", State(model=None, optimizers=optimizer))
    load(tmp_path / "scheduler.pt", State(model=None, schedulers=scheduler))
    load(tmp_path / "scaler.pt", State(model=None, scaler=scaling))
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert (scheduler.step_size, scaling.get_scale()) == (5, 8.0)
    model, _, other = job(0.3)
    options = LoadOptions(leave_out=["model"], layout={"scheduler": ""})
    load(tmp_path / "scheduler.pt", State(model, None, other), options=options)
    assert other.step_size == 5
    with pytest.raises(FormatError, match=r"or restore it with State\(model=None, optimizers=\.\.\.\)"):
        load(tmp_path / "optimizer.pt", State(model))


def test_named_optimizer_state_asks_for_the_model_that_names_it(saved: Job, tmp_path: Path) -> None:
    model, optimizer, _ = saved
    names = {id(one): name for name, one in model.named_parameters()}
    state = {"state": {}, "param_groups": []}
    for group in optimizer.param_groups:
        own = {key: value for key, value in group.items() if key != "params"}
        state["param_groups"].append({**own, "params": [names[id(one)] for one in group["params"]]})
    for one, entries in optimizer.state.items():
        state["state"][names[id(one)]] = entries
    torch.save({"state": {"model": model.state_dict(), "optimizers": {"AdamW": state}}}, tmp_path / "a.pt")
    other, target, _ = job(0.3)
    with pytest.raises(MismatchError, match=r"pass the model too, .*leave_out=\['model'\]"):
        load(tmp_path / "a.pt", State(model=None, optimizers=target))
    before = other.weight.detach().clone()
    load(tmp_path / "a.pt", State(other, target), options=LoadOptions(leave_out=["model"]))
    assert torch.equal(other.weight, before)
    assert torch.equal(target.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])


@pytest.mark.parametrize("has_them", [True, False])
def test_what_is_left_out_by_name_stays_and_is_not_missed(saved: Job, tmp_path: Path, has_them: bool) -> None:
    path = tmp_path / "step1.pt"
    if has_them:
        scripted(saved, path)
    else:
        torch.save({"model": saved[0].state_dict()}, path)
    model, optimizer, scheduler = job(0.3)
    moment = optimizer.state[model.weight]["exp_avg"].clone()
    options = LoadOptions(leave_out=["optimizer", "scheduler"])
    receipt = load(path, State(model, optimizer, scheduler), options=options).receipt
    assert torch.equal(model.weight, saved[0].weight)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], moment)
    assert (optimizer.param_groups[0]["lr"], scheduler.step_size) == (0.3, 3)
    assert receipt.ignored == (("state/optimizers", "state/schedulers") if has_them else ())
    assert receipt.missing == receipt.not_restored == ()


def test_an_object_that_loads_itself_keeps_what_is_left_out(saved: Job, tmp_path: Path) -> None:
    by_composer(saved, tmp_path / "a.pt")
    own = Itself(*job(0.3))
    options = LoadOptions(leave_out=["model", "optimizer", "scaler"])
    assert load(tmp_path / "a.pt", own, options=options).receipt.missing == ()
    assert own.handed_on == {"schedulers"}
    own = Itself(None, [], job(0.3)[2])
    receipt = load(tmp_path / "a.pt", own, options={"leave_out": ["optimizer", "scaler"]}).receipt
    assert (own.handed_on, receipt.not_restored) == ({"schedulers"}, ("state/model",))


class Itself:
    """A state like Composer's, which notes the parts that it gets."""

    def __init__(self, model: Any, optimizer: Any, scheduler: Any) -> None:
        self.model, self.optimizers, self.schedulers = model, [optimizer] if optimizer else [], [scheduler]
        self.handed_on: set[str] = set()

    def load_state_dict(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.handed_on = set(state)

    def load_model_state(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was not asked for the weights alone")


def test_weights_alone_bring_what_is_cheap(saved: Job, tmp_path: Path) -> None:
    """Counters and settings; neither large tensors nor types that nobody vouched for."""
    more = {
        "epoch": 3,
        "version": "2.1",
        "mean": torch.arange(4),
        "average": {"weight": torch.zeros(20_000)},
        "config": Custom(),
    }
    path = scripted(saved, tmp_path / "step1.pt", **more)
    result = load(path, State(job(0.3)[0]), load_weights_only=True)
    assert result.extra.pop("mean").tolist() == [0, 1, 2, 3]
    assert result.extra == {"epoch": 3, "version": "2.1"}


def test_bytes_of_what_is_left_out_are_not_fetched(tmp_path: Path) -> None:
    model = torch.nn.Linear(1500, 1000)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 1500)).sum().backward()
    optimizer.step()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    average = {"weight": torch.zeros(1500, 1000)}
    torch.save({**saved, "average": average, "mean": torch.arange(4)}, tmp_path / "a.pt")
    options: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    weights = 1500 * 1000 * 4
    with bad_server({"/a.pt": Behaviour((tmp_path / "a.pt").read_bytes())}) as server:
        path = server.url("/a.pt")
        result = load(path, State(model), load_weights_only=True, options=options)
        assert result.extra.keys() == {"epoch", "mean"}
        first = server.sent_bytes
        load(path, State(None, optimizer), ignore_keys=["average"], options=options)
        second = server.sent_bytes - first
        left = {**options, "leave_out": ["optimizer"]}
        load(path, State(model, optimizer), ignore_keys=["average"], options=left)
        third = server.sent_bytes - first - second
    for sent, needed in ((first, weights), (second, 2 * weights), (third, weights)):
        assert needed < sent < needed + (1 << 20)


class Custom:
    """A type that no load knows."""
