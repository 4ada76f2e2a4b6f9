"""One rank of a job that restores a DeepSpeed engine by its own ``load_checkpoint`` and by rankload in turns.

    torchrun --nproc-per-node 2 -m benchmarks.local_engines FOLDER STAGE ROUNDS KIND OUT

``large`` is an engine of 100 million parameters, ``many`` one of many small tensors. ``fixed`` is a module of one
layer, and ``whole`` one of 400 MB that every rank restores whole; neither is an engine. The files are in the page
cache. Before each restore the engine is as a new one: its optimizer has no state, its masters are zero. The first round
is thrown away, and what an engine holds afterwards is compared with what the engine that saved held. Plain reads of a
large engine's files are the least that a restore costs: each rank reads the bytes that it keeps into memory, a third of
its optimizer's file into memory that was there before. Rank 0 writes the slowest rank's seconds, processor time and
memory as JSON.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from rankload.loader import State, load
from torch import nn

from .measure import make_model, measured, zero

OURS, THEIRS, PLAIN = "**rankload**", "`engine.load_checkpoint`", "plain reads, nothing restored"
BY_TORCH = "each rank by `torch.load(mmap=True)`, `load_state_dict`"
_CHUNK_BYTES = 1 << 20
WHOLE_MB = 400
WIDTH, LAYERS = 2048, 24
ELEMENTS, TENSORS = 16, 20_000
Runs = dict[str, list[dict[str, float]]]
"""By way: seconds, processor time and memory of each restore."""


class Many(nn.Module):
    """Many parameters of 16 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.empty(ELEMENTS)) for _ in range(TENSORS))


