"""A further kind of checkpoint is a source and nothing else: a toy format goes into every kind of target."""

from __future__ import annotations

import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_source
from deepspeed_ranks import ENVIRONMENT, WITHOUT
from modules_worker import optimizer_for, plain_job, train
from places import SUPPORT
from processes import run_ranks
from rankload.loader import State
from toy_worker import load_toy, make_job, same_state, saved_job, write_toy

WORKER = str(SUPPORT / "toy_worker.py")
ENGINE = {"global_steps": 2, "global_samples": 8, "skipped_steps": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One checkpoint in the toy format as any job may save it, and one with what only a DeepSpeed engine can take."""
    folder = tmp_path_factory.mktemp("toy")
    job = make_job()
    write_toy(folder / "plain", job)
    write_toy(folder / "engine", job, ranks=2, engine=ENGINE)
    return folder / "plain", folder / "engine"


def run(function: str, world_size: int, *args: object) -> None:
    env = ENVIRONMENT if function == "engines" else WITHOUT
    finished = run_ranks(f"{WORKER}:{function}", world_size, args=args, deadline_s=180, env=env)
    assert [rank.returncode for rank in finished] == [0] * world_size, finished


def test_the_source_is_short() -> None:
    assert len(inspect.getsource(toy_source).splitlines()) <= 60


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("meta", [False, True])
def test_a_plain_job_goes_on(folders: tuple[Path, Path], which: int, meta: bool) -> None:
    with torch.device("meta" if meta else "cpu"):
        state = plain_job()
    state.schedulers = [torch.optim.lr_scheduler.StepLR(state.optimizers[0], 1)]
    result = load_toy(folders[which], state)
    saved = saved_job(folders[which])
    same_state(state, saved)
    assert train(state) == train(saved)
    assert result.receipt.kind == "toy"
    assert ("state/engine" in result.receipt.not_restored) is (which == 1)


def test_a_module_with_hooks_of_its_own(folders: tuple[Path, Path]) -> None:
    seen: list[str] = []
    state = plain_job()
    state.schedulers = [torch.optim.lr_scheduler.StepLR(state.optimizers[0], 1)]
    state.model.register_load_state_dict_pre_hook(lambda module, saved, *rest: seen.extend(saved))
    load_toy(folders[0], state)
    assert "odd" in seen
    same_state(state, saved_job(folders[0]))


def test_a_fully_sharded_job(folders: tuple[Path, Path]) -> None:
    run("fully_sharded", 2, folders[0])


class OwnState:
    """A state that loads itself."""

    def __init__(self) -> None:
        self.model = plain_job().model
        self.optimizers = [optimizer_for(self.model)]
        self.schedulers = [torch.optim.lr_scheduler.StepLR(self.optimizers[0], 1)]
        self.timestamp: Any = None

    def load_state_dict(self, state: dict[str, Any], logger: Any, **options: Any) -> None:
        assert not {"model", "optimizers"} & state.keys()
        self.schedulers[0].load_state_dict(state["schedulers"]["StepLR"])
        self.timestamp = state["timestamp"]

    def load_model_state(self, state_dict: dict[str, Any], logger: Any, **options: Any) -> None: ...


def test_a_state_that_loads_itself(folders: tuple[Path, Path]) -> None:
    own = OwnState()
    load_toy(folders[0], own)
    same_state(
        State(own.model, own.optimizers, own.schedulers, timestamp=own.timestamp), saved_job(folders[0])
    )


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("world_size", [1, 2] if os.environ.get("TEST_ALL") else [2])
def test_deepspeed_engines(folders: tuple[Path, Path], world_size: int) -> None:
    run("engines", world_size, *folders)
