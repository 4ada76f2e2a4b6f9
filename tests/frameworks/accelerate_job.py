"""A job of Accelerate that saves after step 4 and goes on to step 8; every rank runs each function."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch
from framework_model import (
    GLOBAL_BATCH,
    SAVED_AT,
    batches,
    held,
    held_by_engine,
    hold,
    of_all_ranks,
    rank,
    tiny_gpt2,
    world_size,
)  # fmt: skip

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def accelerator(kind: str, batch: int = GLOBAL_BATCH, **options: Any) -> Any:
    """`kind`: ``zero2``, ``zero3``, or any other without DeepSpeed; `batch`: samples of a step over all ranks."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DeepSpeedPlugin

    torch.distributed.init_process_group("gloo")
    if not kind.startswith("zero"):
        return Accelerator(cpu=True, **options)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    config = {
        "train_micro_batch_size_per_gpu": batch // world_size(),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": int(kind[-1])},
        "zero_force_ds_cpu_optimizer": False,
    }
    # Without a GPU an Accelerator with DeepSpeed takes itself for the only process, as Trainer knows.
    PartialState(cpu=False, backend="gloo")
    shared = PartialState._shared_state
    shared["num_processes"] = world_size()
    shared["process_index"] = shared["local_process_index"] = rank()
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), **options)


def save(folder: str, kind: str) -> None:
    """Leaves what ``save_state`` writes in `folder`/state."""
    os.makedirs(folder, exist_ok=True)
    job = accelerator(kind)
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    loader = torch.utils.data.DataLoader([0], batch_size=1)
    model, optimizer, _, scheduler = job.prepare(model, optimizer, loader, scheduler)
    losses = []
    for step, batch in enumerate(batches(0, 2 * SAVED_AT)):
        loss = model(**batch).loss
        job.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(of_all_ranks(float(loss.detach())))
        if step + 1 == SAVED_AT:
            job.save_state(f"{folder}/state")
            engine = kind.startswith("zero")
            found = held_by_engine(model) if engine else held(model.module, [optimizer.optimizer])
            kept = {"rates": scheduler.get_last_lr(), "epoch": scheduler.scheduler.last_epoch}
    hold(folder, found, losses=losses, **kept)
