"""Fuzzes every parser of bytes from storage, each in a process of its own, and prints what came of it.

    python tests/support/fuzz.py --seconds 600 --write docs/reliability.md
    python tests/support/fuzz.py --seconds 60 --seed 7 tar http-load
    python tests/support/fuzz.py --again out/fuzz/tar-1f0c...      # one input that was found, with its traceback

`make fuzz` does the first. Inputs are made from real ones by the mutators of `fuzz_mutations`, guided by coverage where
atheris is installed; `fuzz_guard` says what a finding is. Each input that is one is kept in the folder ``--findings``.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import mmap
import multiprocessing
import multiprocessing.connection
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
SUPPORT = Path(__file__).resolve().parent
sys.path.insert(0, str(SUPPORT))

BEGIN, END = "<!-- fuzz: begin -->", "<!-- fuzz: end -->"
FINDINGS = "out/fuzz"
HANG_S = 60
"""After so long one execution is ended, and its process with it."""
MOST_OF_A_KIND = 3
"""How many inputs are kept for findings that look alike."""
RESTARTS = 20
_SLOT_BYTES = 1 << 20


@dataclass
class Told:
    """What a process that fuzzes one target has done so far."""

    executions: int = 0
    seconds: float = 0.0
    worked_s: float = 0.0
    """Of them, those that a processor gave it."""
    guided: bool = False
    outcomes: dict[str, int] = field(default_factory=dict)
    """How many inputs were read, or refused by which error."""
    findings: dict[str, int] = field(default_factory=dict)
    """How often, by what was found and where."""


# --- one target, in this process -------------------------------------------------------------------------------------


class Runner:
    """Executes one target again and again; keeps count, and the inputs that are findings."""

    def __init__(self, name: str, parse: Any, folder: Path, findings: Path) -> None:
        from fuzz_guard import Guard
        from fuzz_targets import TARGETS

        self.name = name
        self.target = TARGETS[name]
        self.told = Told()
        self._parse = parse
        self._findings = findings
        self._counts: Counter[str] = Counter()
        self._found: Counter[str] = Counter()
        self._guard = Guard(
            str(folder), self.target.promised, most_bytes=self.target.most_bytes, most_s=self.target.most_s
        )

    def warm_up(self, seeds: list[bytes]) -> None:
        """Executes each seed once, so that what is imported or made on first use is there."""
        for seed in seeds[:12]:
            with contextlib.suppress(Exception):
                self._parse(seed)

    def execute(self, data: bytes) -> str | None:
        """What was found, and where; None where the input does no harm."""
        from fuzz_guard import FindingError

        self.told.executions += 1
        try:
            self._counts[self._guard.run(self._parse, data, more_bytes=self.target.per_byte * len(data))] += 1
        except FindingError as error:
            what = described(error)
            self._found[what] += 1
            if self._found[what] <= MOST_OF_A_KIND:
                keep(self._findings, self.name, data, what)
            return what
        return None

    def report(self) -> Told:
        self.told.outcomes, self.told.findings = dict(self._counts), dict(self._found)
        return self.told


def described(error: Exception) -> str:
    """A finding's text without what differs between inputs, and the place of ours that it came through."""
    place = ""
    for frame in traceback.extract_tb((error.__cause__ or error).__traceback__):
        if "/tests/" not in frame.filename and not frame.filename.startswith("<"):
            parts = frame.filename.split("/")
            place = f" at {'/'.join(parts[-2:])}:{frame.name}"
    text = str(error).split(" for ")[0] if getattr(error, "kind", "") in ("memory", "hang") else str(error)
    kind = ": ".join(text.split(": ")[:2])
    return f"{kind[:160]}{place}"


def keep(findings: Path, name: str, data: bytes, what: str) -> Path:
    findings.mkdir(parents=True, exist_ok=True)
    path = findings / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
    path.write_bytes(data)
    print(f"{name}: {what}\n    {path}", flush=True)
    return path


@contextlib.contextmanager
def opened(name: str, findings: Path) -> Any:
    """The target's runner and its seeds, in folders of their own."""
    from fuzz_targets import TARGETS

    with tempfile.TemporaryDirectory(prefix="rankload-fuzz-") as made:
        seeds_folder, folder = Path(made) / "seeds", Path(made) / "work"
        seeds_folder.mkdir()
        folder.mkdir()
        seeds = list(TARGETS[name].seeds(seeds_folder))
        with TARGETS[name].parse(folder) as parse:
            runner = Runner(name, parse, folder, findings)
            runner.warm_up(seeds)
            yield runner, seeds


