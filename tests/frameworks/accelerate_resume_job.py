"""A job of Accelerate that saves after step 4, and one that goes on from there, as docs/frameworks.md has it; every
rank runs each function."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from accelerate_job import accelerator
from framework_lines import run_lines
from framework_model import (
    SAVED_AT,
    SHARED_BATCH,
    Tokens,
    by_step,
    differences,
    gathered,
    held,
    held_by_engine,
    hold,
    of_all_ranks,
    random_digest,
    rank,
    tell,
    tiny_gpt2,
    world_size,
)  # fmt: skip


class Job:
    """`kind`: ``ddp``, ``zero2`` or ``zero3``. `schedule`: ``steps`` and ``one-cycle`` count optimizer steps, however
    many processes there are; ``samples`` and ``stairs`` count what Accelerate counts.

    With ``steps`` there is another loader, of larger batches.
    """

    def __init__(self, kind: str, schedule: str, seed: int, batch: int = SHARED_BATCH) -> None:
        from accelerate.utils import DataLoaderConfiguration, set_seed

        self.kind = kind
        each = batch // world_size()
        self.accelerator = accelerator(
            kind, batch, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
        )
        set_seed(11)
        self.model: Any = tiny_gpt2(seed)
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler: Any = self._scheduler(schedule)
        if (kind, schedule) == ("ddp", "steps"):
            self.accelerator.prepare_data_loader(torch.utils.data.DataLoader(Tokens(), batch_size=2 * each))
        self.loader: Any = torch.utils.data.DataLoader(Tokens(), batch_size=each, shuffle=True)
        self.seen: list[list[int]] = []
        set_seed(11)

    def _scheduler(self, schedule: str) -> Any:
        from torch.optim import lr_scheduler
        from transformers import get_linear_schedule_with_warmup

        processes = self.accelerator.num_processes
        if schedule == "steps":
            return get_linear_schedule_with_warmup(self.optimizer, 2 * processes, 16 * processes)
        if schedule == "one-cycle":
            return lr_scheduler.OneCycleLR(self.optimizer, 1e-3, total_steps=10 * processes)
        if schedule == "samples":
            return lr_scheduler.LambdaLR(self.optimizer, lambda count: 1 / (1 + count))
        return lr_scheduler.StepLR(self.optimizer, 5, gamma=0.5)

    def prepare(self) -> None:
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            self.model, self.optimizer, self.loader, self.scheduler
        )

    def found(self) -> dict[str, torch.Tensor]:
        if self.kind == "ddp":
            module = getattr(self.model, "module", self.model)
            return held(module, [self.optimizer.optimizer])
        return held_by_engine(self.model)

    def train(self, batches: Iterator[Any], steps: int) -> tuple[list[float], list[float]]:
        """The losses over all ranks, and the rate of each step."""
        losses, rates = [], []
        for _ in range(steps):
            batch = next(batches)
            self.seen.append(batch["input_ids"][:, 0].tolist())
            torch.rand(rank() + 3)
            random.random()
            rates.append(self.optimizer.param_groups[0]["lr"])
            loss = self.model(**batch).loss
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            losses.append(of_all_ranks(float(loss.detach())))
        return losses, rates


def save(folder: str, kind: str, schedule: str, attached: str) -> None:
    """Leaves what ``save_state`` writes in `folder`/state, of an accelerator that is `attached` or not."""
    from rankload.integrations.accelerate import attach

    os.makedirs(folder, exist_ok=True)
    job = Job(kind, schedule, 0)
    job.prepare()
    if attached == "True":
        attach(attach(job.accelerator))
    batches = iter(job.loader)
    job.train(batches, SAVED_AT)
    job.accelerator.save_state(f"{folder}/state")
    found, states, rate = job.found(), gathered(random_digest()), job.optimizer.param_groups[0]["lr"]
    job.seen.clear()
    losses, rates = job.train(batches, SAVED_AT)
    hold(
        folder, found, states=states, rate=rate, losses=losses, rates=rates, seen=by_step(job.seen),
        step=job.accelerator.step,
    )  # fmt: skip


def resume(
    folder: str, kind: str, schedule: str, path: str, saved_batch: str, batch: str = str(SHARED_BATCH)
) -> None:
    """Goes on by the lines of docs/frameworks.md; rank 0 prints what it finds, as JSON.

    `saved_batch`: what ``attach`` is told in addition; none where it is empty. `batch`: samples of a step here.
    """
    from rankload.integrations import accelerate as adapter

    job = Job(kind, schedule, 7, int(batch))
    own = deepspeed.DeepSpeedEngine.load_checkpoint
    names = {
        "accelerator": job.accelerator, "model": job.model, "optimizer": job.optimizer, "loader": job.loader,
        "scheduler": job.scheduler, "path": path,
    }  # fmt: skip
    attach = adapter.attach
    if saved_batch:
        adapter.attach = lambda one: attach(one, saved_batch_size=int(saved_batch))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run_lines("accelerate", names)
    assert deepspeed.DeepSpeedEngine.load_checkpoint is own
    for name in ("model", "optimizer", "loader", "scheduler"):
        setattr(job, name, names[name])
    found, states, rate = job.found(), gathered(random_digest()), job.optimizer.param_groups[0]["lr"]
    batches = iter(job.accelerator.skip_first_batches(job.loader, SAVED_AT))
    losses, rates = job.train(batches, SAVED_AT)
    seen = by_step(job.seen)
    job.accelerator.save_state(f"{folder}/again-{world_size()}-{schedule}")
    tell(
        differences=differences(folder, found, without=() if kind == "ddp" else ("step/",)),
        states=states,
        rate=rate,
        losses=losses,
        rates=rates,
        seen=seen,
        step=job.accelerator.step,
        warnings=[str(one.message) for one in told if "a step was" in str(one.message)],
    )
