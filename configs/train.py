"""A DeepSpeed training job that saves and resumes, for any launcher.

    rankload run --nproc-per-node 2 --resume out train.py --until 1000 --save out --save-every 100

Run again, it goes on from the newest checkpoint in `out` that is whole; the first time it starts cold. `--save` writes
a DeepSpeed folder, or to a URI, with `save_checkpoint`. `--load` takes one checkpoint, as `load_checkpoint` takes it:
`s3://bucket/run/ep1-rank{rank}.tar`, an http(s) URL ... Rank 0 prints each step's loss.
"""

import argparse
import json
import logging
import os
from pathlib import Path

import deepspeed
import torch
from torch import nn

from rankload import State, autoresume, load_checkpoint, restore_rng, save_checkpoint

HERE = Path(__file__).resolve().parent
WIDTH = 32


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=str(HERE / "zero1.json"), help="DeepSpeed's configuration")
    parser.add_argument("--steps", type=int, default=4, help="how many to train")
    parser.add_argument(
        "--until", type=int, help="train until so many steps are done, with those before a restart"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="a folder, visible to all nodes, or a URI")
    parser.add_argument("--save-at", type=int, help="the step after which to save; the last one by default")
    parser.add_argument("--save-every", type=int, help="save after each so many steps instead")
    parser.add_argument(
        "--load", help="a path, template or URL; by default what `rankload run --resume` names, if anything"
    )
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
    else:
        result = autoresume(None, State(model=engine))
        rng_states = None if result is None else result.rng_states
    if rng_states is not None:
        restore_rng(rng_states)
    last = args.until or engine.global_steps + args.steps
    while engine.global_steps < last:
        loss = train_step(engine)
        step = engine.global_steps
        if rank == 0:
            print(f"step {step} loss {loss!r}", flush=True)
        now = step % args.save_every == 0 if args.save_every else step == (args.save_at or last)
        if args.save and now:
            save_checkpoint(args.save, State(model=engine))
    # Ranks end together: gloo may abort one whose peer is gone while it takes its connections down.
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
