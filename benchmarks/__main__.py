"""Runs the benchmarks and prints their tables.

Every run is a process of its own. Methods take turns within each round (A/B/A/B), ratios are taken within a
round, and what is shown are medians over the rounds. Nothing is asserted about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rankload.launch.children import rank_environment, run_torchrun
from rankload.launch.demo import counts, serving

from . import http_restore, local_restore
from .measure import drop_from_page_cache, make_model

RANKS = 2
DEADLINE_S = 300.0


@dataclass(frozen=True)
class Run:
    """One run of one method."""

    seconds: float
    moved_bytes: int
    extra_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("imports", "local", "http"))
    arguments = parser.parse_args()
    python = platform.python_version()
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {python}, torch {torch.__version__}")

    if arguments.only in (None, "imports"):
        show_imports(arguments.rounds)
    if arguments.only == "imports":
        return
    with tempfile.TemporaryDirectory(prefix="rankload-bench-") as name:
        folder = Path(name)
        served = folder / "served"
        served.mkdir()
        path = served / "weights.pt"
        torch.save(make_model(arguments.megabytes, seed=0).state_dict(), path)
        print(
            f"a state dict of {path.stat().st_size:,} bytes; medians of {arguments.rounds} rounds, in turns"
        )
        if arguments.only != "http":
            for heat in ("warm", "cold"):
                note = (
                    "page cache warm"
                    if heat == "warm"
                    else "pages dropped with posix_fadvise before each run"
                )
                rounds = take_turns(
                    local_restore.METHODS,
                    lambda method, heat=heat: run_local(
                        method, path, arguments.megabytes, cold=heat == "cold"
                    ),
                    arguments.rounds,
                )
                show(f"local restore, one process, {heat} ({note})", rounds, "torch.load", "file bytes")
        if arguments.only != "local":
            rounds = take_turns(
                http_restore.METHODS,
                lambda method: run_http(method, path, arguments.megabytes, folder),
                arguments.rounds,
            )
            title = f"restore over HTTP on loopback, {RANKS} ranks of one node (the server is Python's)"
            show(title, rounds, http_restore.METHODS[0], "served bytes")


def show_imports(rounds: int) -> None:
    """What `from rankload import load` costs beyond torch, from compiled files."""
    command = [sys.executable, "-m", "benchmarks.imports"]
    compiling = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    found = []
    for _ in range(rounds + 1):
        done = subprocess.run(
            command, env=compiling, capture_output=True, text=True, timeout=DEADLINE_S, check=True
        )
        found.append(json.loads(done.stdout))
    # The first one may have compiled them.
    seconds = sorted(one["seconds"] for one in found[1:])
    print(
        f"\nfrom rankload import load, beyond torch: {median(seconds):.3f} s ({seconds[0]:.3f}-{seconds[-1]:.3f}), "
        f"{found[-1]['ours']} modules of its own, {found[-1]['others']} others"
    )


def take_turns(methods: Sequence[str], run: Callable[[str], Run], rounds: int) -> dict[str, list[Run]]:
    """`rounds` runs of each method, one after the other within each round; the first round is thrown away."""
    runs: dict[str, list[Run]] = {method: [] for method in methods}
    for index in range(rounds + 1):
        for method in methods:
            found = run(method)
            if index:
                runs[method].append(found)
    return runs


def run_local(method: str, path: Path, megabytes: int, *, cold: bool) -> Run:
    if cold:
        drop_from_page_cache(str(path))
    command = [sys.executable, "-m", "benchmarks.local_restore", method, str(path), str(megabytes)]
    done = subprocess.run(command, env=rank_environment(), capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode != 0:
        raise SystemExit(f"{method} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Run(found["seconds"], found["bytes"], found["extra_bytes"])


def run_http(method: str, path: Path, megabytes: int, folder: Path) -> Run:
    with serving(path.parent) as (server, port):
        arguments = [method, f"http://127.0.0.1:{port}/{path.name}", str(megabytes), str(folder)]
        run_torchrun(RANKS, "benchmarks.http_restore", arguments, log=folder / "log", deadline_s=DEADLINE_S)
        (served,) = counts(server, path.parent)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    return Run(
        max(rank["seconds"] for rank in ranks), served.sent_bytes, max(rank["extra_bytes"] for rank in ranks)
    )


def show(title: str, runs: dict[str, list[Run]], reference: str, moved: str) -> None:
    print(f"\n{title}")
    print(
        f"  {'method':<26}{moved:>14}{'seconds':>10}{'GB/s':>7}{'x time of ' + reference:>32}{'peak RSS':>12}"
    )
    for method, found in runs.items():
        ratios = [run.seconds / other.seconds for run, other in zip(found, runs[reference], strict=True)]
        seconds = median(run.seconds for run in found)
        size = median(run.moved_bytes for run in found)
        extra = median(run.extra_bytes for run in found) / 1e6
        spread = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        figures = f"{size:>14,.0f}{seconds:>10.3f}{size / seconds / 1e9:>7.2f}"
        print(f"  {method:<26}{figures}{spread:>32}{extra:>+9.0f} MB")


if __name__ == "__main__":
    main()
