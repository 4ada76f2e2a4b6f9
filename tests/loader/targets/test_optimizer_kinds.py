"""Which saved state an optimizer goes on with, whose hyperparameters its groups get, and how parameters are named."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rankload.loader import LoadResult, MismatchError, State, load
from torch import nn

FORMS = ("composer", "hand-written")


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def step(model: nn.Module, *optimizers: Any) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    (model(torch.ones(2, 3)) - 1).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()])


def written(folder: Path, form: str, model: nn.Module, optimizer: Any) -> str:
    if form == "composer":
        whole = {"state": State(model, optimizer).state_dict()}
    else:
        whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(whole, folder / f"{form}.pt")
    return str(folder / f"{form}.pt")


def restored(path: str, *state: Any, told: str | None = None, **options: Any) -> LoadResult:
    """Loads; one warning, with `told`, is expected, and none where that is None."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        result = load(path, State(*state), progress_bar=False, **options)
    said = [str(one.message) for one in heard if one.category is UserWarning]
    assert [told in sentence for sentence in said] == [True] if told is not None else not said, said
    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("saved", "own"), [(torch.optim.Adam, torch.optim.AdamW), (torch.optim.AdamW, torch.optim.Adam)]
)
def test_adams_state_goes_on_in_adamw_which_stays_what_it_is(
    tmp_path: Path, form: str, saved: Any, own: Any
) -> None:
    model = net()
    optimizer = saved(model.parameters(), lr=0.05, weight_decay=0.5)
    step(model, optimizer)
    path = written(tmp_path, form, model, optimizer)
    target = net(1)
    target_optimizer = own(target.parameters())
    result = restored(path, target, target_optimizer, told="decoupled_weight_decay")
    assert any("works differently" in note for note in result.receipt.notes)
    # What torch's class does with these moments and hyperparameters.
    expected = own(model.parameters(), lr=0.05, weight_decay=0.5)
    for parameter, entries in optimizer.state.items():
        expected.state[parameter] = entries
    step(model, expected)
    step(target, target_optimizer)
    assert torch.equal(weights(target), weights(model))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("saved", "own"),
    [
        (torch.optim.NAdam, torch.optim.Adam),
        (torch.optim.Adam, torch.optim.NAdam),
        (torch.optim.Adam, torch.optim.Adamax),
        (torch.optim.AdamW, torch.optim.SGD),
        (torch.optim.RMSprop, torch.optim.Adadelta),
    ],
)
def test_state_of_another_kind_is_missing_in_every_layout(
    tmp_path: Path, form: str, saved: Any, own: Any
) -> None:
    model = net()
    optimizer = saved(model.parameters())
    step(model, optimizer)
    path = written(tmp_path, form, model, optimizer)
    target = net(1)
    target_optimizer = own(target.parameters())
    with pytest.raises(
        MismatchError, match=f"missing.*\n.*another kind than {own.__name__}.*ignore state/optim"
    ):
        load(path, State(target, target_optimizer), progress_bar=False)
    result = restored(path, target, target_optimizer, told="another kind", strict_model_weights=False)
    assert torch.equal(weights(target), weights(model))
    assert not target_optimizer.state
    assert [name.rpartition("/")[0] for name in result.receipt.not_restored] == ["state/optimizers"]


def test_two_optimizers_of_other_names_are_not_guessed(tmp_path: Path) -> None:
    model = net()
    halves = [list(model[0].parameters()), list(model[2].parameters())]
    saved = [torch.optim.Adam(halves[0]), torch.optim.RAdam(halves[1])]
    path = written(tmp_path, "composer", model, saved)
    own = [torch.optim.AdamW(halves[0]), torch.optim.NAdam(halves[1])]
    with pytest.raises(MismatchError, match="optimizers/AdamW: the checkpoint has Adam, RAdam"):
        load(path, State(model, own), progress_bar=False)


