"""Tries a hostile file on every reader of ours, watched: nothing may be imported, run or written by it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from fuzz_guard import Guard
from rankload.loader.alone import EVERYTHING, open_alone
from rankload.loader.errors import CorruptError, FormatError, LayoutError, NotFoundError, UnsafeError
from rankload.loader.formats.torch_file import read_index
from rankload.loader.reading import read
from torch_files import read_whole

REFUSALS = (UnsafeError, CorruptError, FormatError, LayoutError, NotFoundError)
SPARE = 32 << 20
"""What a process takes besides, such as modules that it imports."""


def most(path: Path) -> int:
    """The bytes that reading the file may take, by docs/safety.md."""
    size = path.stat().st_size
    return max(64 << 20, 24 * size) + 2 * size + SPARE


def tried(path: Path) -> set[str]:
    """What readers say of the file: ``read``, or the error's name. Fails for whatever else happens."""
    folder = path.parent
    readers: list[Callable[[str], object]] = [read_index, read_whole, opened, read_quietly]
    said = set()
    before = os.environ.get("RANKLOAD_CACHE_DIR")
    os.environ["RANKLOAD_CACHE_DIR"] = str(folder / "cache")
    try:
        for reader in readers:
            guard = Guard(str(folder), REFUSALS, most_bytes=most(path), most_s=30.0)
            outcome = guard.run(lambda _, reader=reader: reader(str(path)), b"")  # type: ignore[misc]
            if reader is not read_index and reader is not opened:
                said.add(outcome)
    finally:
        if before is None:
            del os.environ["RANKLOAD_CACHE_DIR"]
        else:
            os.environ["RANKLOAD_CACHE_DIR"] = before
    return said


def opened(path: str) -> object:
    """As ``rankload inspect`` and a load begin."""
    with warnings.catch_warnings(), contextlib.ExitStack() as leaving:
        warnings.simplefilter("ignore")
        return len(leaving.enter_context(open_alone(path, EVERYTHING)).saved.state)


def read_quietly(path: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read(path, progress_bar=False)


MEASURE = """
import resource, sys, time
import rankload.loader.formats.torch_file as t
from rankload.loader.errors import RankloadError
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before = peak(); begun = time.monotonic()
try: t.read_index(sys.argv[1]); said = "read"
except RankloadError as error: said = type(error).__name__
print(said, peak() - before, time.monotonic() - begun)
"""


def measured(path: Path) -> tuple[str, int, float]:
    """What a fresh process says of the file, by how much its memory grew, and the seconds it took."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    said, grown, seconds = run.stdout.split()
    return said, int(grown), float(seconds)
