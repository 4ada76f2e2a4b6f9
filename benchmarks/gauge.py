"""What a block costs this process and the processes that it starts: seconds, bytes, memory, and disk, off /proc."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

IO = ("rchar", "wchar", "read_bytes", "write_bytes")
"""What was asked of files (``char``), and what of it went to or came from the disk (``bytes``)."""


@dataclass
class Cost:
    """Bytes of `IO` with those of children that have ended, and how far memory rose above where it began."""

    seconds: float = 0.0
    io: dict[str, int] = field(default_factory=dict)
    anonymous: int = 0
    """Private memory, of all processes at once."""
    resident: int = 0
    """The same with pages of files, mapped or shared; a page that several processes share counts once. Where others
    come to share what was there before, that takes nothing off."""
    disk: int = 0
    """The most that the watched folder held."""


@contextlib.contextmanager
def gauged(*, every_s: float = 0.01, family: bool = False, folder: Path | None = None) -> Iterator[Cost]:
    """Measures its block; memory and the watched `folder` every `every_s` seconds.

    With `family` the memory of descendants counts too. Looking at many processes, or at a folder of many files, costs
    something itself: do it seldom. The bytes of children are counted once they have been waited for.
    """
    look = family_memory if family else own_memory
    cost, ending = Cost(), threading.Event()
    begin_io, (anonymous, resident) = io_bytes(), look()

    def watch() -> None:
        while True:
            last = ending.wait(every_s)
            now = look()
            cost.anonymous = max(cost.anonymous, now[0] - anonymous)
            of_files = (now[1] - now[0]) - (resident - anonymous)
            cost.resident = max(cost.resident, now[0] - anonymous + max(0, of_files))
            if folder is not None:
                cost.disk = max(cost.disk, size_of(folder))
            if last:
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    begin = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - begin
        ending.set()
        thread.join()
        cost.io = {name: count - begin_io[name] for name, count in io_bytes().items()}


def io_bytes() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = dict(line.split(": ") for line in lines)
    return {name: int(counts[name]) for name in IO}


def own_memory() -> tuple[int, int]:
    """Anonymous and all resident memory of this process, in bytes."""
    return _fields("/proc/self/status", "RssAnon", "VmRSS")


def family_memory() -> tuple[int, int]:
    """The same of this process and its descendants; a page that several of them have counts once."""
    found = []
    for process in descendants(os.getpid()):
        with contextlib.suppress(OSError, ValueError):  # it has ended
            found.append(_fields(f"/proc/{process}/smaps_rollup", "Pss_Anon", "Pss"))
    return sum(one for one, _ in found), sum(other for _, other in found)


def descendants(process: int) -> list[int]:
    """A process and those that it and they started."""
    found = [process]
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for child in path.read_text().split():
                    found += descendants(int(child))
    return found


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder, which may change meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _fields(path: str, first: str, second: str) -> tuple[int, int]:
    found = {}
    for line in Path(path).read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in (first, second):
            found[name] = int(rest.split()[0]) << 10
    if len(found) < 2:
        raise ValueError(path)
    return found[first], found[second]
