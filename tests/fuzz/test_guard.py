"""The guard of the fuzzers sees what it is there to see: else they would find nothing, whatever parsers do."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest
from fuzz_guard import FindingError, Guard
from fuzz_targets import TARGETS


def raises(error: Exception) -> Callable[[bytes], object]:
    def parse(data: bytes) -> object:
        raise error

    return parse


def in_a_thread(data: bytes) -> object:
    thread = threading.Thread(target=os.system, args=("true",))
    thread.start()
    return thread.join()


BAD: dict[str, tuple[str, Callable[[bytes], object]]] = {
    "another error": ("exception", raises(KeyError("x"))),
    "an import by name": (
        "import",
        lambda data: importlib.import_module("this_module_is_not_there_" + data.decode()),
    ),
    "an import from C": ("import", lambda data: __import__("email.mime.nonmultipart_" + data.decode())),
    "a program": ("execution", lambda data: subprocess.run(["true"], check=True)),
    "a program from a thread": ("execution", in_a_thread),
    "eval": ("execution", lambda data: eval("1 + 1")),
    "a file elsewhere": ("write", lambda data: open("/tmp/rankload-guard-test", "w").close()),
    "a folder elsewhere": ("write", lambda data: os.mkdir("/proc/nowhere/x")),
    "memory": ("memory", lambda data: len(bytearray(b"x" * (200 << 20)))),
    "a long time": ("hang", lambda data: sum(range(40_000_000))),
}


@pytest.mark.parametrize("what", BAD)
def test_what_no_parser_may_do_is_found(tmp_path: Path, what: str) -> None:
    kind, parse = BAD[what]
    guard = Guard(str(tmp_path), (ValueError, ImportError, OSError), most_bytes=96 << 20, most_s=0.2)
    with pytest.raises(FindingError) as caught:
        guard.run(parse, b"x")
    assert caught.value.kind == kind


def test_what_a_parser_may_do_is_not_found(tmp_path: Path) -> None:
    sys.modules.pop("colorsys", None)

    def parse(data: bytes) -> object:
        import colorsys  # noqa: F401  (a statement names it, not the file)

        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "f").write_bytes(data)
        time.sleep(0.3)
        raise ValueError("a promised error")

    guard = Guard(str(tmp_path), (ValueError,), most_bytes=96 << 20, most_s=0.2)
    assert guard.run(parse, b"x") == "ValueError"


def test_the_same_seed_gives_the_same_inputs(tmp_path: Path) -> None:
    for name in ("torch-zip", "pickle", "tar", "json", "messages"):
        target = TARGETS[name]
        (tmp_path / name).mkdir()
        seeds = list(target.seeds(tmp_path / name))
        assert list(fuzz.cases(name, seeds, 3, 60)) == list(fuzz.cases(name, seeds, 3, 60)), name
        assert list(fuzz.cases(name, seeds, 3, 60)) != list(fuzz.cases(name, seeds, 4, 60)), name


def test_a_finding_is_kept_and_named_by_its_place(tmp_path: Path) -> None:
    with fuzz.opened("json", tmp_path / "found") as (runner, _):

        def parse(data: bytes) -> object:
            raise KeyError("x")

        runner._parse = parse
        assert runner.execute(b"one") == "exception: KeyError"
        told = runner.report()
    assert told.findings == {"exception: KeyError": 1}
    (kept,) = (tmp_path / "found").iterdir()
    assert kept.read_bytes() == b"one"
