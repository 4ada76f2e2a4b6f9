"""A DeepSpeed training job that saves and resumes, for any launcher.

    torchrun --nproc-per-node 2 train.py --steps 4 --save out
    torchrun --nproc-per-node 2 train.py --steps 2 --load out

`--save` writes a DeepSpeed folder, or to a URI, with `save_checkpoint`; `--load` takes what `load_checkpoint` takes:
that folder, `s3://bucket/run/ep1-rank{rank}.tar`, an http(s) URL ... Rank 0 prints each step's loss.
"""

import argparse
import json
import logging
import os
from pathlib import Path

import deepspeed
import torch
from torch import nn

from rankload import State, load_checkpoint, restore_rng, save_checkpoint

HERE = Path(__file__).resolve().parent
WIDTH = 32


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=str(HERE / "zero1.json"), help="DeepSpeed's configuration")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="a folder, visible to all nodes, or a URI")
    parser.add_argument("--save-at", type=int, help="the step after which to save; the last one by default")
    parser.add_argument("--load", help="a path, template or URL, as load_checkpoint takes it")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    return parser.parse_args()


def make_engine(config, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def train_step(engine):
    batch = torch.randn(4, WIDTH).to(engine.device, next(engine.module.parameters()).dtype)
    loss = (engine(batch).float().squeeze(-1) - batch.float().mean(-1)).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


def main():
    args = arguments()
    logging.basicConfig(format="%(message)s")
    with open(args.config) as file:
        config = json.load(file)
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if on_cpu:
        # On CPU an operator would be compiled for two minutes; gloo does without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if on_cpu else None)
    rank = int(os.environ["RANK"])
    if rank == 0:
        logging.getLogger("rankload").setLevel(logging.INFO)  # the receipt's three lines

    engine = make_engine(config, args.seed)
    torch.manual_seed(args.seed + 1 + rank)
    if args.load:
        rng_states = load_checkpoint(args.load, State(model=engine))
        if rng_states is not None:
            restore_rng(rng_states)
    for _ in range(args.steps):
        loss = train_step(engine)
        if rank == 0:
            print(f"step {engine.global_steps} loss {loss!r}", flush=True)
        if args.save and engine.global_steps == args.save_at:
            save_checkpoint(args.save, State(model=engine))
    if args.save and args.save_at is None:
        save_checkpoint(args.save, State(model=engine))
    # Ranks end together: gloo may abort one whose peer is gone while it takes its connections down.
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
