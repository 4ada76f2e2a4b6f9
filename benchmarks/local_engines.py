"""One rank of a job that restores a DeepSpeed engine by its own ``load_checkpoint`` and by rankload in turns.

    torchrun --nproc-per-node 2 -m benchmarks.local_engines FOLDER STAGE ROUNDS KIND

``large`` is an engine of 100 million parameters, ``many`` one of 100,000 small tensors. Each restore goes into an
engine that was just made, from files in the page cache; the first round is thrown away. What an engine holds afterwards
is compared with what the engine that saved held. Rank 0 writes seconds (the slowest rank's) as JSON.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn

from .measure import Measured, measured

OURS, THEIRS = "rankload", "load_checkpoint"
WIDTH, LAYERS = 2048, 24
ELEMENTS, TENSORS = 16, 100_000


class Many(nn.Module):
    """100,000 parameters of 16 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.empty(ELEMENTS)) for _ in range(TENSORS))


def make_engine(stage: int, kind: str, value: float) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model: nn.Module = Many()
    if kind == "large":
        made = [nn.utils.skip_init(nn.Linear, WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
        model = nn.Sequential(*made)
    with torch.no_grad():
        for at, parameter in enumerate(model.parameters()):
            parameter.fill_((value + at % 7) / WIDTH)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 100_000,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train(engine: Any, kind: str) -> None:
    if kind == "large":
        loss = engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().sum()
    else:
        loss = torch.cat(list(engine.module.all)).float().square().sum()
    engine.backward(loss)
    engine.step()


def held(engine: Any) -> Iterator[torch.Tensor]:
    """This rank's masters and moments, and the weights that it computes with."""
    zero = engine.optimizer
    masters = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
    yield from masters
    for group in zero.optimizer.param_groups:
        for parameter in group["params"]:
            state = zero.optimizer.state[parameter]
            yield state["exp_avg"]
            yield state["exp_avg_sq"]
    for parameter in engine.module.parameters():
        yield getattr(parameter, "ds_tensor", parameter)


def sum_of(engine: Any) -> int:
    value = 0
    for tensor in held(engine):
        flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy()
        value = zlib.crc32(flat, value)
    return value


def restore(way: str, engine: Any, folder: str) -> None:
    if way == OURS:
        from rankload.loader import State, load

        load(folder, State(engine), progress_bar=False)
    else:
        engine.load_checkpoint(folder)


def main(folder: str, stage: str, rounds: str, kind: str, out: str) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    engine = make_engine(int(stage), kind, 0.5)
    train(engine, kind)
    engine.save_checkpoint(folder)
    expected = sum_of(engine)
    del engine
    found: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    for at in range(int(rounds) + 1):
        for way, runs in found.items():
            gc.collect()
            engine = make_engine(int(stage), kind, 0.0)
            torch.distributed.barrier()
            with measured() as result:
                restore(way, engine, folder)
                torch.distributed.barrier()
            if sum_of(engine) != expected:
                raise SystemExit(f"{way} did not restore what was saved")
            if at:
                runs.append(slowest(result))
            del engine
    if torch.distributed.get_rank() == 0:
        nbytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        Path(out).write_text(json.dumps({"runs": found, "bytes": nbytes}))


def slowest(result: Measured) -> dict[str, float]:
    """The seconds of the slowest rank, and the memory of the one that took most."""
    both = torch.tensor([result.seconds, float(result.extra_bytes)], dtype=torch.float64)
    torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
    return {"seconds": float(both[0]), "extra_bytes": float(both[1])}


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(*sys.argv[1:])
