"""Which engine a module or an optimizer belongs to, with engines of a stand-in for DeepSpeed's class."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rankload.loader import LayoutError, State, load
from rankload.loader.targets.deepspeed.ownership import engine_behind, is_part_of
from torch import nn


class Engine(nn.Module):
    """Answers for its module, as DeepSpeed's does."""

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        super().__init__()
        self.module = module
        self.optimizer = optimizer
        self.basic_optimizer = getattr(optimizer, "optimizer", optimizer)
        self.client_optimizer = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["module"], name)


class DeepSpeedZeroOptimizer:
    __module__ = "deepspeed.runtime.zero.stage_1_and_2"

    def __init__(self, module: nn.Module) -> None:
        self.optimizer = torch.optim.SGD(module.parameters())
        self._grad_acc_hooks = [
            one.register_post_accumulate_grad_hook(lambda _: None) for one in module.parameters()
        ]


class Wrapper(torch.optim.Optimizer):
    """As Accelerate wraps an engine's optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.engine", "deepspeed.comm.comm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    # As deepspeed.initialize leaves it.
    monkeypatch.setattr(sys.modules["deepspeed.comm.comm"], "cdb", object(), raising=False)
    monkeypatch.setattr(sys.modules["deepspeed.runtime.engine"], "DeepSpeedEngine", Engine, raising=False)
    yield
    gc.collect()


def zero_engine() -> Engine:
    module = nn.Sequential(nn.Linear(2, 2))
    return Engine(module, DeepSpeedZeroOptimizer(module))


def test_the_module_and_its_wrappers_lead_to_the_engine() -> None:
    engine = zero_engine()
    for model in (engine, engine.module, nn.DataParallel(engine.module), nn.DataParallel(engine)):
        assert engine_behind(model, []) is engine
        assert engine_behind(model, [Wrapper(engine.optimizer)]) is engine
    assert engine_behind(nn.Linear(2, 2), [torch.optim.SGD(nn.Linear(2, 2).parameters())]) is None
    compiled = zero_engine()
    compiled.module = torch.compile(compiled.module)
    assert engine_behind(compiled.module._orig_mod, []) is compiled


def test_which_optimizers_are_the_engines() -> None:
    engine = zero_engine()
    for own in (engine.optimizer, engine.optimizer.optimizer, Wrapper(Wrapper(engine.optimizer))):
        assert is_part_of(engine, own)
    assert not is_part_of(engine, torch.optim.SGD(engine.module.parameters()))
    assert not is_part_of(engine, Wrapper(zero_engine().optimizer))


def test_objects_are_looked_through_only_where_deepspeed_may_have_made_an_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = zero_engine()
    looks: list[None] = []
    monkeypatch.setattr(gc, "get_objects", lambda: looks.append(None) or [engine])
    assert engine_behind(engine.module, []) is engine
    monkeypatch.setattr(sys.modules["deepspeed.comm.comm"], "cdb", None)
    assert engine_behind(nn.Linear(2, 2), []) is None
    assert len(looks) == 1


def test_what_is_not_certain_is_refused() -> None:
    engine = zero_engine()
    for model, optimizers, said in (
        (engine.module[0], [], "not that engine's whole module, which is a Sequential"),
        (nn.Sequential(engine.module), [], "not that engine's whole module"),
        (
            nn.Linear(2, 2),
            [Wrapper(engine.optimizer)],
            "State holds a Wrapper, an optimizer of a DeepSpeed engine",
        ),
    ):
        with pytest.raises(LayoutError, match=said) as caught:
            engine_behind(model, optimizers)
        assert "State(model=engine)" in str(caught.value)
    again = Engine(engine.module, engine.optimizer)
    with pytest.raises(LayoutError, match="the module of 2 DeepSpeed engines"):
        engine_behind(engine.module, [])
    assert engine_behind(again, []) is again


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_marks_of_deepspeed_without_an_engine_are_refused(mark: str) -> None:
    module = nn.Linear(2, 2)
    setattr(module.bias, mark, 3)
    with pytest.raises(LayoutError, match=r"no engine has it as its module.*State\(model=engine"):
        engine_behind(module, [])


def test_a_module_whose_engine_is_destroyed_or_gone_is_like_any_other() -> None:
    engine = zero_engine()
    for hook in engine.optimizer._grad_acc_hooks:
        hook.remove()
    assert engine_behind(engine.module, []) is None
    module = zero_engine().module
    gc.collect()
    assert engine_behind(module, []) is None


def test_an_engine_whose_optimizer_updates_the_module_itself() -> None:
    module = nn.Linear(2, 2)
    engine = Engine(module, torch.optim.SGD(module.parameters()))
    assert engine_behind(module, []) is engine
    assert engine_behind(module, [engine.optimizer]) is None
    module.weight.ds_id = 0  # type: ignore[assignment]
    assert engine_behind(module, [engine.optimizer]) is engine


def test_a_module_that_is_loaded_before_its_engine_is_made_is_warned_of(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    torch.save({"state": State(module, torch.optim.SGD(module.parameters())).state_dict()}, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="no optimizer: it is not restored.*load after deepspeed.initialize"):
        result = load(str(tmp_path / "x.pt"), State(module), progress_bar=False)
    assert result.receipt.not_restored == ("state/optimizers/SGD",)