def cases(name: str, seeds: list[bytes], seed: int, count: int) -> Any:
    """`count` inputs of a target: its seeds, then mutations of them, the same ones for the same `seed`."""
    from fuzz_targets import TARGETS

    chance = random.Random(f"{name} {seed}")
    yield from seeds[:count]
    for _ in range(count - len(seeds)):
        data = chance.choice(seeds)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            data = TARGETS[name].mutate(data, chance, seeds)
        yield data


def check(name: str, folder: Path) -> None:
    """As a test: the target's few inputs, the same each time. Fails for any finding, and where all are read or none."""
    from fuzz_targets import TARGETS

    target = TARGETS[name]
    with opened(name, folder / "findings") as (runner, seeds):
        for data in cases(name, seeds, 0, target.cases):
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            try:
                runner.execute(data)
            finally:
                faulthandler.cancel_dump_traceback_later()
        told = runner.report()
    assert not told.findings, told.findings
    assert sum(told.outcomes.values()) == target.cases
    assert told.outcomes.get("read", 0) > 0, "no input reached the end of the parser"
    assert not target.promised or len(told.outcomes) > 1, "no input was refused"


def fuzz_here(name: str, seconds: float, seed: int, findings: Path, told: Path, atheris: Any) -> None:
    """Fuzzes `name` in this process, which it ends once a processor has worked on it for so long.

    It writes what it has done to `told` again and again.
    """
    with open(told.with_suffix(".log"), "wb") as log:
        os.dup2(log.fileno(), 2)
    with opened(name, findings) as (runner, seeds), open(told.with_suffix(".input"), "w+b") as file:
        file.truncate(_SLOT_BYTES)
        runner.told.guided = atheris is not None
        begun, worked = time.monotonic(), time.process_time()
        with mmap.mmap(file.fileno(), _SLOT_BYTES) as held:
            written = 0.0

            def execute(data: bytes) -> None:
                nonlocal written
                # What ends this process leaves the input that did.
                held[:8] = len(data).to_bytes(8, "little")
                held[8 : 8 + len(data)] = data[: _SLOT_BYTES - 8]
                faulthandler.dump_traceback_later(HANG_S, exit=True)
                runner.execute(data)
                now = time.monotonic()
                runner.told.seconds, runner.told.worked_s = now - begun, time.process_time() - worked
                if now - written > 1 or runner.told.worked_s >= seconds:
                    written = now
                    told.write_text(json.dumps(asdict(runner.report())))
                if runner.told.worked_s >= seconds:
                    os._exit(0)  # libFuzzer would not end otherwise

            if atheris is not None:
                _guided(atheris, runner.target.mutate, seeds, seed, execute, told.with_suffix(".corpus"))
            for data in cases(name, seeds, seed, sys.maxsize):
                execute(data)


def _guided(atheris: Any, mutate: Any, seeds: list[bytes], seed: int, execute: Any, corpus: Path) -> None:
    """Has atheris choose the inputs: those that reach new code are mutated further. Does not return."""
    corpus.mkdir(exist_ok=True)
    for data in seeds:
        (corpus / hashlib.sha256(data).hexdigest()).write_bytes(data)

    def changed(data: bytes, most: int, number: int) -> bytes:
        chance = random.Random(number)
        if chance.random() < 0.2:
            return bytes(atheris.Mutate(data, most))
        return bytes(mutate(bytes(data), chance, seeds))[:most]

    arguments = [sys.argv[0], str(corpus), f"-seed={seed or 1}", f"-max_len={512 << 10}"]
    # Time and memory are watched by the guard.
    arguments += [
        f"-artifact_prefix={corpus}/",
        "-timeout=86400",
        "-rss_limit_mb=0",
        "-len_control=0",
        "-detect_leaks=0",
        "-verbosity=0",
    ]
    atheris.Setup(arguments, execute, custom_mutator=changed, internal_libfuzzer=True)
    atheris.Fuzz()


# --- all targets -----------------------------------------------------------------------------------------------------


