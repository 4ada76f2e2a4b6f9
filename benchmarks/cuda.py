"""Restores into the memory of a CUDA device, beside plain copies of page-locked memory and ``torch.load``.

    python -m benchmarks.cuda --write docs/benchmarks.md

One rank, a module of float32 parameters on the device, its file in memory (`--folder`, /dev/shm). The ways take turns
in one process, whose first round is thrown away; what each restored is compared with what was saved. The pinned copy is
the limit: the file's bytes from page-locked memory, which is there already, into the parameters, and nothing else. The
plain read fills page-locked memory from the file, by as many threads as the restore has, and copies nothing. Medians
are shown, also of the ratios within each round. No speed is asserted.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rankload.loader import State, load_checkpoint
from rankload.loader.materialize.slices import reading_threads
from rankload.loader.materialize.staging import STAGING_BYTES
from torch import nn

from .measure import zero
from .tables import publish, table

PINNED, READ = "pinned copy, no file", "plain read into pinned memory, no copy"
DURING, OFF = "**rankload**", "**rankload**, `verify=off`"
MMAP, DIRECT = (
    "`torch.load(mmap=True)`, `load_state_dict`",
    "safetensors `load_file` on the device, `load_state_dict`",
)
HEADER = ("way", "seconds", "GB/s", "x rate of the pinned copy", "peak device memory above, MB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", default="/dev/shm", help="where the file is made; its pages should stay in memory"
    )
    parser.add_argument("--write", metavar="PAGE", help="replaces the page's table of them")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: nothing was measured")
    with tempfile.TemporaryDirectory(prefix="rankload-bench-", dir=arguments.folder) as folder:
        text = measure(Path(folder), arguments.megabytes, arguments.rounds)
    print(text)
    if arguments.write:
        publish(arguments.write, "bench-cuda", text)


def measure(folder: Path, megabytes: int, rounds: int) -> str:
    model = make_model(megabytes)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    saved = {name: value.cpu() for name, value in expected.items()}
    path = folder / "weights.pt"
    torch.save(saved, path)
    nbytes = sum(value.nbytes for value in saved.values())
    ways = ways_of(folder, path, saved, model)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    above: dict[str, list[int]] = {way: [] for way in ways}
    locked = 0
    for at in range(rounds + 1):
        for way, restore in ways.items():
            zero(model)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held, locked_before = torch.cuda.memory_allocated(), locked_bytes()
            begin = time.perf_counter()
            restore()
            torch.cuda.synchronize()
            took = time.perf_counter() - begin
            if way in (OFF, DURING):
                locked += locked_bytes() - locked_before
            if way != READ:
                compare(way, model, expected)
            if at:
                seconds[way].append(took)
                above[way].append(torch.cuda.max_memory_allocated() - held)
            print(f"{at} {way}: {took:.3f} s", flush=True)
    rows = []
    for way, each in seconds.items():
        ratios = [pinned / own for pinned, own in zip(seconds[PINNED], each, strict=True)]
        rows.append(
            (
                way,
                f"{median(each):.3f}",
                f"{nbytes / median(each) / 1e9:.1f}",
                f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{median(above[way]) / 1e6:,.0f}",
            )
        )
    threads = reading_threads(1)
    machine = (
        f"{torch.cuda.get_device_name()}, {len(os.sched_getaffinity(0))} CPUs, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )
    return (
        f"{machine}; {nbytes / 1e6:,.0f} MB of float32 in {len(expected)} tensors, from a file in memory; medians of "
        f"{rounds} rounds. rankload read with {threads} threads, through {locked / 1e6:,.0f} MB of page-locked memory."
        f"\n\n{table(HEADER, rows)}"
    )


def make_model(megabytes: int) -> nn.Module:
    """About `megabytes` of float32 on the device: layers of 64 MB, and a small bias each."""
    torch.manual_seed(0)
    n_layers = max(1, megabytes * 1_000_000 // (4 * 4096 * 4097))
    return nn.Sequential(*(nn.Linear(4096, 4096, device="cuda") for _ in range(n_layers)))


def ways_of(
    folder: Path, path: Path, saved: dict[str, torch.Tensor], model: nn.Module
) -> dict[str, Callable[[], object]]:
    ways: dict[str, Callable[[], object]] = {
        PINNED: pinned_copy(saved, model),
        READ: plain_read(path, reading_threads(1)),
        OFF: lambda: ours(path, model, "off"),
        DURING: lambda: ours(path, model, "during"),
        MMAP: lambda: model.load_state_dict(torch.load(path, mmap=True, weights_only=True)),
    }
    try:
        from safetensors.torch import load_file, save_file
    except ImportError:
        return ways
    other = folder / "weights.safetensors"
    save_file(saved, other)
    ways[DIRECT] = lambda: model.load_state_dict(load_file(other, device="cuda"))
    return ways


def pinned_copy(saved: dict[str, torch.Tensor], model: nn.Module) -> Callable[[], object]:
    """All tensors from page-locked memory that has them already."""
    pinned = {name: value.pin_memory() for name, value in saved.items()}
    held = model.state_dict()

    def copy() -> None:
        for name, value in pinned.items():
            held[name].copy_(value, non_blocking=True)

    return copy


def plain_read(path: Path, n_threads: int) -> Callable[[], object]:
    size = path.stat().st_size
    buffers = [
        memoryview(torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True).numpy())  # type: ignore[arg-type]
        for _ in range(n_threads)
    ]

    def read() -> None:
        file = os.open(path, os.O_RDONLY)
        starts = iter(range(0, size, STAGING_BYTES))
        lock = threading.Lock()

        def work(buffer: memoryview) -> None:
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                os.preadv(file, [buffer], start)

        threads = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.close(file)

    return read


def ours(path: Path, model: nn.Module, verify: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"verify": verify}
        load_checkpoint(str(path), State(model), load_weights_only=True, progress_bar=False, options=options)


def compare(way: str, model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        if not torch.equal(value, expected[name]):
            raise SystemExit(f"{way} did not restore {name}")


def locked_bytes() -> int:
    """The page-locked memory that torch holds."""
    return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])


if __name__ == "__main__":
    main()
