"""How far private memory (RssAnon) rises while a ZeRO checkpoint is restored at another world size.

    python -m benchmarks.reshard_memory

A model of 38 million parameters is saved by 4 and by 2 ranks and restored by 2 and by 4, at stages 1 and 3. For each
rank: what it holds more at the end than before (the optimizer's state, which is made during the restore), and how much
higher than that it was at the peak, sampled every millisecond. What is promised is at most 128 MiB above.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parent.parent / "tests" / "support"
CASES = ((1, 4, 2, 1), (1, 2, 4, 1), (3, 4, 2, 3), (3, 2, 4, 3), (1, 4, 2, 3), (3, 4, 2, 1))
"""Stage and ranks that saved, ranks and stage that restore."""
ALLOWED = 128 << 20


def main() -> None:
    sys.path.insert(0, str(SUPPORT))
    from processes import run_ranks

    def job(world_size: int, *arguments: object) -> list[dict[str, Any]]:
        finished = run_ranks(
            __file__, world_size, args=arguments, deadline_s=900, env={"DS_ACCELERATOR": "cpu"}, fork=False
        )
        if any(rank.returncode != 0 for rank in finished):
            raise SystemExit(repr(finished))
        return [json.loads(rank.stdout.splitlines()[-1]) for rank in finished]

    worst = 0
    with tempfile.TemporaryDirectory(prefix="rankload-bench-") as root:
        for n in sorted({n for _, n, _, _ in CASES}):
            stages = sorted({stage for stage, size, _, _ in CASES if size == n})
            job(n, "save", root, ",".join(map(str, stages)))
        print("| saved | restored | rank | kept, MiB | above it at the peak, MiB | read, MB | seconds |")
        print("|---|---|---|---|---|---|---|")
        for source, n, m, target in CASES:
            for rank, found in enumerate(job(m, "restore", f"{root}/stage{source}-of-{n}", target)):
                above = found["peak"] - found["after"]
                worst = max(worst, above)
                print(
                    f"| stage {source} of {n} | stage {target} of {m} | {rank} | {found['after'] / 2**20:.0f} | "
                    f"{above / 2**20:.0f} | {found['read'] / 1e6:.0f} | {found['seconds']:.1f} |",
                    flush=True,
                )
    print(f"\nat most {worst / 2**20:.0f} MiB above what is kept; promised: {ALLOWED / 2**20:.0f}")
    sys.exit(worst > ALLOWED)


def make(stage: int, seed: int) -> Any:
    """Every rank: an engine of 36 layers of 1024 x 1024."""
    import deepspeed
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(36)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 100_000,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "sub_group_size": 8_000_000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def save(root: str, stages: str) -> None:
    import torch

    for stage in map(int, stages.split(",")):
        engine = make(stage, seed=0)
        engine.backward(engine(torch.ones(1, 1024, dtype=torch.bfloat16)).float().sum())
        engine.step()
        engine.save_checkpoint(f"{root}/stage{stage}-of-{os.environ['WORLD_SIZE']}")
        del engine
    print("{}")


def restore(path: str, stage: str) -> None:
    from rankload.loader import State, load

    engine = make(int(stage), seed=1)
    before = private_bytes()
    begin = time.perf_counter()
    with watched() as peak:
        result = load(path, State(engine))
    seconds = time.perf_counter() - begin
    rank = int(os.environ["RANK"])
    read = sum(row.bytes for row in result.receipt.stages if row.rank == rank)
    print(
        json.dumps(
            {
                "after": private_bytes() - before,
                "peak": max(peak) - before,
                "seconds": seconds,
                "read": read,
            }
        )
    )


def private_bytes() -> int:
    """This process's private resident memory; pages of files are not counted."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon:"))


@contextmanager
def watched() -> Iterator[list[int]]:
    """The highest `private_bytes` while the block runs, in a list of one."""
    peak, ending = [private_bytes()], threading.Event()

    def watch() -> None:
        while not ending.wait(0.001):
            peak[0] = max(peak[0], private_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ending.set()
        thread.join()


if __name__ == "__main__":
    name, *rest = sys.argv[1:] or ["main"]
    globals()[name](*rest)