def fuzz(name: str, seconds: float, seed: int, findings: Path, folder: Path, atheris: Any) -> Told:
    """Fuzzes `name` for so long of a processor, in a process that is begun again where an input ends it."""
    whole = Told()
    for start in range(RESTARTS):
        left = seconds - whole.worked_s
        if left <= 0:
            break
        told = folder / f"{name}-{start}.json"
        # A fork has everything imported already, which takes long where coverage is measured.
        child = multiprocessing.get_context("fork").Process(
            target=fuzz_here, args=(name, left, seed + start, findings, told, atheris)
        )
        child.start()
        child.join()
        if child.exitcode != 0:
            print(told.with_suffix(".log").read_text("utf-8", "replace")[-4000:], flush=True)
        if not told.exists():
            raise SystemExit(f"{name}: its process ended with {child.exitcode} before its first execution")
        part = Told(**json.loads(told.read_text()))
        whole.guided = part.guided
        whole.executions += part.executions
        whole.seconds += part.seconds
        whole.worked_s += max(part.worked_s, 1.0)
        for mine, new in ((whole.outcomes, part.outcomes), (whole.findings, part.findings)):
            for key, count in new.items():
                mine[key] = mine.get(key, 0) + count
        if child.exitcode == 0:
            break
        held = told.with_suffix(".input").read_bytes()
        size = int.from_bytes(held[:8], "little")
        what = f"the process ended with {child.exitcode}: a crash, or {HANG_S} s of one execution"
        keep(findings, name, held[8 : 8 + size], what)
        whole.findings[what] = whole.findings.get(what, 0) + 1
    return whole


def fuzz_all(
    names: Sequence[str], seconds: float, seed: int, findings: Path, folder: Path, atheris: Any, jobs: int
) -> dict[str, Told]:
    """Fuzzes the targets `names`, `jobs` of them at once; prints what came of each, and returns it in their order."""
    found: dict[str, Told] = {}
    waiting, running = list(names), {}

    def work(name: str) -> None:
        told = fuzz(name, seconds, seed, findings, folder, atheris)
        (folder / f"{name}.all").write_text(json.dumps(asdict(told)))

    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            process = multiprocessing.get_context("fork").Process(target=work, args=(name,))
            process.start()
            running[process.sentinel] = (name, process)
        for sentinel in multiprocessing.connection.wait(running):
            name, process = running.pop(sentinel)  # type: ignore[index]
            process.join()
            if process.exitcode != 0:
                raise SystemExit(f"{name}: ended with {process.exitcode}")
            found[name] = told = Told(**json.loads((folder / f"{name}.all").read_text()))
            print(
                f"{name}: {told.executions:,} executions in {told.seconds:.0f} s, {told.outcomes}, {told.findings}",
                flush=True,
            )
    return {name: found[name] for name in names}


def table(found: dict[str, Told], seed: int) -> str:
    """As docs/reliability.md has it."""
    from fuzz_targets import TARGETS

    lines = [
        "| what is read | target | seconds | of a processor | executions | read | refused | findings |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, told in found.items():
        read = told.outcomes.get("read", 0)
        refused = sum(told.outcomes.values()) - read
        times = (f"{told.seconds:.0f}", f"{told.worked_s:.0f}")
        counts = (f"{told.executions:,}", f"{read:,}", f"{refused:,}", len(told.findings))
        cells = (TARGETS[name].what, name, *times, *counts)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    executions = sum(told.executions for told in found.values())
    kinds = sum(len(told.findings) for told in found.values())
    way = "guided by coverage" if any(told.guided for told in found.values()) else "not guided by coverage"
    return f"{executions:,} executions with seed {seed}, {way}; {kinds} kinds of findings.\n\n" + "\n".join(
        lines
    )


def publish(page: Path, text: str) -> None:
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no place for the table: {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def again(path: Path, name: str) -> None:
    """Executes one input as it was found, and lets what it raises through."""
    with opened(name, path.parent) as (runner, _):
        data = path.read_bytes()
        found = runner.execute(data)
        print(found or "nothing is found any more")
        runner._parse(data)


def _atheris() -> Any:
    """The module, with coverage of everything of ours; None where it is not installed."""
    try:
        import atheris  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        atheris.instrument_imports(include=["rankload"]),
    ):
        import fuzz_targets  # noqa: F401
    return atheris


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=float, default=600.0, help="of a processor, for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at once")
    parser.add_argument("--findings", type=Path, default=Path(FINDINGS))
    parser.add_argument("--write", type=Path, help="a page with a place for the table")
    parser.add_argument("--again", type=Path)
    options = parser.parse_args()
    if options.again is not None:
        return again(
            options.again, options.targets[0] if options.targets else options.again.name.rpartition("-")[0]
        )
    atheris = _atheris()
    from fuzz_targets import TARGETS

    print(
        f"seed {options.seed}, {options.seconds:g} s of a processor for each target, findings in {options.findings}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="rankload-fuzzing-") as made:
        found = fuzz_all(
            options.targets or list(TARGETS),
            options.seconds,
            options.seed,
            options.findings,
            Path(made),
            atheris,
            options.jobs,
        )
    text = table(found, options.seed)
    print(text)
    if options.write is not None:
        publish(options.write, text)
    if any(told.findings for told in found.values()):
        raise SystemExit(1)
    return None


if __name__ == "__main__":
    main()
