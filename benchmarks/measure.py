"""What the measuring processes share: the model, the clock, the memory, and a cold file."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

LAYER_BYTES = (1024 * 2048 + 2048) * 4


def make_model(megabytes: int, seed: int) -> nn.Module:
    """About `megabytes` of float32 parameters, allocated and touched."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Linear(1024, 2048) for _ in range(max(1, megabytes * 1_000_000 // LAYER_BYTES)))
    )


def zero(model: nn.Module) -> None:
    """Makes all parameters zero, which also touches their memory."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


@dataclass
class Measured:
    """Seconds, and how far the process's resident memory rose above where it began, in bytes."""

    seconds: float = 0.0
    extra_bytes: int = 0


@contextlib.contextmanager
def measured() -> Iterator[Measured]:
    """Measures its block."""
    result = Measured()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = resident("VmRSS")
    begin = time.perf_counter()
    yield result
    result.seconds = time.perf_counter() - begin
    result.extra_bytes = max(0, resident("VmHWM") - before)


def resident(name: str) -> int:
    """A memory figure of this process (``VmRSS``, ``VmHWM``) in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


def drop_from_page_cache(path: str) -> None:
    """Asks the kernel to forget the file's pages."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class Peak:
    """The private memory (RssAnon) of some processes and their children, in bytes, as sampled."""

    start: int = 0
    highest: int = 0

    @property
    def above_start(self) -> int:
        return max(0, self.highest - self.start)


@contextlib.contextmanager
def peak_private_bytes(pids: Sequence[int], every_s: float = 0.01) -> Iterator[Peak]:
    """Watches other processes while its block runs, so that they need not watch themselves."""
    peak = Peak()
    peak.start = peak.highest = private_bytes_of(pids)
    ending = threading.Event()

    def watch() -> None:
        while not ending.wait(every_s):
            peak.highest = max(peak.highest, private_bytes_of(pids))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ending.set()
        thread.join()


def private_bytes_of(pids: Sequence[int]) -> int:
    """The sum over the processes and all that they started; those that have ended count nothing."""
    total, waiting = 0, list(pids)
    while waiting:
        pid = waiting.pop()
        # A process may end between one look and the next.
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) << 10
            for task in os.listdir(f"/proc/{pid}/task"):
                waiting += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return total
