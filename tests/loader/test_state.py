"""`State.state_dict`: what two ranks gather of sharded modules is a file that any job can load."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from modules_worker import full, sharded_job, train
from places import SUPPORT
from processes import run_ranks
from rankload.loader import LayoutError, State, load
from rankload.loader.state import unwrap
from torch import nn
from zero_model import TinyModel


def gather_and_load(folder: str) -> None:
    """One rank's part."""
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    state = sharded_job(seed=3)
    train(state, 2)
    with torch.device("meta"), torch.inference_mode():
        found = state.state_dict()
    expected = {name: full(tensor) for name, tensor in state.model.state_dict().items()}
    assert list(found["model"]) == list(expected)
    for name, tensor in found["model"].items():
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, expected[name]), name
    assert found["model"]._metadata == state.model.state_dict()._metadata
    (saved,) = found["optimizers"].values()
    own = state.optimizers[0].state_dict()
    assert saved["param_groups"] == own["param_groups"]
    for position, entries in own["state"].items():
        for entry, tensor in entries.items():
            assert type(saved["state"][position][entry]) is torch.Tensor
            assert torch.equal(saved["state"][position][entry], full(tensor)), (position, entry)

    again = state.state_dict(keep=rank == 1)
    assert bool(again) is (rank == 1)
    if rank == 1:
        torch.save({"state": again}, Path(folder, "last.pt"))
    torch.distributed.barrier()
    going_on = train(state)
    other = sharded_job(seed=5)
    load(str(Path(folder, "last.pt")), other, progress_bar=False)
    assert train(other) == going_on
    # As the stages of a pipeline differ: each rank has a tensor that the other lacks.
    other.dataset_state = {f"of {rank}": next(other.model.parameters())}
    with pytest.raises(LayoutError, match=r"(?s)rank 0 has \d+ sharded tensors and rank 1.*of 0.*of 1"):
        other.state_dict()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_sharded_modules_are_gathered_into_a_file_that_any_world_can_load(tmp_path: Path) -> None:
    finished = run_ranks(
        f"{__file__}:gather_and_load",
        2,
        args=(tmp_path,),
        deadline_s=120,
        env={"PYTHONPATH": str(SUPPORT)},
    )
    assert [rank.returncode for rank in finished] == [0, 0], finished
    alone = TinyModel(7)
    load(tmp_path / "last.pt", State(alone), load_weights_only=True, progress_bar=False)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["state"]["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in alone.state_dict().items())


def test_without_shards_the_tensors_are_the_live_ones() -> None:
    model = nn.Linear(2, 2)
    found = State(model, torch.optim.SGD(model.parameters(), lr=0.1)).state_dict()
    assert isinstance(found["model"], OrderedDict)
    assert found["model"]["weight"].data_ptr() == model.weight.data_ptr()
    assert State(model).state_dict(keep=False) == {}


def test_an_engine_keeps_its_wrapper_of_a_compiled_module() -> None:
    class Engine(nn.Module):
        """Like DeepSpeed's, it answers for what its module has."""

        zero_optimization_stage = 1

        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def __getattr__(self, name: str) -> Any:
            module = self.__dict__["_modules"]["module"]
            return module if name == "module" else getattr(module, name)

    inner = nn.Linear(1, 1)
    compiled = torch.compile(inner)
    engine = Engine(compiled)
    assert engine._orig_mod is inner
    assert unwrap(compiled) is inner
    assert unwrap(engine) is engine


def test_what_cannot_be_gathered_is_refused_with_what_can_be_done() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Torch's needs a process group; State tells it by name."""

    class ShardedTensor:
        pass

    flat: Any = FullyShardedDataParallel()
    with pytest.raises(LayoutError, match=r"get_state_dict\(model, optimizer"):
        State(flat, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)).state_dict()
    assert State(flat).state_dict() == {"model": {}}
    with pytest.raises(LayoutError, match="dataset_state/cursor is a ShardedTensor"):
        State(nn.Linear(2, 2), dataset_state={"cursor": ShardedTensor()}).state_dict()
