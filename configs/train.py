"""A DeepSpeed training job that saves and resumes, for any launcher.

    rankload run --nproc-per-node 2 --resume out train.py --until 1000 --save out --save-every 100

Run again, with as many ranks or others, it goes on from the newest checkpoint in `out` that is whole, with the next
samples; the first time it starts cold. `--save` writes a DeepSpeed folder, or to a URI, with `save_checkpoint`.
`--load` takes one checkpoint that it saved, by its path or URI. Rank 0 prints each step's loss and learning rate.
"""

import argparse
import atexit
import json
import logging
import os
import sys
from pathlib import Path

import deepspeed
import torch
from rankload.integrations.data import GlobalSampler
from torch import nn
from torch.utils.data import DataLoader, Dataset

from rankload import State, autoresume, load, restore_rng, save_checkpoint

HERE = Path(__file__).resolve().parent
WIDTH = 32


class Numbers(Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, index):
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=str(HERE / "zero1.json"), help="DeepSpeed's configuration")
    parser.add_argument("--steps", type=int, default=4, help="how many to train")
    parser.add_argument(
        "--until", type=int, help="train until so many steps are done, with those before a restart"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--save", help="a folder, visible to all nodes, or a URI")
    parser.add_argument("--save-at", type=int, help="the step after which to save; the last one by default")
    parser.add_argument("--save-every", type=int, help="save after each so many steps instead")
    parser.add_argument(
        "--load", help="a path, template or URL; by default what `rankload run --resume` names, if anything"
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    return parser.parse_args()


def make_engine(config, seed, dropout):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(dropout), nn.Linear(64, 1))
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def train_step(engine, batch):
    """Trains on this rank's batch, and returns the mean loss of all ranks."""
    batch = batch.to(engine.device, next(engine.module.parameters()).dtype)
    loss = (engine(batch).float().squeeze(-1) - batch.float().mean(-1)).square().mean()
    engine.backward(loss)
    engine.step()
    total = loss.detach().clone()
    deepspeed.comm.all_reduce(total)
    return total.item() / deepspeed.comm.get_world_size()


def end_at_once():
    sys.stdout.flush()
    os._exit(0)


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

    engine = make_engine(config, args.seed, args.dropout)  # with its optimizer and scheduler
    data = Numbers()
    sampler = GlobalSampler(data)
    loader = DataLoader(data, engine.train_micro_batch_size_per_gpu(), sampler=sampler)
    torch.manual_seed(args.seed + 1 + rank)

    state = State(model=engine)
    result = load(args.load, state) if args.load else autoresume(None, state)
    if result is not None:
        sampler.load_state_dict(result.extra["sampler"])
        restore_rng(result)

    last = args.until or engine.global_steps + args.steps
    while engine.global_steps < last:
        for batch in sampler.batches(loader):  # the rest of an epoch
            loss = train_step(engine, batch)
            step = engine.global_steps
            if rank == 0:
                print(f"step {step} loss {loss!r} lr {engine.get_lr()[0]!r}", flush=True)
            now = step % args.save_every == 0 if args.save_every else step == (args.save_at or last)
            if args.save and now:
                save_checkpoint(args.save, state, extra={"sampler": sampler.state_dict()})
            if step == last:
                break
    # Ranks end together, and on CPU at once: DeepSpeed's groups outlive their end, and gloo's threads may abort a rank
    # whose peer is gone, or whose interpreter is taken down under them.
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()
    if on_cpu:
        atexit.register(end_at_once)


if __name__ == "__main__":
    main()
