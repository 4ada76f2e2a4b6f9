"""A script of torch's DDP that resumes by the lines of docs/frameworks.md; every rank runs `train`."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist
from framework_lines import run_lines
from processes import end_together
from torch import nn

SAMPLES = 48
GLOBAL_BATCH = 12
SAVE_EVERY = 6


class Numbers(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Samples that tell their number."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.randn(8, generator=torch.Generator().manual_seed(index))


def train(folder: str, steps: str, dropout: str, run: str = "run", save_every: str = str(SAVE_EVERY)) -> None:
    """Trains in `folder` until so many steps are done; rank 0 prints what each step trained on, and its numbers.

    `run` is where checkpoints are, and go to after each `save_every` steps.
    """
    os.chdir(folder)
    dist.init_process_group("gloo")
    told = _train(int(steps), float(dropout), run, int(save_every))
    if dist.get_rank() == 0:
        print(json.dumps(told))
    end_together()


def _train(steps: int, dropout: float, run: str, save_every: int) -> dict[str, Any]:
    """What the steps of this process trained on, and where they ended."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1)),
        find_unused_parameters=True,  # keeps its buckets: a fresh process sums in the order of one that went on
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
    torch.manual_seed(100 + rank)
    told: list[dict[str, Any]] = []

    def train_step(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        indexes, x = batch
        loss = (model(x).squeeze(-1) - x.mean(-1)).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        of_ranks: list[Any] = [None] * world_size
        dist.all_gather_object(of_ranks, (indexes.tolist(), float(loss.detach())))
        samples = [index for row in zip(*(one[0] for one in of_ranks), strict=True) for index in row]
        loss_of_all = sum(one[1] for one in of_ranks) / world_size
        told.append({"samples": samples, "loss": loss_of_all, "rate": rate})

    names = run_lines(
        "script",
        {
            "dataset": Numbers(), "model": model, "optimizer": optimizer, "scheduler": scheduler,
            "train_step": train_step, "steps": steps, "save_every": save_every, "run": run,
            "global_batch": GLOBAL_BATCH, "world_size": world_size,
        },
    )  # fmt: skip
    return {"steps": told, "step": names["step"], "sampler": names["sampler"].state_dict()}
