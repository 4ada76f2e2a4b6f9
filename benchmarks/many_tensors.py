"""Files of many small tensors restored: rankload beside ``torch.load`` and ``load_state_dict``.

    python -m benchmarks.many_tensors --write docs/benchmarks.md

A module of parameters of 1,024 elements each with AdamW, whose state has three tensors for each; and a module alone,
of parameters of 16 elements. Each restore is a process of its own, by either way in turns, from a file in the page
cache. The clock runs from before the file is opened until module and optimizer hold what it has; both ways' results
are compared with what was saved. Medians are shown, also of the ratios within each round. No speed is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rankload.launch.children import rank_environment
from rankload.loader import State, load_checkpoint
from torch import nn

from .measure import measured
from .tables import publish, table

OURS, THEIRS = "**rankload**", "`torch.load`, `load_state_dict`"
DEADLINE_S = 900.0
HEADER = ("tensors in the file", "way", "seconds", "us a tensor", "x time of rankload", "peak memory, MB")


class Many(nn.Module):
    """`count` parameters of `elements` each."""

    def __init__(self, count: int, elements: int, seed: int) -> None:
        super().__init__()
        values = torch.rand(count, elements, generator=torch.Generator().manual_seed(seed))
        self.all = nn.ParameterList(nn.Parameter(row.clone()) for row in values)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_tensors", description=__doc__)
    parser.add_argument("--adam", type=int, nargs="*", default=[1_000, 8_000, 25_000], help="parameters")
    parser.add_argument("--alone", type=int, nargs="*", default=[10, 1_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", metavar="PAGE", help="replaces the page's table of them")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="rankload-bench-") as folder:
        for kind, counts, elements in (("adam", arguments.adam, 1024), ("alone", arguments.alone, 16)):
            for count in counts:
                path = str(Path(folder) / "many.pt")
                run("save", kind, count, elements, path)
                rows += rows_of(kind, count, elements, path, arguments.rounds)
                print("\n".join(map(str, rows[-2:])), flush=True)
    machine = f"{os.cpu_count()} CPUs, Python {platform.python_version()}, torch {torch.__version__}"
    text = f"{machine}; medians of {arguments.rounds} rounds.\n\n{table(HEADER, rows)}"
    print(text)
    if arguments.write:
        publish(arguments.write, "bench-tensors", text)


def rows_of(kind: str, count: int, elements: int, path: str, rounds: int) -> list[tuple[str, ...]]:
    found: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    for _ in range(rounds):
        for way, runs in found.items():
            runs.append(run(way, kind, count, elements, path))
    tensors = 4 * count if kind == "adam" else count
    what = f"{tensors:,} of {elements:,} elements" if kind == "alone" else f"{tensors:,}, with AdamW"
    ratios = [
        their["seconds"] / our["seconds"] for their, our in zip(found[THEIRS], found[OURS], strict=True)
    ]
    return [
        (
            what,
            way,
            f"{(seconds := median(one['seconds'] for one in runs)):.3f}",
            f"{seconds / tensors * 1e6:,.0f}",
            "1" if way == OURS else f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{median(one['extra_bytes'] for one in runs) / 1e6:,.0f}",
        )
        for way, runs in found.items()
    ]


def run(way: str, kind: str, count: int, elements: int, path: str) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.many_tensors",
        "--one",
        way,
        kind,
        str(count),
        str(elements),
        path,
    ]
    done = subprocess.run(command, env=rank_environment(), capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode != 0:
        raise SystemExit(f"{way} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(way: str, kind: str, count: str, elements: str, path: str) -> None:
    """One restore, or the save before them, in this process; prints what it took as JSON."""
    torch.set_num_threads(1)
    saved = Many(int(count), int(elements), seed=0)
    trained = trained_adam(saved) if kind == "adam" else None
    if way == "save":
        state: dict[str, Any] = {"model": saved.state_dict()}
        if trained is not None:
            state["optimizers"] = {"AdamW": trained.state_dict()}
        torch.save({"state": state}, path)
        print(json.dumps({}))
        return
    model = Many(int(count), int(elements), seed=1)
    optimizer = torch.optim.AdamW(model.parameters()) if kind == "adam" else None
    restore: Callable[[str, nn.Module, Any], None] = ours if way == OURS else theirs
    with measured() as result:
        restore(path, model, optimizer)
    same = all(map(torch.equal, model.parameters(), saved.parameters()))
    if trained is not None and optimizer is not None:
        left, right = trained.state_dict()["state"], optimizer.state_dict()["state"]
        same = same and all(torch.equal(left[n][key], right[n][key]) for n in left for key in left[n])
    if not same:
        raise SystemExit(f"{way} did not restore what was saved")
    print(json.dumps(asdict(result)))


def ours(path: str, model: nn.Module, optimizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_checkpoint(path, State(model, optimizer) if optimizer is not None else State(model))


def theirs(path: str, model: nn.Module, optimizer: Any) -> None:
    state = torch.load(path, weights_only=True)["state"]
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizers"]["AdamW"])


def trained_adam(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    return optimizer


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
    else:
        main()