def make_engine(stage: int, kind: str) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model: nn.Module = Many()
    if kind == "large":
        made = [nn.utils.skip_init(nn.Linear, WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
        model = nn.Sequential(*made)
    with torch.no_grad():
        for at, parameter in enumerate(model.parameters()):
            parameter.fill_((1 + at % 7) / WIDTH)
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


def masters(engine: Any) -> list[torch.Tensor]:
    zero = engine.optimizer
    found = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
    return list(found)


def held(engine: Any) -> Iterator[torch.Tensor]:
    """This rank's masters and moments, and the weights that it computes with."""
    yield from masters(engine)
    state = engine.optimizer.optimizer.state
    for group in engine.optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            yield state[parameter]["exp_avg"]
            yield state[parameter]["exp_avg_sq"]
    for parameter in engine.module.parameters():
        yield getattr(parameter, "ds_tensor", parameter)


def forget(engine: Any) -> None:
    """Makes the engine one that was just made, but for its weights, which are zero."""
    engine.optimizer.optimizer.state.clear()
    with torch.no_grad():
        for master in masters(engine):
            master.zero_()
        for parameter in engine.module.parameters():
            getattr(parameter, "ds_tensor", parameter).zero_()
    gc.collect()


def sum_of(engine: Any) -> int:
    return sum_of_all(held(engine))


def sum_of_all(tensors: Iterable[torch.Tensor]) -> int:
    value = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy()
        value = zlib.crc32(flat, value)
    return value


def restore(way: str, engine: Any, folder: str, kept: bytearray) -> None:
    if way == OURS:
        load(folder, State(engine), progress_bar=False)
    elif way == THEIRS:
        engine.load_checkpoint(folder)
    else:
        read(folder, kept)


def read(folder: str, kept: bytearray) -> None:
    """Reads what this rank restores: its optimizer's file, of which a third are masters, and the module's weights."""
    tag = Path(folder, Path(folder, "latest").read_text())
    (own,) = tag.glob(f"*zero_pp_rank_{torch.distributed.get_rank()}_mp_rank_00_optim_states.pt")
    nbytes = own.stat().st_size
    moments = torch.empty(nbytes - nbytes // 3, dtype=torch.uint8).numpy()
    fill(own, memoryview(kept)[: nbytes // 3], memoryview(moments))
    module = tag / "mp_rank_00_model_states.pt"
    if module.exists():
        fill(module, memoryview(kept)[: module.stat().st_size])


def fill(path: Path, *memories: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        for memory in memories:
            for at in range(0, len(memory), _CHUNK_BYTES):
                file.readinto(memory[at : at + _CHUNK_BYTES])


def in_turns(folder: str, stage: int, rounds: int, kind: str) -> Runs:
    engine = make_engine(stage, kind)
    train(engine, kind)
    engine.save_checkpoint(folder)
    expected = sum_of(engine)
    found: Runs = {OURS: [], THEIRS: []}
    kept = bytearray()
    if kind == "large":
        found[PLAIN] = []
        kept = bytearray(
            b"x" * max(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        )

    def check(way: str) -> None:
        if way != PLAIN and sum_of(engine) != expected:
            raise SystemExit(f"{way} did not restore what was saved")

    take_turns(found, rounds, lambda: forget(engine), lambda way: restore(way, engine, folder, kept), check)
    return found


def take_turns(
    found: Runs,
    rounds: int,
    forget: Callable[[], object],
    restore: Callable[[str], object],
    check: Callable[[str], object],
) -> None:
    """Adds to each way's runs: all ranks forget, restore by that way at the same time, and check what they have. The
    first round is not counted."""
    for at in range(rounds + 1):
        for way, runs in found.items():
            forget()
            torch.distributed.barrier()
            began = time.process_time()
            with measured() as result:
                restore(way)
                cpu = time.process_time() - began
                torch.distributed.barrier()
            check(way)
            one = slowest(result.seconds, cpu, float(result.extra_bytes))
            if at:
                runs.append(one)


def fixed(folder: str, rounds: int) -> Runs:
    """Loads of one layer: what a load costs whatever its size."""
    torch.distributed.init_process_group("gloo")
    model = nn.Linear(8, 8)
    path = Path(folder, "one.pt")
    if torch.distributed.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state": {"model": model.state_dict()}}, path)
    runs = []
    for _ in range(rounds + 1):
        torch.distributed.barrier()
        began = time.process_time()
        with measured() as result:
            load(str(path), State(model), progress_bar=False)
            cpu = time.process_time() - began
        runs.append(slowest(result.seconds, cpu, float(result.extra_bytes)))
    return {OURS: runs[1:]}


def whole(folder: str, rounds: int) -> Runs:
    """Loads of a module by all ranks, from one file."""
    torch.distributed.init_process_group("gloo")
    model = make_model(WHOLE_MB, seed=0)
    path = Path(folder, "whole.pt")
    if torch.distributed.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state": {"model": model.state_dict()}}, path)
    expected = sum_of_all(model.parameters())
    found: Runs = {OURS: [], BY_TORCH: []}

    def restore_whole(way: str) -> None:
        if way == OURS:
            load(str(path), State(model), progress_bar=False)
        else:
            saved = torch.load(path, mmap=True, weights_only=True)
            model.load_state_dict(saved["state"]["model"])

    def check(way: str) -> None:
        if sum_of_all(model.parameters()) != expected:
            raise SystemExit(f"{way} did not restore what was saved")

    take_turns(found, rounds, lambda: zero(model), restore_whole, check)
    return found


def main(folder: str, stage: str, rounds: str, kind: str, out: str) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if kind in ("fixed", "whole"):
        found = {"fixed": fixed, "whole": whole}[kind](folder, int(rounds))
    else:
        found = in_turns(folder, int(stage), int(rounds), kind)
    if torch.distributed.get_rank() == 0:
        nbytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        Path(out).write_text(json.dumps({"runs": found, "bytes": nbytes}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def slowest(seconds: float, cpu: float, extra: float) -> dict[str, float]:
    """Each as the rank has it that has most."""
    most = torch.tensor([seconds, cpu, extra], dtype=torch.float64)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(("seconds", "cpu", "extra_bytes"), most.tolist(), strict=True))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(*sys.argv[1:])
