"""Runs the demo: compares a job that was never stopped with one that was restored over HTTP, loss by loss.

``demo_train`` is what each rank runs, ``demo_server`` the HTTP server. This process imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .children import ChildError, end, rank_environment, run_torchrun

RANKS = 4
DEADLINE_S = 150.0
SEED_SAVED, SEED_RESTORED = 17, 90210
UNAVAILABLE = "deepspeed-unavailable.txt"
"""The file in which a rank of ``demo_train`` writes why DeepSpeed can't be imported."""
SERVER_DEADLINE_S = 20.0
RECORDED = Path(__file__).parents[1] / "tests" / "data" / "composer-monolithic-w2" / "ep2-ba8-rank0.pt"


@dataclass(frozen=True)
class FileTraffic:
    """What the server counted for one file: its size, requests by method, and the bytes that were sent."""

    name: str
    size_bytes: int
    gets: int
    heads: int
    sent_bytes: int


class LapTimer:
    """Measures seconds: since the last `lap`, and in `total` since it was made."""

    def __init__(self) -> None:
        self.begin = self.last = time.monotonic()

    def lap(self) -> float:
        last, self.last = self.last, time.monotonic()
        return self.last - last

    def total(self) -> float:
        return time.monotonic() - self.begin


class DeepSpeedUnavailableError(Exception):
    """DeepSpeed is installed and cannot be imported; the message says why."""


def demo(stage: int | None) -> int:
    """Runs the demo with DeepSpeed ZeRO at `stage`, or plain DDP where it is None; returns the exit code.

    Everything is written below one temporary folder, which is removed, and every process that was started is
    ended, however the demo ends.
    """
    watch = LapTimer()
    if stage is not None and find_spec("deepspeed") is None:
        explain_fallback("it is not installed")
        stage = None
    with tempfile.TemporaryDirectory(prefix="rankload-demo-") as folder:
        try:
            try:
                code = run(Path(folder), stage, watch)
            except DeepSpeedUnavailableError as error:
                explain_fallback(str(error))
                code = run(Path(folder), None, watch)
        except ChildError as error:
            print(f"the demo failed: {error}")
            return 1
    print(f"{watch.total():.1f} s in all; the temporary folder is removed")
    return code


def explain_fallback(reason: str) -> None:
    """Prints why plain DDP takes DeepSpeed's place."""
    print(f"DeepSpeed cannot be used here ({reason}): a plain DDP module stands in for it\n")


def run(folder: Path, stage: int | None, watch: LapTimer) -> int:
    """One demonstration inside `folder`; 1 where anything that should be equal is not."""
    checkpoint, before, after, cache = (folder / name for name in ("checkpoint", "before", "after", "cache"))
    for path in (checkpoint, before, after):
        path.mkdir(exist_ok=True)
    kind = "plain DDP" if stage is None else f"DeepSpeed ZeRO stage {stage}"
    print(
        f"rankload demo: a small transformer under {kind}, {RANKS} gloo ranks under torchrun, on CPU\n",
        flush=True,
    )

    run_ranks(folder / "train.log", stage, SEED_SAVED, before, ["--save", str(checkpoint)])
    print(f"1. trained 4 steps, saved, and trained 2 more without stopping ({watch.lap():.1f} s)")
    show_files(checkpoint)

    template = "ep1-rank{rank}" + (".pt" if stage is None else ".tar")
    with serving(checkpoint) as (server, port):
        url = f"http://127.0.0.1:{port}/{template}"
        print(f"\n2. process {server.pid} serves them at {url}", flush=True)
        run_ranks(
            folder / "resume.log", stage, SEED_RESTORED, after, ["--load", url, "--cache-dir", str(cache)]
        )
        served = counts(server, checkpoint)
    print(
        f"\n3. {RANKS} fresh ranks with other weights restored it and trained 2 steps ({watch.lap():.1f} s)"
    )
    uninterrupted, resumed = results(before), results(after)
    fetched_once = show_traffic(served, resumed[0]["metrics"])
    print("\n   receipt")
    show_lines(resumed[0]["receipt"])

    print("\n4. losses")
    equal = show_losses(uninterrupted, resumed)
    print()
    if stage is None:
        show_recorded()
    return 0 if equal and fetched_once else 1


