"""Restores what a framework's own job saved, by `rankload.load`, into a job without it; every rank runs `restore`."""

from __future__ import annotations

import json
import warnings
from typing import Any

import deepspeed
import torch
from framework_model import (
    GLOBAL_BATCH,
    SAVED_AT,
    batches,
    differences,
    held,
    held_by_engine,
    numbers,
    of_all_ranks,
    rank,
    tiny_gpt2,
    world_size,
)  # fmt: skip
from rankload.loader import State, load
from torch import nn
from torch.nn.parallel import DistributedDataParallel

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


SAVED_WORLD_SIZE = 2


class Inside(nn.Module):
    """The model as Lightning's modules hold it: under ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> Any:
        return self.model(**batch)


def groups_of(writer: str, kind: str, module: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's groups as the writer's job has them."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if writer != "trainer" or kind.startswith("zero"):
        decay = {"lightning": 0.01, "accelerate": 0.01, "torchtitan": 0.1, "trainer": 0.1}[writer]
        return [{"params": [parameter for _, parameter in named], "weight_decay": decay}]
    # Trainer leaves biases and layer norms without weight decay, in a group of their own.
    without = [name.endswith("bias") or "ln_" in name for name, _ in named]
    return [
        {
            "params": [p for (_, p), one in zip(named, without, strict=True) if one is last],
            "weight_decay": decay,
        }
        for last, decay in ((False, 0.1), (True, 0.0))
    ]


def scheduler_of(writer: str, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """One of the class that the writer's job has."""
    if writer in ("lightning", "accelerate"):
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step // 2))


def job(writer: str, kind: str, target: str) -> tuple[State, nn.Module]:
    """A `State` of other weights than the saved ones, and the module that is called."""
    inner = tiny_gpt2(seed=7)
    module: nn.Module = Inside(inner) if writer == "lightning" else inner
    if target.startswith("zero"):
        config = {
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size(),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": int(target[-1])},
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.AdamW(groups_of(writer, kind, module), lr=0.5)
        scheduler = scheduler_of(writer, optimizer)
        by_engine = scheduler if writer != "accelerate" else None
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=by_engine, config=config
        )
        if by_engine is None:
            return State(engine, schedulers=scheduler), engine
        return State(engine), engine
    called = module
    if target == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for block in inner.transformer.h:
            fully_shard(block)
        fully_shard(module)
    elif world_size() > 1:
        called = DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(groups_of(writer, kind, module), lr=0.5)
    return State(called, optimizer, scheduler_of(writer, optimizer)), called


def restore(folder: str, path: str, writer: str, target: str) -> None:
    """Rank 0 prints, as JSON, what was restored otherwise than it was saved, and what the result told.

    `writer` is the framework and the kind of its job, joined by a dash.
    """
    torch.distributed.init_process_group("gloo")
    writer, _, kind = writer.partition("-")
    state, called = job(writer, kind, target)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = load(path, state, progress_bar=False)
    optimizers = [] if target.startswith("zero") else list(state.optimizers)
    module = called.module if isinstance(called, DistributedDataParallel) else called
    found = held_by_engine(called) if target.startswith("zero") else held(module, optimizers)
    losses = []
    for batch in batches(SAVED_AT, SAVED_AT):
        loss = called(**batch).loss
        if target.startswith("zero"):
            called.backward(loss)
            called.step()
        else:
            loss.backward()
            optimizers[0].step()
            optimizers[0].zero_grad()
        for scheduler in state.schedulers:
            # Accelerate's schedulers step once for each process.
            for _ in range(SAVED_WORLD_SIZE if writer == "accelerate" else 1):
                scheduler.step()
        losses.append(of_all_ranks(float(loss.detach())))
    if rank() == 0:
        receipt = result.receipt
        print(
            json.dumps(
                {
                    "differences": differences(
                        folder, found, without=("step/",) if "zero" in (target[:4], kind[:4]) else ()
                    ),
                    "losses": losses,
                    "numbers": numbers(folder),
                    "samples": GLOBAL_BATCH // world_size() * world_size(),
                    "layout": receipt.layout,
                    "kind": receipt.kind,
                    "step": result.step,
                    "not_restored": list(receipt.not_restored),
                    "derived": list(receipt.derived),
                    "rng": None if result.rng_states is None else len(result.rng_states),
                    "extra": sorted(map(str, result.extra)),
                    "warnings": [str(one.message) for one in told if one.category is UserWarning],
                }
            )
        )
