"""One rank's planning where a checkpoint has thousands of files: seconds and memory, in a process of its own.

    python -m benchmarks.many_files --write docs/benchmarks.md

Folders of ZeRO stage 3 and of DCP as 4,096 ranks save them, of a thousand parameters with AdamW, are written with tiny
shards; their files of a kind are one file under many names. What is measured is what one rank of a job does before it
reads tensors: the checkpoint is found, the indexes that the rank needs are read, the copies of its restore are planned,
and the ranges that they read are worked out. The rank stands alone: what ranks of a load tell each other is left out.
No speed is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rankload.launch.children import rank_environment
from rankload.loader.alone import open_alone
from rankload.loader.planning.jobs import Job, TargetName
from rankload.loader.planning.restores import restore_of
from rankload.loader.saved.copies import reads_of
from rankload.loader.saved.tensor import SavedTensor

from .measure import measured
from .tables import publish, table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "support")]

DEADLINE_S = 900.0
HEADER = (
    "checkpoint", "one rank of", "files fetched or opened", "copies planned", "seconds of CPU", "seconds",
    "memory, MB",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    what: str
    target: TargetName
    shape: tuple[int, ...]
    """Of each parameter."""
    write: Callable[[Path], Path]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_files", description=__doc__)
    parser.add_argument("--files", type=int, default=4096)
    parser.add_argument("--parameters", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, nargs="*", default=[64], help="of each tensor in DCP")
    parser.add_argument("--write", metavar="PAGE", help="replaces the page's table of them")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="rankload-bench-") as root:
        for number, case in enumerate(cases(arguments.files, arguments.parameters, arguments.chunks)):
            folder = case.write(Path(root) / str(number))
            for world_size in (arguments.files, 8):
                rows.append(row(case, folder, world_size, arguments))
                print(rows[-1], flush=True)
    machine = f"{os.cpu_count()} CPUs, Python {platform.python_version()}"
    text = f"{machine}; medians of {arguments.rounds} rounds.\n\n{table(HEADER, rows)}"
    print(text)
    if arguments.write:
        publish(arguments.write, "bench-files", text)


def cases(files: int, parameters: int, chunks: list[int]) -> list[Case]:
    from many_files import write_dcp, write_zero  # imports torch, which a planning rank need not

    def dcp(each: int) -> Case:
        rows = max(1, files // each)  # so that each of as many ranks has one
        return Case(
            f"DCP, {each} chunks of each tensor",
            "fsdp2",
            (each * rows, 2),
            lambda folder: write_dcp(folder, files=files, parameters=parameters, shards=each, rows=rows),
        )

    zero = Case(
        "ZeRO stage 3",
        "stage3",
        (files,),
        lambda folder: write_zero(folder, ranks=files, parameters=parameters),
    )
    return [zero, *map(dcp, chunks)]


def row(case: Case, folder: Path, world_size: int, arguments: argparse.Namespace) -> tuple[str, ...]:
    command = [sys.executable, "-m", "benchmarks.many_files", "--one"]
    command += [str(folder), case.target, str(world_size), str(arguments.parameters), json.dumps(case.shape)]
    runs = []
    for _ in range(arguments.rounds):
        done = subprocess.run(
            command, env=rank_environment(), capture_output=True, text=True, timeout=DEADLINE_S
        )
        if done.returncode != 0:
            raise SystemExit(f"planning {case.what} failed:\n{done.stderr}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return (
        f"{case.what}, {len(os.listdir(folder)):,} files",
        f"{world_size:,}",
        f"{runs[0]['files']:,}",
        f"{runs[0]['copies']:,}",
        f"{median(run['cpu'] for run in runs):.2f}",
        f"{median(run['seconds'] for run in runs):.2f}",
        f"{median(run['extra_bytes'] for run in runs) / 1e6:,.0f}",
    )


def one(folder: str, target: TargetName, world_size: str, parameters: str, shape: str) -> None:
    """One rank's planning, in this process; prints what it took as JSON."""
    dtype = "bfloat16" if target == "stage3" else "float32"
    tensor = SavedTensor(dtype, tuple(json.loads(shape)), ())
    names = [f"layers.{number}.weight" for number in range(int(parameters))]
    job = Job(
        target, int(world_size), dict.fromkeys(names, tensor), frozenset(names), (tuple(names),), {}, ()
    )
    rank = int(world_size) // 2
    cpu = time.process_time()
    with measured() as result, open_alone(folder, job.demand(rank)) as opened:
        restore = restore_of(job, rank, opened.saved)
        reads = reads_of(restore.copies)
        files = len(opened.files.fetched)
    if not reads:
        raise SystemExit("nothing was planned")
    print(
        json.dumps(
            {
                "cpu": time.process_time() - cpu,
                "seconds": result.seconds,
                "extra_bytes": result.extra_bytes,
                "files": files,
                "copies": len(restore.copies),
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])  # type: ignore[arg-type]
    else:
        main()
