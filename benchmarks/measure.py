"""What the measuring processes share: the model, the clock, the memory, and a cold file."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

LAYER_BYTES = (1024 * 2048 + 2048) * 4


def make_model(megabytes: int, seed: int) -> nn.Module:
    """About `megabytes` of float32 parameters, allocated and touched."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Linear(1024, 2048) for _ in range(max(1, megabytes * 1_000_000 // LAYER_BYTES)))
    )


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
