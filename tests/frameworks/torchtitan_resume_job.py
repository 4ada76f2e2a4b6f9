"""Jobs that torchtitan's CheckpointManager saves after step 4, and others that ours resumes; every rank runs each
function.

The parts that a Trainer hands its manager are torchtitan's own here, with a small model of another kind.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchtitan.train
from framework_lines import run_lines
from framework_model import (
    GLOBAL_BATCH,
    SAVED_AT,
    Tokens,
    differences,
    held,
    hold,
    numbers,
    of_all_ranks,
    rank,
    tell,
    tiny_gpt2,
    world_size,
)  # fmt: skip
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import Checkpoint


class Samples(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """This rank's samples of each batch, which remembers where it is."""

    def __init__(self, step: int = 0) -> None:
        self.step = step

    def __iter__(self) -> Any:
        data, each = Tokens(), GLOBAL_BATCH // world_size()
        while True:
            start = self.step * GLOBAL_BATCH + rank() * each
            self.step += 1
            numbers = [number % len(data) for number in range(start, start + each)]
            samples = [data[number] for number in numbers]
            yield {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "buffer": [1, 2], "drawn": torch.arange(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["drawn"].tolist() == [0, 1, 2], state
        self.step = state["step"]


class Job:
    """What torchtitan's Trainer makes before its manager, and makes the manager as it does."""

    def __init__(self, folder: str, config: Checkpoint, *, seed: int, start: int = 0) -> None:
        self.step = 0
        self.ntokens_seen = 0
        self.model = tiny_gpt2(seed)
        mesh = init_device_mesh("cpu", (world_size(),), mesh_dim_names=("dp_shard",))
        for block in self.model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizers = OptimizersContainer(
            [self.model], torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}
        )
        self.schedulers = LRSchedulersContainer(self.optimizers, lambda step: 0.5 ** (step // 2))
        self.loader = ParallelAwareDataloader(
            Samples(start), dp_rank=rank(), dp_world_size=world_size(), batch_size=None
        )
        make: Callable[..., Any] = torchtitan.train.CheckpointManager
        self.checkpointer = make(
            dataloader=self.loader,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self},
            checkpoint_config=config,
            sd_adapter=None,
            base_folder=folder,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.ntokens_seen = state["step"], state["ntokens_seen"]

    def train(self, until: int, saves_at: int | None = None) -> list[float]:
        losses = []
        loader = iter(self.loader)
        while self.step < until:
            loss = self.model(**next(loader)).loss
            loss.backward()
            self.optimizers.step()
            self.schedulers.step()
            self.optimizers.zero_grad()
            losses.append(of_all_ranks(float(loss.detach())))
            self.step += 1
            self.ntokens_seen += 24
            if self.step == saves_at:
                self.checkpointer.save(self.step)
                self.found = held(self.model, list(self.optimizers))
        return losses


def save(folder: str, kind: str) -> None:
    """Leaves ``checkpoint/step-4`` in `folder`; `kind` is ``torchtitan``."""
    os.makedirs(folder, exist_ok=True)
    torch.distributed.init_process_group("gloo")
    job = Job(folder, Checkpoint(enable=True, interval=SAVED_AT, last_save_model_only=False), seed=0)
    losses = job.train(2 * SAVED_AT, SAVED_AT)
    hold(folder, job.found, losses=losses)
    job.checkpointer.close()


def resume(folder: str, path: str, model_only: str) -> None:
    """Rank 0 prints what a resumed job holds otherwise than the one that saved, and how it goes on.

    `path` is ``-`` for the job's own folder, else what ``initial_load_path`` names.
    """
    torch.distributed.init_process_group("gloo")
    config = Checkpoint(enable=True, load_only=True)
    if path != "-":
        config.folder, config.initial_load_path = "elsewhere", path
        config.initial_load_model_only = model_only == "True"
    jobs: list[Job] = []

    class Trainer:
        """Stands in for torchtitan's (`torchtitan_trainer_job` has that): it makes the manager in the same way."""

        def __init__(self, config: Checkpoint) -> None:
            start = 0 if world_size() == 2 and path == "-" else SAVED_AT
            self.job = Job(folder, config, seed=7, start=start)
            jobs.append(self.job)

        def train(self) -> None:
            self.job.loaded = self.job.checkpointer.load()  # type: ignore[attr-defined]

    theirs = torchtitan.train.CheckpointManager
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torchtitan.train.Trainer, before = Trainer, torchtitan.train.Trainer
        try:
            run_lines("torchtitan", {"config": config})
        finally:
            torchtitan.train.Trainer = before
    assert torchtitan.train.CheckpointManager is theirs
    (job,) = jobs
    result = job.checkpointer.rankload_result
    found = held(job.model, list(job.optimizers))
    start = {
        "step": job.step,
        "ntokens_seen": job.ntokens_seen,
        "rates": job.schedulers.schedulers[0].get_last_lr(),
    }
    left = ("step/", "exp_avg") if model_only == "True" else ()
    losses = job.train(2 * SAVED_AT)
    tell(
        loaded=job.loaded,  # type: ignore[attr-defined]
        differences=differences(folder, found, without=left),
        start=start,
        losses=losses,
        expected=numbers(folder).get("losses", [])[SAVED_AT:],
        warnings=[str(one.message) for one in told if one.category is UserWarning],
        kind=result.receipt.kind,
    )
    job.checkpointer.close()
