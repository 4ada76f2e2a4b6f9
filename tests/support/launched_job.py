"""A training job for `rankload run`: it resumes by itself, saves, and fails where it is told to.

    launched_job.py RUN --steps N [--save-every N] [--kill-at STEP] [--raise-at STEP] [--wait-at STEP]

It trains on a batch of 8 numbered samples a step, which the ranks share out, so that its losses are those of any world
size. Rank 0 appends each step's loss to ``RUN.losses``.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from processes import end_together
from torch import nn

from rankload import State, autoresume, restore_rng, save_checkpoint

SAMPLES = 8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", help="the folder for checkpoints")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--kill-at", type=int, help="rank 1 is killed after this step, once")
    parser.add_argument("--raise-at", type=int, help="rank 1 raises ValueError('x') after this step")
    parser.add_argument("--wait-at", type=int, help="after this step a rank waits to be told something")
    parser.add_argument("--cold-size", type=int, help="the world size that a job which starts cold waits for")
    parser.add_argument("--local_rank")
    return parser.parse_args()


def samples(step: int, rank: int, world_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SAMPLES, 16, generator=generator)[rank::world_size]


def disturb(args: argparse.Namespace, step: int, rank: int) -> None:
    """Ends this rank, or has it wait, where that was asked for."""
    killed = Path(f"{args.run}.killed")
    if step == args.kill_at and rank == 1 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if step == args.raise_at and rank == 1:
        raise ValueError("x")
    if step == args.wait_at:
        print(f"rank {rank} waits, pid {os.getpid()}", flush=True)
        time.sleep(300)


def told(number: int, frame: object) -> None:
    print(f"rank {dist.get_rank()} got {signal.Signals(number).name}", flush=True)
    # Beyond the interpreter, whose main thread may wait in a collective.
    os._exit(0)


def main() -> None:
    args = arguments()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    signal.signal(signal.SIGUSR1, told)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(args.dropout), nn.Linear(32, 1))
    # With this option DDP keeps its buckets: a fresh process then sums gradients in the order of one that went on.
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    state = State(model=ddp, optimizers=optimizer)
    torch.manual_seed(100 + rank)
    result = autoresume(None, state, progress_bar=False)
    first = 0
    if result is not None:
        restore_rng(result)
        first = result.extra["step"]
        print(f"rank {rank} of {world_size} resumes after step {first}", flush=True)
    elif args.cold_size not in (None, world_size):
        # Another agent has not come yet; when it does, torchrun restarts these ranks.
        time.sleep(300)
    for step in range(first + 1, args.steps + 1):
        x = samples(step, rank, world_size)
        loss = (ddp(x).squeeze(-1) - x.mean(-1)).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if rank == 0:
            with open(f"{args.run}.losses", "a") as file:
                file.write(f"{step} {total.item() / world_size!r}\n")
        if step % args.save_every == 0:
            save_checkpoint(os.path.join(args.run, f"step{step}.pt"), state, extra={"step": step})
        disturb(args, step, rank)
    print(f"rank {rank} is done", flush=True)
    del ddp, state
    end_together()


if __name__ == "__main__":
    main()
