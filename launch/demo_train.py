"""Runs one rank of the demo, under torchrun: trains and saves, or restores and goes on.

``--save FOLDER`` trains `STEPS_BEFORE` steps, writes the checkpoint into FOLDER, and trains `STEPS_AFTER`
more without stopping. ``--load TEMPLATE`` restores into fresh weights and trains the same `STEPS_AFTER`.
Either way each rank writes its losses, its next random numbers and, after a load, the receipt to
``RESULTS/rankN.json``.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import logging
import os
import random
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..loader import LoadOptions, State, gather_rng, load_checkpoint, restore_rng
from .demo_model import BATCH, make_model, next_batch, seed_generators

STEPS_BEFORE = 4
STEPS_AFTER = 2
RUN_NAME = "demo"
UNAVAILABLE = "deepspeed-unavailable.txt"


@dataclass(frozen=True)
class Job:
    """A model in training: what gives the loss of a batch, what makes a step with it, what a load restores into, and
    what writes a checkpoint into a folder."""

    model: Callable[..., torch.Tensor]
    step: Callable[[torch.Tensor], None]
    state: State
    save: Callable[[Path, dict[str, Any]], None]


def deepspeed_job(stage: int, seed: int) -> Job:
    """A DeepSpeed engine; saved as one tar for each rank, as Composer does."""
    deepspeed = import_module("deepspeed")
    # This op would be compiled for two minutes; gloo serves the demo as well.
    import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 8, "warmup_max_lr": 3e-3}},
    }
    engine, *_ = deepspeed.initialize(model=make_model(seed), config=config)

    def step(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    def save(folder: Path, composer_states: dict[str, Any]) -> None:
        rank = dist.get_rank()
        with tempfile.TemporaryDirectory() as own:
            engine.save_checkpoint(own, tag="deepspeed")
            if rank == 0:
                torch.save(composer_states, os.path.join(own, "composer_states.pt"))
            with tarfile.open(folder / f"ep1-rank{rank}.tar", "w") as tar:
                tar.add(own, arcname="")

    return Job(engine, step, State(model=engine, run_name=RUN_NAME), save)


def plain_job(seed: int) -> Job:
    """A DDP-wrapped module with its optimizer and scheduler; saved as one file by rank 0."""
    # With this option DDP keeps its buckets. Otherwise it lays them out anew after the first step of a process,
    # gradients are then summed in another order, and a fresh process's first step differs in the last bit.
    model = torch.nn.parallel.DistributedDataParallel(make_model(seed), find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=8)
    state = State(model=model, optimizers=optimizer, schedulers=scheduler, run_name=RUN_NAME)

    def step(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()

    def save(folder: Path, composer_states: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            composer_states["state"] = {**state.state_dict(), **composer_states["state"]}
            torch.save(composer_states, folder / "ep1-rank0.pt")

    return Job(model, step, state, save)


def train(job: Job, steps: int) -> list[float]:
    """Trains and returns this rank's losses."""
    losses = []
    for _ in range(steps):
        loss = job.model(next_batch())
        job.step(loss)
        losses.append(loss.item())
    return losses


def save_checkpoint(job: Job, folder: Path, seed: int, batches: int) -> None:
    """Writes the checkpoint; all ranks call it."""
    timestamp = {"epoch": 1, "batch": batches, "sample": batches * BATCH * dist.get_world_size()}
    state = {"run_name": RUN_NAME, "rank_zero_seed": seed, "timestamp": {"Timestamp": timestamp}}
    job.save(folder, {"state": state, "rng": gather_rng()})


class Report:
    """A load's logger: keeps the receipt's figures, and its lines as the package's ``logging`` logger gets them."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        package = logging.getLogger("rankload")
        package.setLevel(logging.INFO)
        package.addHandler(handler)
        package.propagate = False

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        self.metrics = dict(metrics)


def restore(job: Job, template: str, cache_dir: str | None) -> dict[str, Any]:
    """Restores model, optimizer, scheduler and random generators; all ranks call it."""
    report = Report()
    options = LoadOptions(cache_dir=cache_dir)
    rng_states = load_checkpoint(template, job.state, report, progress_bar=False, options=options)
    if rng_states is None:
        raise SystemExit(f"{template} holds no random states")
    restore_rng(rng_states)
    return {"receipt": report.lines, "metrics": report.metrics, "batch": job.state.timestamp["batch"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, help="ZeRO stage; plain DDP where it is left out")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--load")
    parser.add_argument("--cache-dir")
    arguments = parser.parse_args()

    if arguments.stage is not None:
        try:
            import_module("deepspeed")
        except Exception as error:  # it fails to import in many ways: missing parts, compilers, versions
            (arguments.results / UNAVAILABLE).write_text(f"{type(error).__name__}: {error}".splitlines()[0])
            raise SystemExit(3) from None
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        run(arguments)
    except Exception as error:
        failed = arguments.results / f"rank{dist.get_rank()}.failed"
        failed.write_text(f"{type(error).__name__}: {error}")
        raise
    # A DistributedDataParallel module that is freed after its group may wait for ever.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    # DeepSpeed's groups outlive that, and gloo's threads may abort a process that takes its interpreter down.
    atexit.register(_end_at_once)


def _end_at_once() -> None:
    sys.stdout.flush()
    os._exit(0)


def run(arguments: argparse.Namespace) -> None:
    """One rank, inside the process group: trains and saves, or restores; then trains on and writes the results."""
    rank = dist.get_rank()
    job = (
        plain_job(arguments.seed)
        if arguments.stage is None
        else deepspeed_job(arguments.stage, arguments.seed)
    )
    # From here on every rank draws its own numbers.
    seed_generators(arguments.seed + 1 + rank)

    seen: dict[str, Any] = {}
    if arguments.load:
        seen = restore(job, arguments.load, arguments.cache_dir)
    else:
        train(job, STEPS_BEFORE)
        save_checkpoint(job, arguments.save, arguments.seed, STEPS_BEFORE)
    seen["losses"] = train(job, STEPS_AFTER)
    seen["draws"] = [random.random(), torch.rand(()).item()]  # noqa: S311 - a comparison, no secret
    (arguments.results / f"rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
