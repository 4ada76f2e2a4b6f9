"""Names that wrappers, prefixes and frozen parameters change, from the file to the module and its optimizer."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rankload.loader import (
    LoadOptions,
    MismatchError,
    MissingFrozenError,
    OptionError,
    PartialRestoreError,
    Receipt,
    State,
    load,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

Wrap = Callable[[nn.Module], nn.Module]


class Scaled(nn.Linear):
    scale = 0

    def get_extra_state(self) -> Any:
        return {"scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]


class Tripled(nn.Linear):
    """Saved by a job that kept a third of the weights."""

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 3
        super()._load_from_state_dict(state, prefix, *rest)


def net(seed: int, wrap: Wrap = lambda part: part, kind: type[nn.Linear] = Scaled) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(wrap(nn.Sequential(kind(3, 3), nn.BatchNorm1d(3))), nn.Linear(3, 2))


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    return optimizer


def restore(path: Path, state: State, strict: bool = True, **options: Any) -> Receipt:
    return load(
        path, state, strict_model_weights=strict, progress_bar=False, options=LoadOptions(**options)
    ).receipt


def inner(model: nn.Sequential) -> nn.Module:
    (found,) = (part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == 3)
    return found


WRAPS: dict[str, Wrap] = {
    "plain": lambda part: part,
    "checkpointed": checkpoint_wrapper,
    "compiled": partial(torch.compile, backend="eager"),
    "data parallel": nn.DataParallel,
    "checkpointed and compiled": lambda part: torch.compile(checkpoint_wrapper(part), backend="eager"),
}


@pytest.mark.parametrize("there", WRAPS)
@pytest.mark.parametrize("here", WRAPS)
def test_a_submodule_wrapped_on_either_side_restores_with_its_optimizer(
    tmp_path: Path, here: str, there: str
) -> None:
    first = net(0, WRAPS[there])
    inner(first).scale = 7
    optimizer = trained(first)
    path = tmp_path / "last.pt"
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, path)
    second = net(1, WRAPS[here])
    other = torch.optim.AdamW(second.named_parameters())
    restore(path, State(second, other))
    for (_, value), (name, restored) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(value, restored), name
        assert torch.equal(optimizer.state[value]["exp_avg"], other.state[restored]["exp_avg"]), name
    assert inner(second).scale == 7


def test_a_mismatch_in_a_checkpointed_module_is_found_before_the_first_change(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"model": {**net(0).state_dict(), "0.9.weight": torch.ones(1)}}, path)
    model = net(1, checkpoint_wrapper)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(MismatchError, match=r"unexpected in the checkpoint \(1\):\n  model/0\.9\.weight"):
        restore(path, State(model))
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_loading_of_ones_own_inside_a_checkpointed_module_still_runs(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    first = net(0)
    torch.save({"model": {k: v for k, v in first.state_dict().items() if "_extra_state" not in k}}, path)
    model = net(1, checkpoint_wrapper, Tripled)
    restore(path, State(model))
    assert torch.equal(inner(model).weight, inner(first).weight * 3)


def test_versions_of_submodules_are_found_under_a_wrappers_prefix(tmp_path: Path) -> None:
    first = nn.DataParallel(net(0))
    weights = first.state_dict()
    del weights["module.0.1.num_batches_tracked"]
    path = tmp_path / "last.pt"
    torch.save({"model": weights}, path)
    # The normalisation layer's saved version keeps the count, so it is missing, as torch would say.
    with pytest.raises(MismatchError, match=r"model/0\.1\.num_batches_tracked"):
        restore(path, State(net(1)))
    weights._metadata["module.0.1"]["version"] = 1
    torch.save({"model": weights}, path)
    restore(path, State(net(1)))


@pytest.mark.parametrize(
    ("saved", "own", "advised"),
    [
        ("model.", "", 'rename={"model.": ""}'),
        ("", "model.", 'rename={"": "model."}'),
        ("encoder.", "backbone.", 'rename={"encoder.": "backbone."}'),
        ("module.model.", "", 'rename={"model.": ""}'),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_the_rename_that_a_mismatch_prints_works(
    tmp_path: Path, saved: str, own: str, advised: str, named: bool
) -> None:
    def inside(prefix: str, seed: int) -> tuple[nn.Module, nn.Sequential]:
        core = net(seed)
        model: nn.Module = core
        for part in reversed(prefix.split(".")[:-1]):
            model = nn.ModuleDict({part: model})
        return model, core

    (outer, first), (job, second) = inside(saved, 0), inside(own, 1)
    trained(first)
    optimizer = torch.optim.AdamW(outer.named_parameters() if named else outer.parameters())
    optimizer.step()
    path = tmp_path / "last.pt"
    torch.save({"model": outer.state_dict(), "optimizer": optimizer.state_dict()}, path)
    other = torch.optim.AdamW(job.parameters())
    with pytest.raises(MismatchError) as raised:
        restore(path, State(job, other))
    found = re.search(r"LoadOptions\((rename=\{.*?\})\)", str(raised.value))
    assert found is not None
    assert found[1] == advised
    restore(path, State(job, other), rename=json.loads(found[1].removeprefix("rename=")))
    for value, restored in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(value, restored)
        assert torch.equal(optimizer.state[value]["exp_avg"], other.state[restored]["exp_avg"])


def test_without_strictness_the_rename_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"model": nn.ModuleDict({"model": net(0)}).state_dict()}, path)
    with pytest.warns(
        UserWarning,
        match=r'lacks 9 names of the model, and holds 10 unexpected ones.*rename=\{"model.": ""\}',
    ):
        restore(path, State(net(1)), strict=False)


def test_tensors_of_another_shape_explain_nothing(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"model": nn.ModuleDict({"head": nn.Linear(3, 7)}).state_dict()}, path)
    with pytest.raises(MismatchError) as raised:
        restore(path, State(nn.ModuleDict({"classifier": nn.Linear(3, 2)})))
    assert "rename={...}" in str(raised.value)


def test_a_rename_that_fits_no_name_is_told(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"model": net(0).state_dict()}, path)
    with pytest.warns(UserWarning, match="rename: 'backbone' fits no name of the model .*'backbone.'"):
        restore(path, State(net(1)), rename={"backbone": "encoder"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore(path, State(net(1)), rename={"0.0.": "0.0."})
    with pytest.raises(OptionError, match=r"is a pattern.*backbone\."):
        restore(path, State(net(1)), rename={"backbone.*": "encoder.*"})


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 3).requires_grad_(False)
        self.adapter = nn.Linear(3, 3)


def test_an_adapter_lacks_frozen_weights_and_may_where_it_is_said(tmp_path: Path) -> None:
    first, second = Adapted(), Adapted()
    weights = {name: value for name, value in first.state_dict().items() if name.startswith("adapter")}
    path = tmp_path / "adapter.pt"
    torch.save({"model": weights}, path)
    base = second.base.weight.clone()
    with pytest.raises(MissingFrozenError, match=r"lacks 2 frozen parameters"):
        restore(path, State(second))
    assert not torch.equal(second.adapter.weight, first.adapter.weight)
    receipt = restore(path, State(second), allow_missing_frozen=True)
    assert torch.equal(second.adapter.weight, first.adapter.weight)
    assert torch.equal(second.base.weight, base)
    assert receipt.missing == ("model/base.weight", "model/base.bias")
    del weights["adapter.bias"]
    torch.save({"model": weights}, path)
    with pytest.raises(MismatchError, match=r"missing from the checkpoint \(1\):\n  model/adapter\.bias"):
        restore(path, State(second), allow_missing_frozen=True)


def test_frozen_weights_may_lack_where_the_module_loads_itself(tmp_path: Path) -> None:
    model = nn.ModuleDict({"base": Tripled(2, 2).requires_grad_(False), "adapter": nn.Linear(2, 2)})
    path = tmp_path / "adapter.pt"
    torch.save(
        {"model": nn.ModuleDict({"adapter": nn.Linear(2, 2), "base": nn.Identity()}).state_dict()}, path
    )
    with pytest.raises(PartialRestoreError, match=r"missing: base\.weight"):
        restore(path, State(model))
    base = model["base"].weight.clone()
    restore(path, State(model), allow_missing_frozen=True)
    assert torch.equal(base, model["base"].weight)


def test_state_of_parameters_outside_the_model_is_restored_with_and_without_names(tmp_path: Path) -> None:
    def job(seed: int, *, named: bool) -> tuple[nn.Module, nn.Linear, torch.optim.Optimizer]:
        model, outside = net(seed), nn.Linear(2, 2)
        pairs = [*model.named_parameters(), *((f"criterion.{n}", p) for n, p in outside.named_parameters())]
        return model, outside, torch.optim.AdamW(pairs if named else [one for _, one in pairs])

    for saved_names in (True, False):
        model, outside, optimizer = job(0, named=saved_names)
        outside(model(torch.rand(4, 3))).square().mean().backward()
        optimizer.step()
        path = tmp_path / "last.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        for own_names in (True, False):
            other, beyond, restored = job(1, named=own_names)
            restore(path, State(other, restored))
            moments = optimizer.state[outside.weight]["exp_avg"]
            assert torch.equal(moments, restored.state[beyond.weight]["exp_avg"])


def test_one_name_for_two_parameters_leaves_their_positions(tmp_path: Path) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)

    def both(model: nn.Module, outside: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([*model.named_parameters(), *outside.named_parameters()], lr=0.1, momentum=0.9)

    optimizer = both(first, second)
    second(first(torch.rand(4, 2))).sum().backward()
    optimizer.step()
    path = tmp_path / "last.pt"
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, path)
    model, outside = nn.Linear(2, 2), nn.Linear(2, 2)
    other = both(model, outside)
    restore(path, State(model, other))
    for value, restored in ((first.weight, model.weight), (second.weight, outside.weight)):
        assert torch.equal(
            optimizer.state[value]["momentum_buffer"], other.state[restored]["momentum_buffer"]
        )
