"""A job that torchtitan's CheckpointManager saves after step 4, and that goes on to step 8; every rank runs each
function."""

from __future__ import annotations

import os
from typing import Any

import torch
from framework_model import SAVED_AT, batches, held, hold, of_all_ranks, tiny_gpt2, world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import Checkpoint


class TrainState:
    """The counters that torchtitan's trainer keeps."""

    step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step, dtype=torch.int32), "ntokens_seen": 48 * self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])


def save(folder: str, kind: str) -> None:
    """Leaves ``checkpoint/step-4`` in `folder`; `kind` is ``fsdp2``."""
    os.makedirs(folder, exist_ok=True)
    torch.distributed.init_process_group("gloo")
    model = tiny_gpt2()
    mesh = init_device_mesh("cpu", (world_size(),), mesh_dim_names=("dp_shard",))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizers = OptimizersContainer([model], torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1})
    schedulers = LRSchedulersContainer(optimizers, lambda step: 0.5 ** (step // 2))
    state = TrainState()
    manager = CheckpointManager(
        dataloader=None,
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=schedulers,
        states={"train_state": state},
        checkpoint_config=Checkpoint(enable=True, interval=SAVED_AT),
        sd_adapter=None,
        base_folder=folder,
    )
    losses = []
    for batch in batches(0, 2 * SAVED_AT):
        loss = model(**batch).loss
        loss.backward()
        optimizers.step()
        schedulers.step()
        optimizers.zero_grad()
        losses.append(of_all_ranks(float(loss.detach())))
        state.step += 1
        if state.step == SAVED_AT:
            manager.save(state.step)
            found = held(model, list(optimizers))
            rates = schedulers.schedulers[0].get_last_lr()
    hold(folder, found, losses=losses, rates=rates)
    manager.close()