def test_what_a_class_of_the_users_keeps_is_not_known(tmp_path: Path) -> None:
    class Mine(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8})

    class Derived(torch.optim.AdamW): ...

    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    path = written(tmp_path, "composer", model, optimizer)
    with pytest.raises(MismatchError, match="what that keeps is not known"):
        load(path, State(net(), Mine(net().parameters())), progress_bar=False)
    target = net(1)
    own = Derived(target.parameters())
    restored(path, target, own, told="the state of AdamW goes to")
    assert torch.equal(own.state[target[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


@pytest.mark.parametrize("own", [[], [torch.optim.SGD]])
def test_optimizer_state_without_a_counterpart_is_warned_of(tmp_path: Path, own: list[Any]) -> None:
    model = net()
    optimizers = [torch.optim.SGD(model[0].parameters()), torch.optim.AdamW(model[2].parameters())]
    step(model, *optimizers)
    path = written(tmp_path, "composer", model, optimizers)
    ours = [kind(model[0].parameters()) for kind in own]
    has = "this State has SGD" if own else "this State has no optimizer"
    result = restored(path, model, ours, told=has)
    assert "state/optimizers/AdamW" in result.receipt.not_restored
    restored(path, model, ours, load_weights_only=True)
    if own:
        restored(path, model, ours, ignore_keys=["state/optimizers/AdamW"])


# --- hyperparameters ---------------------------------------------------------------------------------------------


def split(model: nn.Module, *decays: float, kind: Any = torch.optim.AdamW, **options: Any) -> Any:
    """Weights and biases in groups of their own, by name."""
    parts: Iterator[str] = iter(("weight", "bias"))
    groups = [
        {
            "params": [(n, p) for n, p in model.named_parameters() if n.endswith(part)],
            "weight_decay": decay,
        }
        for part, decay in zip(parts, decays, strict=True)
    ]
    return kind(groups, **options)


def one_group(model: nn.Module, **options: Any) -> Any:
    return torch.optim.AdamW([{"params": list(model.named_parameters()), "weight_decay": 0.1}], **options)


def decays(optimizer: Any) -> list[float]:
    return [group["weight_decay"] for group in optimizer.param_groups]


@pytest.fixture
def saved_as_one(tmp_path: Path) -> str:
    model = net()
    optimizer = one_group(model, lr=0.5)
    step(model, optimizer)
    return written(tmp_path, "composer", model, optimizer)


def test_one_saved_group_into_two_that_differ_is_asked_about(saved_as_one: str) -> None:
    target = net(1)
    own = split(target, 0.3, 0.0)
    with pytest.raises(
        MismatchError, match=r"groups 0, 1 differ \(weight_decay 0.3, 0.0\).*hyperparameters="
    ):
        load(saved_as_one, State(target, own), progress_bar=False)
    assert not own.state
    restored(saved_as_one, target, own, options={"hyperparameters": "job"})
    assert (decays(own), own.param_groups[0]["lr"]) == ([0.3, 0.0], 0.001)
    assert len(own.state) == 4
    restored(saved_as_one, target, own, options={"hyperparameters": "checkpoint"})
    assert (decays(own), own.param_groups[1]["lr"]) == ([0.1, 0.1], 0.5)


def test_groups_that_do_not_differ_in_what_they_get_are_not_asked_about(saved_as_one: str) -> None:
    target = net(1)
    own = split(target, 0.3, 0.3)
    own.param_groups[0]["label"], own.param_groups[1]["label"] = "a", "b"
    restored(saved_as_one, target, own)
    assert decays(own) == [0.1, 0.1]
    own = split(target, 0.3, 0.0)
    restored(saved_as_one, target, own, ignore_keys=["state/optimizers/*/param_groups"])
    assert decays(own) == [0.3, 0.0]


def test_two_saved_groups_into_one(tmp_path: Path) -> None:
    model = net()
    optimizer = split(model, 0.3, 0.0)
    step(model, optimizer)
    path = written(tmp_path, "hand-written", model, optimizer)
    target = net(1)
    own = one_group(target)
    for chosen in (None, "checkpoint"):
        with pytest.raises(MismatchError, match=r'hyperparameters differ.*hyperparameters="job"'):
            load(path, State(target, own), progress_bar=False, options={"hyperparameters": chosen})
    restored(path, target, own, options={"hyperparameters": "job"})
    assert decays(own) == [0.1]
    assert torch.equal(own.state[target[0].bias]["exp_avg"], optimizer.state[model[0].bias]["exp_avg"])


def test_hyperparameters_that_need_state_which_was_not_saved(saved_as_one: str) -> None:
    target = net(1)
    own = one_group(target, amsgrad=True)
    with pytest.raises(MismatchError, match="this job's amsgrad=True needs max_exp_avg_sq"):
        load(saved_as_one, State(target, own), progress_bar=False, options={"hyperparameters": "job"})
    restored(saved_as_one, target, own)
    step(target, own)


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["both", "file", "other ones", "one name twice"])
def test_parameters_that_are_not_the_models(tmp_path: Path, names: str) -> None:
    def job(seed: int, loss_name: str | None) -> tuple[nn.Module, nn.Module, Any]:
        model, loss = net(seed), nn.Linear(2, 1)
        if loss_name is None:
            return model, loss, torch.optim.AdamW([*model.parameters(), *loss.parameters()])
        named = [(f"{loss_name}{n}", p) for n, p in loss.named_parameters()]
        return model, loss, torch.optim.AdamW([*model.named_parameters(), *named])

    model, loss, optimizer = job(0, "0." if names == "one name twice" else "loss.")
    loss(model(torch.ones(2, 3))).sum().backward()
    optimizer.step()
    path = written(tmp_path, "hand-written", model, optimizer)
    own_name = {"both": "loss.", "file": None, "other ones": "criterion.", "one name twice": "loss."}[names]
    target, target_loss, own = job(1, own_name)
    restored(path, target, own)
    for one, other in ((loss, target_loss), (model, target)):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(optimizer.state[mine]["exp_avg"], own.state[theirs]["exp_avg"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("betas", ("a", "b"), "expected 2 numbers, each a number, got ('a', 'b')"),
        ("betas", (0.9,), "expected 2 numbers, got (0.9,)"),
        ("betas", (0.9, float("inf")), "expected 2 numbers, each a finite number, got (0.9, inf)"),
        ("betas", None, "expected 2 numbers, got None"),
        ("lr", float("nan"), "expected a finite number, got nan"),
        ("lr", "1e-3", "expected a number, got '1e-3'"),
        ("lr", True, "expected a number, got True"),
        ("lr", torch.tensor(float("inf")), "expected a finite number, got tensor(inf)"),
        ("lr", torch.ones(2), "expected a number, got a tensor"),
        ("initial_lr", float("nan"), "expected a finite number, got nan"),
        ("amsgrad", "no", "expected true or false, got 'no'"),
        ("weight_decay", None, "expected a number, got None"),
    ],
)
def test_hyperparameters_that_no_step_can_be_made_with_are_refused_by_name(
    tmp_path: Path, form: str, key: str, value: Any, expected: str
) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    step(model, optimizer)
    optimizer.param_groups[0][key] = value
    path = written(tmp_path, form, model, optimizer)
    other = net(1)
    own = torch.optim.Adam(other.parameters(), lr=0.25)
    before = weights(other)
    with pytest.raises(MismatchError) as told:
        load(path, State(other, own), progress_bar=False)
    assert f"optimizers/Adam/param_groups/0/{key}: {expected}" in str(told.value)
    assert torch.equal(weights(other), before)
    assert (own.param_groups[0]["lr"], len(own.state)) == (0.25, 0)
    load(path, State(other, own), progress_bar=False, options={"hyperparameters": "job"})
    assert (own.param_groups[0]["lr"], len(own.state)) == (0.25, 4)


def test_a_number_may_be_of_another_type_or_as_infinite_as_the_jobs_own(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1)
    step(model, optimizer)
    for key, value in {
        "lr": torch.tensor(1.0),
        "amsgrad": 0,
        "foreach": True,
        "most": float("inf"),
        "mine": float("nan"),
    }.items():
        optimizer.param_groups[0][key] = value
    path = written(tmp_path, "hand-written", model, optimizer)
    own = torch.optim.Adam(net(1).parameters(), lr=0.5)
    own.param_groups[0]["most"] = float("inf")
    restored(path, None, own)
    assert float(own.param_groups[0]["lr"]) == 1
