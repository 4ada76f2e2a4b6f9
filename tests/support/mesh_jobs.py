"""Jobs whose models are sharded over meshes of ranks, and all of their tensors: for the tests of sharded files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from modules_worker import full, optimizer_for, plain_job, sharded_job, train
from rankload.loader import State
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from zero_model import TinyModel

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


def replicated_job(seed: int = 7) -> State:
    """FSDP2 over pairs of ranks, each of which keeps the same shards."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE // 2, 2), mesh_dim_names=("replicate", "shard"))
    return _sharded(TinyModel(seed), mesh)


def tensor_parallel_job(seed: int = 7) -> State:
    """FSDP2 over tensor parallelism of two ranks, whose shares of a layer are uneven."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE // 2, 2), mesh_dim_names=("data", "tensor"))
    model = TinyModel(seed)
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return _sharded(model, mesh["data"])


def _sharded(model: TinyModel, mesh: Any) -> State:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return State(model, optimizer_for(model))


JOBS: dict[str, Callable[..., State]] = {
    "plain": plain_job,
    "fsdp2": sharded_job,
    "hsdp": replicated_job,
    "tp": tensor_parallel_job,
}


def with_scheduler(state: State) -> State:
    state.schedulers = [torch.optim.lr_scheduler.MultiStepLR(state.optimizers[0], [3, 5])]
    return state


def whole(state: State) -> dict[str, torch.Tensor]:
    """All tensors of a job, whole and by name; every rank must call."""
    found = {f"model/{name}": full(value).clone() for name, value in state.model.state_dict().items()}
    entries = state.optimizers[0].state
    for name, parameter in state.model.named_parameters():
        found.update({f"{key}/{name}": full(one).clone() for key, one in entries.get(parameter, {}).items()})
    return found


def train_and_save(state: State, folder: Path, save: Callable[[State, Path], None]) -> None:
    """Trains two steps, saves, and trains on; the job's tensors when it saved and its later losses lie in `folder`.

    Every rank must call.
    """
    with_scheduler(state)
    for _ in range(2):
        train(state, 1)
        state.schedulers[0].step()
    save(state, folder)
    tensors = whole(state)
    losses = train(state)
    if RANK == 0:
        torch.save(tensors, folder / "tensors.pt")
        Path(folder, "losses.json").write_text(json.dumps(losses))
    if dist.is_initialized():
        dist.barrier()
