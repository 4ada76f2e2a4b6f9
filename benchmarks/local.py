"""Restores from local files: rankload beside what a job does without it, and beside plain reads of the same bytes.

    python -m benchmarks.local --write docs/benchmarks.md

- engines (`local_engines`): DeepSpeed engines of 100 million parameters, and one of many small tensors, restored by
  rankload and by ``engine.load_checkpoint``; the fixed cost of a load of one layer; and a module that 1 to 8 ranks
  restore whole, by rankload and each for itself.
- one file: a module restored in one process by several ways, from the page cache, and from the disk where the file's
  pages can be dropped, which is looked at. Plain reads fill memory of the file's size that was touched before.

The ways take turns within each round; ratios are taken within a round, and medians shown. Every restore of one file
runs in a process of its own, a fork of one that has imported all libraries and used each once. There the way first
restores a file of 10 MB, not timed: a fork copies the pages that it writes. No speed is asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import json
import logging
import mmap
import os
import platform
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rankload.launch.children import run_torchrun
from rankload.loader import State, load
from torch import nn

from .gauge import io_bytes
from .local_engines import OURS, TENSORS, WHOLE_MB, Runs
from .measure import drop_from_page_cache, make_model, measured, zero
from .tables import publish, table

DEADLINE_S = 400.0
READ, DIRECT, DIRECT_4 = (
    "plain read, one thread",
    "plain read, `O_DIRECT`, one thread",
    "plain read, `O_DIRECT`, 4 threads",
)
PLAIN = (READ, DIRECT, DIRECT_4)
"""Ways that restore nothing: they fill memory of the file's size."""
OFF = "**rankload**, `verify=off`"
CHUNK_BYTES = 8 << 20
SMALL_MB = 10
COLUMNS = ("seconds", "CPU s", "peak memory above, MB")
Restore = Callable[[Any], object]
"""Restores into a module; what is `PLAIN`, into memory."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.local", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1_000, help="the size of the one file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("engines", "file", "fixed", "ranks"))
    parser.add_argument("--write", metavar="PAGE", help="replaces the page's tables of them")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    parts: dict[str, Callable[[Path], str]] = {
        "engines": lambda folder: engines(folder, arguments.rounds),
        "file": lambda folder: one_file(folder, arguments.megabytes, arguments.rounds),
        "fixed": fixed_cost,
        "ranks": lambda folder: growth_with_ranks(folder, arguments.rounds),
    }
    for name, part in parts.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="rankload-bench-") as folder:
                text = f"{machine()}.\n\n{part(Path(folder))}"
            print(text, flush=True)
            if arguments.write:
                publish(arguments.write, f"bench-local-{name}", text)


def machine() -> str:
    load_before = os.getloadavg()[0]
    return (
        f"{len(os.sched_getaffinity(0))} CPUs, {platform.system()} {platform.release()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}; {load_before:.1f} processes were running before"
    )


def engines(folder: Path, rounds: int) -> str:
    rows = []
    for what, stage, ranks, kind in (
        ("100 M parameters, stage 1", 1, 2, "large"),
        ("100 M parameters, stage 1", 1, 4, "large"),
        ("100 M parameters, stage 3", 3, 2, "large"),
        ("100 M parameters, stage 3", 3, 4, "large"),
        (f"{TENSORS:,} small tensors, stage 1", 1, 1, "many"),
    ):
        found = of_ranks(folder, stage, ranks, kind, rounds=rounds)
        rows += [
            (what, str(ranks), f"{found['bytes'] / 1e6:,.0f}", *row)
            for row in rows_of(found["runs"], against=OURS)
        ]
    header = ("engine", "ranks", "files, MB", "way", *COLUMNS, "x time of rankload")
    text = f"bf16 with AdamW, page cache warm, medians of {rounds} rounds; of the rank that took most."
    return f"{text}\n\n{table(header, rows)}"


def fixed_cost(folder: Path) -> str:
    rows = []
    for ranks in (1, 2, 4, 8):
        (runs,) = of_ranks(folder, 0, ranks, "fixed", rounds=15)["runs"].values()
        rows.append((str(ranks), *columns(runs)[:2]))
    return f"A load of one layer, medians of 15, after a first one.\n\n{table(('ranks', 'seconds', 'CPU s'), rows)}"


def growth_with_ranks(folder: Path, rounds: int) -> str:
    rows = []
    for ranks in (1, 2, 4, 8):
        runs = of_ranks(folder, 0, ranks, "whole", rounds=rounds)["runs"]
        rows += [(str(ranks), *row) for row in rows_of(runs, against=OURS)]
    text = (
        f"A module of {WHOLE_MB} MB of float32 that every rank restores whole from one file, page cache warm; "
        f"medians of {rounds} rounds; of the rank that took most."
    )
    return f"{text}\n\n{table(('ranks', 'way', *COLUMNS, 'x time of rankload'), rows)}"


def of_ranks(folder: Path, stage: int, ranks: int, kind: str, *, rounds: int) -> dict[str, Any]:
    out = folder / "out.json"
    with tempfile.TemporaryDirectory(dir=folder) as saved:
        arguments = [saved, str(stage), str(rounds), kind, str(out)]
        run_torchrun(ranks, "benchmarks.local_engines", arguments, log=folder / "log", deadline_s=DEADLINE_S)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def rows_of(runs: Runs, *, against: str) -> list[tuple[str, ...]]:
    """A row for each way: its medians, and those of its time by that of `against` in the same round."""
    rows = []
    for way, own in runs.items():
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(own, runs[against], strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append((way, *columns(own), "1" if way == against else spread))
    return rows


def columns(runs: Sequence[Mapping[str, float]]) -> tuple[str, str, str]:
    middle = {key: median(one[key] for one in runs) for key in ("seconds", "cpu", "extra_bytes")}
    return f"{middle['seconds']:.3f}", f"{middle['cpu']:.3f}", f"{middle['extra_bytes'] / 1e6:,.0f}"


def one_file(folder: Path, megabytes: int, rounds: int) -> str:
    ways, files = ways_of(folder, megabytes)
    small = folder / "small"
    small.mkdir()
    first = {way: run for way, run in ways_of(small, SMALL_MB)[0].items() if way not in PLAIN}
    for restore in first.values():
        restore(make_model(SMALL_MB, seed=1))  # so that what is imported late is imported in all forks
    expected = make_model(megabytes, seed=0)
    size = (folder / "weights.pt").stat().st_size
    warm = take_turns(
        {way: run for way, run in ways.items() if way not in (DIRECT, DIRECT_4)}, first, expected, rounds
    )
    header = ("way", *COLUMNS, "GB/s", "x time of rankload")
    text = (
        f"One process, a module of {size / 1e6:,.0f} MB of float32; medians of {rounds} rounds.\n\n"
        f"**Page cache warm**\n\n{table(header, with_rate(rows_of(warm, against=OURS), size))}\n\n**Cold**"
    )
    drop(files)
    share = max(map(cached_share, files))
    if share > 0.01:
        return f"{text}\n\nNot measured: {share:.0%} of a file's pages stay in memory when they are dropped."
    cold = take_turns(ways, first, expected, rounds, before=lambda: drop(files))
    return (
        f"{text}, no page of the files in memory before each run\n\n"
        f"{table(header, with_rate(rows_of(cold, against=OURS), size))}"
    )


def with_rate(rows: Sequence[tuple[str, ...]], size: int) -> list[tuple[str, ...]]:
    return [(*row[:-1], f"{size / float(row[1]) / 1e9:.2f}", row[-1]) for row in rows]


def take_turns(
    ways: Mapping[str, Restore],
    first: Mapping[str, Restore],
    expected: nn.Module,
    rounds: int,
    before: Callable[[], object] = lambda: None,
) -> Runs:
    runs: Runs = {way: [] for way in ways}
    turns = list(ways.items())
    for at in range(rounds + 1):
        # Another way begins each round: a disk gives more after a pause, or after a slow one.
        turns.append(turns.pop(0))
        for way, restore in turns:
            before()
            found = forked(lambda restore=restore, way=way: measure(way, restore, first.get(way), expected))
            if at:
                runs[way].append(found)
    return runs


def measure(way: str, restore: Restore, first: Restore | None, expected: nn.Module) -> dict[str, float]:
    if first is not None:
        first(make_model(SMALL_MB, seed=1))
    model = blank(expected)
    into: Any = model
    if way in PLAIN:
        into = touched(sum(value.nbytes for value in model.state_dict().values()) + (16 << 20))
    began, io = time.process_time(), io_bytes()
    with measured() as result:
        restore(into)
    cpu = time.process_time() - began
    if way not in PLAIN:
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            if not torch.equal(one, other):
                raise SystemExit(f"{way} did not restore what was saved")
    read = io_bytes()["read_bytes"] - io["read_bytes"]
    return {"seconds": result.seconds, "cpu": cpu, "extra_bytes": result.extra_bytes, "read_bytes": read}


def forked(run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `run` returns in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, json.dumps(run()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("a restore failed")
    found: dict[str, float] = json.loads(text)
    return found


def ways_of(folder: Path, megabytes: int) -> tuple[dict[str, Restore], list[Path]]:
    """The ways to restore what is saved in `folder` here, and the files that they read."""
    saved = make_model(megabytes, seed=0).state_dict()
    path, other, many = folder / "weights.pt", folder / "weights.safetensors", folder / "dcp"
    torch.save(saved, path)
    dcp.save(saved, checkpoint_id=many, no_dist=True)

    def by_dcp(model: nn.Module) -> None:
        state = model.state_dict()
        dcp.load(state, checkpoint_id=many, no_dist=True)
        model.load_state_dict(state)

    ways: dict[str, Restore] = {
        OURS: lambda model: ours(path, model, "during"),
        OFF: lambda model: ours(path, model, "off"),
        READ: lambda memory: read(path, memory, 1),
        DIRECT: lambda memory: read(path, memory, 1, os.O_DIRECT),
        DIRECT_4: lambda memory: read(path, memory, 4, os.O_DIRECT),
        "`torch.load`, `load_state_dict`": lambda model: model.load_state_dict(
            torch.load(path, weights_only=True)
        ),
        "`torch.load(mmap=True)`, `load_state_dict`": lambda model: model.load_state_dict(
            torch.load(path, mmap=True, weights_only=True)
        ),
        "`dcp.load`": by_dcp,
    }
    with contextlib.suppress(ImportError):
        from safetensors.torch import load_file, save_file

        save_file(saved, other)
        ways["safetensors `load_file`, `load_state_dict`"] = lambda model: model.load_state_dict(
            load_file(other)
        )
        with contextlib.suppress(ImportError):
            from runai_model_streamer import SafetensorsStreamer

            def streamed(model: nn.Module) -> None:
                held = model.state_dict()
                with SafetensorsStreamer() as streamer, torch.no_grad():
                    streamer.stream_file(str(other))
                    for name, tensor in streamer.get_tensors():
                        held[name].copy_(tensor)

            ways["runai-model-streamer, copied"] = streamed
    return ways, [one for one in folder.rglob("*") if one.is_file() and one.stat().st_size > 1 << 20]


def blank(like: nn.Module) -> nn.Module:
    """A module of the same shapes, all zero, whose memory was touched."""
    made = copy.deepcopy(like)
    zero(made)
    return made


def ours(path: Path, model: nn.Module, verify: str) -> None:
    load(str(path), State(model), load_weights_only=True, progress_bar=False, options={"verify": verify})


def touched(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes)
    for start in range(0, nbytes, mmap.PAGESIZE):
        memory[start] = 1
    return memory


def read(path: Path, memory: mmap.mmap, n_threads: int, flags: int = 0) -> None:
    """Reads the file into `memory`, by `n_threads`. Direct reads begin and end at pages."""
    size, view = path.stat().st_size, memoryview(memory)
    file = os.open(path, os.O_RDONLY | flags)
    starts = iter(range(0, size, CHUNK_BYTES))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            stop = min(start + CHUNK_BYTES, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
            os.preadv(file, [view[start:stop]], start)

    threads = [threading.Thread(target=work) for _ in range(n_threads - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    os.close(file)


def drop(files: Sequence[Path]) -> None:
    for path in files:
        drop_from_page_cache(str(path))


def cached_share(path: Path) -> float:
    """How much of the file's pages is in memory."""
    size = path.stat().st_size
    n_pages = -(-size // mmap.PAGESIZE)
    present = (ctypes.c_ubyte * n_pages)()
    library = ctypes.CDLL(None, use_errno=True)
    library.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    # Private, so that its address can be had; nothing is written to it.
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as seen,
    ):
        held = ctypes.c_char.from_buffer(seen)
        failed = library.mincore(ctypes.addressof(held), size, ctypes.addressof(present))
        del held
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(one & 1 for one in present) / n_pages


if __name__ == "__main__":
    main()
