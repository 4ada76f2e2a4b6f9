"""What the ranks of test_engines.py do: a DeepSpeed engine saves, others restore from a server."""

from __future__ import annotations

import json
import logging
import os
import zlib
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from rankload.loader import State, load

WIDTH = 700


def make(stage: str, seed: int) -> Any:
    """Four odd layers of about half a million parameters, in bf16."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 100_000,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": int(stage)},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def save(folder: str, stage: str) -> None:
    engine = make(stage, 0)
    for _ in range(2):
        engine.backward(engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().sum())
        engine.step()
    engine.save_checkpoint(folder, tag="step-2")


def restore(path: str, stage: str, options: str) -> None:
    """Prints what this rank holds afterwards, and what was fetched."""
    engine = make(stage, 1)
    receipt = load(path, State(engine), options=json.loads(options)).receipt
    outer = engine.optimizer
    flats = [
        flat
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
        for flat in getattr(outer, name, None) or []
    ]
    states = [outer.optimizer.state[flat][key] for flat in flats for key in ("exp_avg", "exp_avg_sq")]
    low = [getattr(p, "ds_tensor", p).detach().view(torch.uint8) for p in engine.module.parameters()]
    found = [zlib.crc32(one.detach().numpy()) for one in (*flats, *states, *low)]
    print(json.dumps({"found": found, "fetched": receipt.fetched_bytes}), flush=True)
