"""Restores what reshard_worker.py saved into modules without DeepSpeed; every rank runs each function.

Each module is held to what DeepSpeed reported when it saved, tensor by tensor, bit for bit: with the saved precision,
to the weights that the engine computed with; with another, to the fp32 masters. Then it trains two steps beside a
plain one that was set from the report by hand, and beside what the engine did that never stopped.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from modules_worker import by_hand, check_against_oracle, plain_job, sharded_job, train, wrapped_job
from rankload.loader import State, load
from reshard_worker import WORLD_SIZE, dtype_of, kind_of, say, slug, wrong_rng

CLIP = 1.0
"""As the engines that saved have it in their configuration."""
KINDS: dict[str, Callable[..., State]] = {"plain": plain_job, "DDP": wrapped_job, "FSDP2": sharded_job}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = tuple(f"{kind} {dtype}" for kind in KINDS for dtype in DTYPES)


def main(*steps: str) -> None:
    """Does ``function argument function argument ...`` in one process group: starting the ranks costs most."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for function, argument in zip(steps[::2], steps[1::2], strict=True):
        globals()[function](argument)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def restore(request: str) -> None:
    """`request`: JSON of ``root`` (a folder), ``oracles`` (a folder) and ``cases``: [source, N, target]."""
    told = json.loads(request)
    for source, saved_world_size, target in told["cases"]:
        name = slug(source, saved_world_size)
        saved = torch.load(Path(told["oracles"], name, "oracle.pt"), weights_only=True)
        oracle, numbers = saved["state"], saved["numbers"]
        if numbers["steps"]:
            (oracle["step"],) = map(torch.tensor, numbers["steps"])
        kind, dtype = target.split()
        state = KINDS[kind](dtype=DTYPES[dtype], kind=kind_of(source))
        inner = State(state.model.module if kind == "DDP" else state.model, state.optimizers)
        own_rate = state.optimizers[0].param_groups[0]["lr"]
        begin = time.perf_counter()
        result = load(f"{told['root']}/{name}", state)
        seconds = time.perf_counter() - begin
        low = dtype == dtype_of(source)
        problems = wrong_rng(result, 3 if source.startswith("3") else 0, saved_world_size)
        groups = state.optimizers[0].param_groups
        if "elastic" in source:
            # Such files hold no hyperparameters: the job's own must have stayed, and the receipt says so.
            if any(group["lr"] != own_rate for group in groups):
                problems.append("hyperparameters that no file holds")
            if not any("no hyperparameters" in note for note in result.receipt.notes):
                problems.append(f"notes: {result.receipt.notes}")
            for group, (rate, decay) in zip(groups, numbers["rates"], strict=True):
                group.update(lr=rate, weight_decay=decay)
        try:
            check_against_oracle(inner, oracle, low=low, weights_only=False)
        except AssertionError as error:
            problems.append(f"not what was saved: {error}")
        rates = [[group["lr"], group["weight_decay"]] for group in groups]
        if rates != numbers["rates"]:
            problems.append(f"rates {rates}, expected {numbers['rates']}")
        reference = train(by_hand(oracle, inner, low=low), clip=CLIP)
        losses = train(state, clip=CLIP)
        aside = difference(losses, reference)
        # Shards and averages over ranks add floats in another order.
        if aside > (0.0 if kind == "plain" else 1e-5 if dtype == "fp32" else 1e-2):
            problems.append(f"losses {losses}, of the one set by hand {reference}")
        # Moments and masters in bf16 round otherwise at every step, and so does a module of another precision.
        apart = difference(losses, saved["losses"])
        if apart > (1e-4 if low and dtype == "fp32" else 2e-2):
            problems.append(f"losses {losses}, expected {saved['losses']}")
        say(
            {
                "source": source,
                "n": saved_world_size,
                "target": target,
                "m": WORLD_SIZE,
                "problems": problems,
                "apart": apart,
                "aside": aside,
                "seconds": seconds,
                "tensors": len(oracle),
            }
        )
        del state, inner, result, groups
        gc.collect()


def difference(losses: list[float], others: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


if __name__ == "__main__":
    from processes import end_together

    main(*sys.argv[1:])
    end_together()
