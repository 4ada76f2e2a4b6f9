"""Restoring plain modules, optimizers and states, in one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankload.loader.errors import LayoutError, MismatchError
from rankload.loader.formats.torch_file import read_index
from rankload.loader.materialize.tensors import TensorReader
from rankload.loader.saved.ignore import ignore
from rankload.loader.sources.single_file import read_layout
from rankload.loader.state import State
from rankload.loader.targets.base import Plan, RestoreOptions, Work, carry_out
from rankload.loader.targets.state import StateTarget
from torch import nn


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.down = nn.Linear(width, 4)
        self.tied = nn.Linear(4, width, bias=False)
        self.tied.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)) + self.tied(x))


def job(seed: int, kind: Any = torch.optim.AdamW, **options: Any) -> State:
    torch.manual_seed(seed)
    model = Net()
    optimizer = kind(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "lr": 0.5},
        ],
        lr=0.01,
        **options,
    )
    return State(
        model,
        optimizer,
        torch.optim.lr_scheduler.StepLR(optimizer, 2),
        torch.amp.GradScaler("cpu", init_scale=1024.0),
    )


def train(state: State, steps: int, seed: int = 5) -> list[float]:
    stream = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        loss = (state.model(torch.rand(6, 4, generator=stream)) - 1).square().mean()
        state.optimizers[0].zero_grad()
        loss.backward()
        state.optimizers[0].step()
        state.schedulers[0].step()
        losses.append(float(loss.detach()))
    return losses


def restore(
    path: Path, state: State, ignore_keys: Any = None, *, strict: bool = True
) -> tuple[Plan, list[str]]:
    target = StateTarget(state, RestoreOptions(strict=strict, file=str(path)))
    demand = target.demand(0, 1)
    whole = read_layout(
        read_index(str(path)).tree,
        file=str(path),
        optimizer_classes=demand.optimizers,
        scheduler_classes=demand.schedulers,
    )
    plan = target.plan(whole.with_tree(ignore(whole.as_tree(), ignore_keys).tree))
    plan.mismatch.raise_if_any(str(path), strict=strict)
    changes: list[str] = []
    restored = carry_out(plan, Work(TensorReader(), target.options, changes.append))
    assert len(restored) == len(set(changes))
    return plan, changes


def saved(tmp_path: Path, state: State, form: str) -> Path:
    path = tmp_path / f"{form}.pt"
    model, optimizer = state.model.state_dict(), state.optimizers[0].state_dict()
    scheduler = state.schedulers[0].state_dict()
    contents: dict[str, Any] = {
        "composer": {"state": state.state_dict(), "rng": None},
        "hand-written": {
            "model": model,
            "optimizer": optimizer,
            "scheduler": scheduler,
            "scaler": state.scaler[0].state_dict(),
            "epoch": 3,
        },
        "lightning": {
            "state_dict": model,
            "optimizer_states": [optimizer],
            "lr_schedulers": [scheduler],
            "MixedPrecision": state.scaler[0].state_dict(),
            "pytorch-lightning_version": "2.5.0",
        },
    }[form]
    torch.save(contents, path)
    return path


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("form", ["composer", "hand-written", "lightning"])
def test_training_goes_on_as_if_it_had_never_stopped(tmp_path: Path, form: str) -> None:
    first = job(0)
    train(first, 3)
    path = saved(tmp_path, first, form)
    expected = train(first, 3, seed=6)
    second = job(1)
    identity = [id(p) for p in second.model.parameters()]
    _, changes = restore(path, second)
    assert train(second, 3, seed=6) == expected
    assert identity == [id(p) for p in second.model.parameters()]
    assert changes[0] == "model"
    assert second.optimizers[0].param_groups[1]["lr"] == first.optimizers[0].param_groups[1]["lr"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.Adadelta, {}),
    ],
)
def test_other_optimizers(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    first = job(0, kind, **options)
    train(first, 2)
    path = saved(tmp_path, first, "composer")
    second = job(1, kind, **options)
    restore(path, second)
    assert equal(second.optimizers[0].state_dict(), first.optimizers[0].state_dict())
    assert train(second, 2, seed=8) == train(first, 2, seed=8)


def test_everything_that_does_not_fit_is_told_at_once_and_nothing_is_changed(tmp_path: Path) -> None:
    path = saved(tmp_path, job(0), "composer")
    torch.manual_seed(1)
    model = Net(width=9)
    model.extra = nn.Linear(2, 2)
    del model.tied
    state = State(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MismatchError) as caught:
        restore(path, state)
    message = str(caught.value)
    for part in (
        "model/extra.weight",
        "model/tied.weight",
        "model/up.weight: expected shape (9, 4), got (8, 4)",
        "optimizers/SGD: the checkpoint has AdamW",
    ):
        assert part in message
    assert equal(model.state_dict(), before)
    with pytest.raises(MismatchError, match="wrong"):
        restore(path, state, strict=False)
    assert equal(model.state_dict(), before)


def test_missing_and_unexpected_names_may_pass(tmp_path: Path) -> None:
    first = job(0)
    path = saved(tmp_path, first, "composer")
    torch.manual_seed(1)
    model = Net()
    model.extra = nn.Linear(2, 2)
    del model.norm
    plan, _ = restore(path, State(model), strict=False)
    assert plan.mismatch.missing == ["model/extra.weight", "model/extra.bias"]
    assert "model/norm.weight" in plan.mismatch.unexpected
    assert torch.equal(model.up.weight, first.model.up.weight)


def test_what_is_ignored_stays_as_it_is_and_is_not_missing(tmp_path: Path) -> None:
    first = job(0)
    train(first, 2)
    path = saved(tmp_path, first, "composer")
    second = job(1)
    own = second.model.down.weight.detach().clone()
    restore(path, second, ["state/model/down.*", "state/schedulers"])
    assert torch.equal(second.model.down.weight, own)
    assert torch.equal(second.model.up.weight, first.model.up.weight)
    assert second.schedulers[0].last_epoch == 0


def test_ignored_moments_are_zero_where_the_optimizer_has_none(tmp_path: Path) -> None:
    first = job(0)
    train(first, 2)
    path = saved(tmp_path, first, "composer")
    second = job(1)
    plan, _ = restore(path, second, ["state/optimizers/AdamW/state/*/exp_avg"])
    states = list(second.optimizers[0].state.values())
    assert all(not state["exp_avg"].any() and state["exp_avg_sq"].any() for state in states)
    assert len(plan.reset) == len(states)
    train(second, 1)


@pytest.mark.parametrize("how", ["ddp-names", "compiled", "data-parallel", "meta", "half"])
def test_wrapped_and_other_modules(tmp_path: Path, how: str) -> None:
    first = job(0)
    path = tmp_path / "weights.pt"
    names = first.model.state_dict()
    if how == "ddp-names":
        names = {f"module.{name}": value for name, value in names.items()}
    torch.save({"model": names}, path)
    torch.manual_seed(1)
    model: Any = Net()
    if how == "compiled":
        model = torch.compile(model)
    elif how == "data-parallel":
        model = nn.DataParallel(model)
    elif how == "half":
        model = model.half()
    elif how == "meta":
        with torch.device("meta"):
            model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = optimizer.param_groups[0]["params"][0]
    plan, _ = restore(path, State(model))
    inner = model._orig_mod if how == "compiled" else model.module if how == "data-parallel" else model
    for name, value in first.model.state_dict().items():
        assert torch.equal(inner.state_dict()[name], value.to(inner.state_dict()[name].dtype)), name
    assert inner.tied.weight is inner.up.weight
    assert held is next(iter(inner.parameters()))
    if how == "half":
        assert plan.cast["model/up.weight"] == "float32 -> float16"


def test_a_meta_module_is_not_left_half_filled(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"model": {"up.weight": torch.zeros(8, 4)}}, path)
    with torch.device("meta"):
        model = Net()
    with pytest.raises(MismatchError, match="on the meta device, and the checkpoint has nothing to fill"):
        restore(path, State(model), strict=False)
    assert model.up.weight.is_meta


def test_a_module_with_its_own_loading_is_loaded_its_own_way(tmp_path: Path) -> None:
    class Renaming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.new = nn.Linear(2, 2)
            self.calls = 0
            self.register_load_state_dict_pre_hook(self.rename)

        @staticmethod
        def rename(module: Any, state: Any, prefix: str, *rest: Any) -> None:
            module.calls += 1
            for key in list(state):
                if key.startswith(f"{prefix}old."):
                    state[key.replace("old.", "new.")] = state.pop(key)

    path = tmp_path / "weights.pt"
    weight = torch.arange(4.0).view(2, 2)
    torch.save({"model": {"old.weight": weight, "old.bias": torch.ones(2)}}, path)
    model = Renaming()
    restore(path, State(model))
    assert model.calls == 1
    assert torch.equal(model.new.weight, weight)


def test_extra_state_and_plain_values(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        seen = 0

        def get_extra_state(self) -> Any:
            return {"seen": self.seen}

        def set_extra_state(self, state: Any) -> None:
            self.seen = state["seen"]

    class Callback:
        def __init__(self) -> None:
            self.value = 0

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    model, callback = Counting(2, 2), Callback()
    model.seen, callback.value = 7, 9
    first = State(
        model, callbacks=callback, timestamp={"batch": 4}, rank_zero_seed=17, run_name="a", dataset_state=[1]
    )
    path = tmp_path / "state.pt"
    torch.save({"state": first.state_dict(), "rng": None}, path)
    second = State(Counting(2, 2), callbacks=[Callback()], run_name="b")
    restore(path, second)
    assert second.model.seen == 7
    assert second.callbacks[0].value == 9
    assert second.timestamp == {"batch": 4}
    assert (second.rank_zero_seed, second.run_name, second.dataset_state) == (17, "b", [1])


def test_optimizers_are_matched_by_name_where_names_are_known(tmp_path: Path) -> None:
    first = job(0)
    train(first, 2)
    names = {id(p): name for name, p in first.model.named_parameters()}
    optimizer = first.optimizers[0]
    state = {names[id(p)]: dict(entries) for p, entries in optimizer.state.items()}
    groups = [
        {
            **{k: v for k, v in group.items() if k != "params"},
            "params": [names[id(p)] for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    path = tmp_path / "named.pt"
    optimizers = {"AdamW": {"state": state, "param_groups": groups}}
    torch.save({"state": {"model": first.model.state_dict(), "optimizers": optimizers}}, path)
    torch.manual_seed(1)
    model = Net()
    shuffled = sorted(model.parameters(), key=lambda p: (p.ndim > 1, p.numel()))
    other = torch.optim.AdamW(
        [
            {"params": [p for p in shuffled if p.ndim < 2]},
            {"params": [p for p in shuffled if p.ndim > 1]},
        ]
    )
    restore(path, State(model, other))
    mine = {id(p): name for name, p in model.named_parameters()}
    for p, entries in other.state.items():
        assert torch.equal(entries["exp_avg"], state[mine[id(p)]]["exp_avg"])
    assert [group["weight_decay"] for group in other.param_groups] == [
        groups[1]["weight_decay"],
        groups[0]["weight_decay"],
    ]

    merged = torch.optim.AdamW(model.parameters())
    with pytest.raises(MismatchError, match="whose hyperparameters differ"):
        restore(path, State(model, merged))


def test_optimizers_without_names_are_matched_by_position_and_count(tmp_path: Path) -> None:
    first = job(0)
    train(first, 1)
    path = saved(tmp_path, first, "hand-written")
    model = Net()
    with pytest.raises(MismatchError, match=r"groups of \[6\] parameters, got \[2, 4\]"):
        restore(path, State(model, torch.optim.AdamW(model.parameters())))


def test_a_group_is_not_searched_for_each_of_its_parameters(tmp_path: Path) -> None:
    """Its list is as torch saves one; to look there for one of many takes no longer than for one of few."""
    given: list[Any] = []

    class Noting(torch.optim.AdamW):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            given.extend(state_dict["param_groups"])
            super().load_state_dict(state_dict)

    class Counted(int):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return super().__eq__(other)

        __hash__ = int.__hash__

    model = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(500)])
    optimizer = torch.optim.AdamW(model)
    for parameter in model:
        parameter.grad = torch.ones(1)
    optimizer.step()
    path = tmp_path / "many.pt"
    torch.save({"state": State(model, optimizer).state_dict()}, path)
    fresh = Noting(model)
    restore(path, State(model, fresh))
    (group,) = given
    assert group["params"] == list(range(500)) == copy.deepcopy(group["params"])
    assert all(Counted(n) in group["params"] for n in range(400, 500))
    assert Counted(500) not in group["params"]
    assert Counted.compared <= 100
    assert type(fresh.state_dict()["param_groups"][0]["params"]) is list
    trained, found = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert all(torch.equal(found[n][key], value) for n in trained for key, value in trained[n].items())


def test_extra_state_is_real(tmp_path: Path) -> None:
    class Keeping(nn.Linear):
        kept: Any = None

        def get_extra_state(self) -> Any:
            return {"tensor": torch.arange(3), "array": np.arange(4)}

        def set_extra_state(self, state: Any) -> None:
            self.kept = state

    for hooked in (False, True):
        path = tmp_path / "extra.pt"
        torch.save({"model": Keeping(2, 2).state_dict(), "epoch": 1}, path)
        model = Keeping(2, 2)
        if hooked:
            model.register_load_state_dict_post_hook(lambda module, keys: None)
        restore(path, State(model))
        assert torch.equal(model.kept["tensor"], torch.arange(3))
        assert model.kept["array"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("hooked", [False, True])
def test_extra_state_may_be_a_tensor(tmp_path: Path, hooked: bool) -> None:
    class Scaled(nn.Linear):
        scale = torch.zeros(3)

        def get_extra_state(self) -> Any:
            return self.scale

        def set_extra_state(self, state: Any) -> None:
            self.scale = state

    model = Scaled(2, 2)
    model.scale = torch.arange(3.0)
    torch.save({"model": model.state_dict(), "epoch": 1}, tmp_path / "tensor.pt")
    model = Scaled(2, 2)
    if hooked:
        model.register_load_state_dict_post_hook(lambda module, keys: None)
    restore(tmp_path / "tensor.pt", State(model))
    assert torch.equal(model.scale, torch.arange(3.0))


def test_an_expanded_tensor_takes_no_more_memory_than_it_has_elements_saved(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[str, torch.Tensor] = {}
            self.weight = nn.Parameter(torch.zeros(2, 3))
            self.register_load_state_dict_pre_hook(self.take)

        @staticmethod
        def take(module: Any, state: Any, *rest: Any) -> None:
            module.seen = {name: state.pop(name) for name in list(state) if name != "weight"}

    weight = torch.arange(2.0).view(2, 1).expand(2, 3)
    torch.save({"model": {"weight": weight, "old": torch.ones(1).expand(1 << 40)}}, tmp_path / "expanded.pt")
    model = Counting()
    restore(tmp_path / "expanded.pt", State(model))
    assert torch.equal(model.weight, weight)
    assert model.seen["old"].shape == (1 << 40,)

    plain = nn.Module()
    plain.weight = nn.Parameter(torch.zeros(2, 3))
    torch.save({"model": {"weight": weight}}, tmp_path / "plain.pt")
    restore(tmp_path / "plain.pt", State(plain))
    assert torch.equal(plain.weight, weight)


def test_an_ignored_parameter_group_does_not_shift_the_others(tmp_path: Path) -> None:
    first = job(0)
    first.optimizers[0].param_groups[1]["lr"] = 0.25
    path = saved(tmp_path, first, "composer")
    second = job(1)
    own = second.optimizers[0].param_groups[0]["lr"]
    restore(path, second, ["state/optimizers/AdamW/param_groups/0"])
    assert [group["lr"] for group in second.optimizers[0].param_groups] == [own, 0.25]


def test_a_checkpoint_from_before_the_first_step_clears_the_optimizers_state(tmp_path: Path) -> None:
    path = saved(tmp_path, job(0), "composer")
    second = job(1)
    train(second, 1)
    restore(path, second)
    assert not second.optimizers[0].state_dict()["state"]


def test_ignored_optimizer_state_stays(tmp_path: Path) -> None:
    path = saved(tmp_path, job(0), "composer")
    second = job(1)
    train(second, 1)
    before = copy.deepcopy(second.optimizers[0].state_dict()["state"])
    restore(path, second, ["state/optimizers/AdamW/state"])
    assert equal(second.optimizers[0].state_dict()["state"], before)


def test_another_kind_of_optimizers_state_is_refused(tmp_path: Path) -> None:
    first = job(0)
    train(first, 1)
    path = saved(tmp_path, first, "hand-written")
    with pytest.raises(MismatchError, match="another kind than SGD"):
        restore(path, job(1, torch.optim.SGD))


def test_an_ignored_plain_step_begins_anew(tmp_path: Path) -> None:
    first = job(0)
    train(first, 2)
    contents = torch.load(saved(tmp_path, first, "hand-written"))
    for entries in contents["optimizer"]["state"].values():
        entries["step"] = 2
    path = tmp_path / "plain_step.pt"
    torch.save(contents, path)
    second = job(1)
    plan, _ = restore(path, second, ["state/optimizers/AdamW/state/*/step"])
    assert all(int(entries["step"]) == 0 for entries in second.optimizers[0].state.values())
    assert plan.reset


def test_plain_values_and_dicts_among_the_objects(tmp_path: Path) -> None:
    class Callback:
        def __init__(self, value: int) -> None:
            self.value = value

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    first = State(nn.Linear(2, 2), callbacks={"mine": Callback(1)}, schedulers=[7])
    path = tmp_path / "plain.pt"
    torch.save({"state": first.state_dict()}, path)
    second = State(nn.Linear(2, 2), callbacks={"mine": Callback(5)}, schedulers=[9])
    _, changes = restore(path, second)
    assert second.callbacks[0]["mine"].value == 1
    assert second.schedulers == [7]
    assert {"callback mine", "scheduler int"} <= set(changes)


def test_optimizers_that_are_not_torchs(tmp_path: Path) -> None:
    class Sketch:
        value = 0

        def state_dict(self) -> dict[str, Any]:
            return {"value": 3}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    path = tmp_path / "own.pt"
    torch.save({"state": State(nn.Linear(2, 2), Sketch()).state_dict()}, path)
    second = State(nn.Linear(2, 2), Sketch())
    restore(path, second)
    assert second.optimizers[0].value == 3


def test_a_disabled_scalers_nothing_is_no_state(tmp_path: Path) -> None:
    first = State(nn.Linear(2, 2), scaler=torch.amp.GradScaler("cpu", enabled=False))
    path = tmp_path / "scaler.pt"
    torch.save({"state": first.state_dict()}, path)
    second = State(nn.Linear(2, 2), scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    with pytest.raises(MismatchError, match="scaler/GradScaler: the checkpoint's is empty: it was disabled"):
        restore(path, second)
    with pytest.warns(UserWarning, match="it was disabled when the checkpoint was saved"):
        restore(path, second, strict=False)
    assert second.scaler[0].get_scale() == 8.0
    restore(path, State(nn.Linear(2, 2), scaler=torch.amp.GradScaler("cpu", enabled=False)))


@pytest.mark.parametrize("why", ["ignored", "tied"])
def test_hooks_do_not_make_excused_names_missing(tmp_path: Path, why: str) -> None:
    first = job(0)
    names = first.model.state_dict()
    if why == "tied":
        del names["tied.weight"]
    path = tmp_path / "weights.pt"
    torch.save({"model": names}, path)
    second = job(1)
    second.model.down.register_load_state_dict_pre_hook(lambda *arguments: None)
    restore(path, State(second.model), ["state/model/down.bias"] if why == "ignored" else None)
    assert torch.equal(second.model.up.weight, first.model.up.weight)


def test_weights_from_before_normalisation_counted_batches(tmp_path: Path) -> None:
    first = job(0)
    names = {k: v for k, v in first.model.state_dict().items() if not k.endswith("num_batches_tracked")}
    path = tmp_path / "old.pt"
    torch.save({"model": names}, path)
    restore(path, State(job(1).model))


def test_a_parts_own_loading_is_told_its_version(tmp_path: Path) -> None:
    class Migrating(nn.Module):
        _version = 2

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            if metadata.get("version", 1) < 2:
                state[f"{prefix}weight"] = state[f"{prefix}weight"] * 100
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    for form in ("composer", "hand-written", "lightning", "bare"):
        path = tmp_path / f"{form}.pt"
        weights = Migrating().state_dict()
        torch.save(
            {
                "composer": {"state": {"model": weights}},
                "hand-written": {"model": weights},
                "lightning": {"state_dict": weights, "pytorch-lightning_version": "2.5"},
                "bare": weights,
            }[form],
            path,
        )
        model = Migrating()
        restore(path, State(model))
        assert model.weight.tolist() == [1.0, 1.0], form


def test_a_deepspeed_engine_is_not_saved_as_a_plain_model() -> None:
    engine = nn.Linear(2, 2)
    engine.zero_optimization_stage = lambda: 3  # type: ignore[assignment]
    partitioned = nn.Linear(2, 2)
    partitioned.weight.ds_id = 0  # type: ignore[assignment]
    kind = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero", "optimizer": None})
    for state in (State(engine), State(partitioned), State(nn.Linear(2, 2), kind())):
        with pytest.raises(LayoutError, match=r"save it with save_checkpoint\(folder"):
            state.state_dict()