def run_ranks(
    log: Path, stage: int | None, seed: int, results_folder: Path, arguments: Sequence[str]
) -> None:
    """Runs ``demo_train`` on all ranks. Raises `DeepSpeedUnavailableError`, or `ChildError` with the ranks' errors."""
    job = [] if stage is None else ["--stage", str(stage)]
    common = ["--seed", str(seed), "--results", str(results_folder)]
    try:
        run_torchrun(
            RANKS, "rankload.launch.demo_train", [*job, *common, *arguments], log=log, deadline_s=DEADLINE_S
        )
    except ChildError:
        unavailable = results_folder / UNAVAILABLE
        if unavailable.exists():
            raise DeepSpeedUnavailableError(unavailable.read_text().strip()) from None
        said = dict.fromkeys(path.read_text() for path in sorted(results_folder.glob("rank*.failed")))
        if said:
            raise ChildError("\n    ".join(said)) from None
        raise


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that serves `folder`, and its port. It ends with its standard input, or at the end of the block."""
    server = subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "rankload.launch.demo_server", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=rank_environment(),
        start_new_session=True,
    )
    try:
        line = server.stdout.readline() if server.stdout else b""
        if not line.strip().isdigit():
            raise ChildError("the HTTP server did not start")
        yield server, int(line)
    finally:
        end(server)


def counts(server: subprocess.Popen[bytes], folder: Path) -> list[FileTraffic]:
    """Ends the server and returns what it counted, for each file of `folder`."""
    try:
        output, _ = server.communicate(timeout=SERVER_DEADLINE_S)
        ledger = json.loads(output)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise ChildError("the HTTP server did not say what it served") from error
    nothing = {"gets": 0, "heads": 0, "bytes": 0}
    return [
        FileTraffic(path.name, path.stat().st_size, entry["gets"], entry["heads"], entry["bytes"])
        for path in sorted(folder.iterdir())
        for entry in [ledger.get(path.name, nothing)]
    ]


def results(folder: Path) -> list[dict[str, Any]]:
    """The results that each rank wrote as JSON, by rank."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def show_files(folder: Path) -> None:
    """Prints the files of `folder` and the members of its tars, with their sizes."""
    for path in sorted(folder.iterdir()):
        print(f"     {path.name}  {path.stat().st_size:>11,} bytes")
        if tarfile.is_tarfile(path):
            with tarfile.open(path) as tar:
                for member in tar.getmembers():
                    if member.isfile():
                        print(f"         {member.size:>11,}  {member.name}")


def show_traffic(served: Sequence[FileTraffic], metrics: dict[str, float]) -> bool:
    """Prints requests and bytes by file; returns whether the files' bytes were sent once.

    Where files come in parts, up to a hundredth may be sent twice (first bytes, requested to see what the server can
    do; small gaps between wanted ranges) or never (padding).
    """
    print(f"     {'file':<16}{'size':>12}{'served':>12}{'requests':>10}")
    for file in served:
        requests = f"{file.gets} GET" + (f", {file.heads} HEAD" if file.heads else "")
        print(f"     {file.name:<16}{file.size_bytes:>12,}{file.sent_bytes:>12,}  {requests}")
    size, sent = sum(file.size_bytes for file in served), sum(file.sent_bytes for file in served)
    fetched = int(metrics.get("rankload/fetched_bytes", 0))
    once = size == sent == fetched or size * 0.99 <= fetched <= sent <= size * 1.01
    again = (
        f" ({sent - size:,} twice)" if sent > size else f" ({size - sent:,} not read)" if sent < size else ""
    )
    verdict = f"each byte crossed once, for {RANKS} ranks{again}" if once else "NOT each byte once"
    print(f"     fetched by this node: {fetched:,} bytes; served: {sent:,} of {size:,}: {verdict}")
    return once


def show_lines(lines: Sequence[str]) -> None:
    """Prints `lines`, wrapped and indented."""
    for line in lines:
        for part in textwrap.wrap(line, 105, break_long_words=False, break_on_hyphens=False):
            print(f"     {part}")


def show_losses(uninterrupted: Sequence[dict[str, Any]], resumed: Sequence[dict[str, Any]]) -> bool:
    """Prints both runs' losses; returns whether they and the next random numbers are equal to the last bit."""
    print(f"     {'step':>4}{'rank':>6}{'uninterrupted':>22}{'resumed':>22}")
    equal = True
    for index in range(len(uninterrupted[0]["losses"])):
        for rank in range(RANKS):
            first, second = uninterrupted[rank]["losses"][index], resumed[rank]["losses"][index]
            equal = equal and first == second
            mark = "" if first == second else "  differs"
            step = resumed[rank]["batch"] + index + 1
            print(f"     {step:>4}{rank:>6}{first!r:>22}{second!r:>22}{mark}")
    same_draws = all(one["draws"] == two["draws"] for one, two in zip(uninterrupted, resumed, strict=True))
    print("     all losses are equal, exactly" if equal else "     the losses are NOT equal")
    print(
        "     every rank's next random numbers are equal too"
        if same_draws
        else "     the random generators are NOT where they were"
    )
    return equal and same_draws


def show_recorded() -> None:
    """Restores a recorded checkpoint of Composer's, where this is a checkout that has it."""
    if not RECORDED.exists():
        return
    command = [sys.executable, "-m", "rankload.launch.demo_fixture", str(RECORDED)]
    try:
        done = subprocess.run(  # noqa: S603 - our own command
            command, env=rank_environment(), capture_output=True, text=True, timeout=DEADLINE_S, check=True
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise ChildError(f"the recorded checkpoint {RECORDED.name} was not restored") from error
    print("5. a checkpoint that Composer 0.32.1 wrote, weights only")
    show_lines(done.stdout.splitlines())
    print()
