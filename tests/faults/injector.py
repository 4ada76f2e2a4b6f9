"""Makes a rank fail at one stage of a load, a save, a resume or an export, where an environment variable says so.

    FAULT_INJECTION='{"kind": "SIGKILL", "stage": "fetch first", "ranks": [2], "journal": "/path", "seed": 7}'

The product has no hook for it: `Injector.install` wraps what every stage goes through, the channel's agreements and the
ways in and out of a job, and `remove` takes the wraps off again. What fires says so in the journal first, with the seed
and the time, so that a case whose fault did not fire is known as such.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "FAULT_INJECTION"
JITTER_S = 0.05
"""A rank fails up to so much later than it comes to its stage, as the seed says: the others are elsewhere each time."""
DAY_S = 86400.0
FILLER = "filler"
JOINING, LEAVING = "joining", "leaving"


class InjectedError(Exception):
    """What a rank raises that fails by itself: nothing that rankload knows of."""


@dataclass(frozen=True)
class Injection:
    """A fault, where it happens, and to whom."""

    kind: str
    """A key of `ACTIONS`."""
    stage: str
    """`JOINING`, `LEAVING`, or a pattern that the whole name of a stage or an agreement fits."""
    ranks: tuple[int, ...]
    journal: str
    seed: int
    moved: bool = False
    """Whether it waits until the rank has moved bytes in the stage, twice; else it happens as the stage begins."""
    target: str = ""
    """The file, the folder or the URL that the fault is about."""

    def encode(self) -> str:
        return json.dumps(asdict(self))


def from_environment() -> Injector | None:
    """Of the fault that `VARIABLE` describes; None where it is not set."""
    told = os.environ.get(VARIABLE)
    if told is None:
        return None
    fields = json.loads(told)
    return Injector(Injection(**{**fields, "ranks": tuple(fields["ranks"])}))


class Injector:
    """The wraps of one fault in this process."""

    def __init__(self, injection: Injection) -> None:
        self.injection = injection
        self.rank = int(os.environ.get("RANK", "0"))
        self._fired = False
        self._moves = 0
        self._random = random.Random(injection.seed)
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        if self.rank not in self.injection.ranks:
            return
        from rankload.distributed import group
        from rankload.distributed.channel import Channel

        if self.injection.stage == JOINING:
            self._before(group, "open_meeting_store")
        elif self.injection.stage == LEAVING:
            self._before(Channel, "close")
        elif self.injection.moved:
            self._wrap(Channel, "progress", self._progress)
        else:
            self._wrap(Channel, "_announcing", self._announcing)

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def fire(self) -> None:
        """Does what this fault does, once."""
        if self._fired:
            return
        self._fired = True
        time.sleep(self._random.uniform(0, JITTER_S))
        self._note()
        ACTIONS[self.injection.kind](self)

    def _note(self) -> None:
        told = {
            "kind": self.injection.kind,
            "rank": self.rank,
            "seed": self.injection.seed,
            "at": time.monotonic(),
        }
        # One write: several ranks may add to it.
        with open(self.injection.journal, "ab", buffering=0) as file:
            file.write(json.dumps(told).encode() + b"\n")

    def _before(self, owner: Any, name: str) -> None:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def fire_first(*args: Any, **more: Any) -> Any:
                self.fire()
                return original(*args, **more)

            return fire_first

        self._wrap(owner, name, make)

    def _announcing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def announcing(channel: Any, stage: str) -> Iterator[None]:
            with original(channel, stage):
                if re.fullmatch(self.injection.stage, stage):
                    self.fire()
                yield

        return announcing

    def _progress(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def progress(channel: Any, **counters: float) -> None:
            original(channel, **counters)
            if re.fullmatch(self.injection.stage, channel._store_thread.stage):
                self._moves += 1
                if self._moves == 2:
                    self.fire()

        return progress

    def _wrap(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, make(original))
        self._undo.append(lambda: setattr(owner, name, original))

    # --- what faults do ------------------------------------------------------------------------------------------

    def _raise(self) -> None:
        raise InjectedError(f"injected into rank {self.rank} at {self.injection.stage}")

    def _turn_clock(self) -> None:
        """The clock of this process jumps by a day, forward or back; the time that only moves on does not."""
        jump, true_time = self._random.choice((DAY_S, -DAY_S)), time.time
        time.time = lambda: true_time() + jump
        self._undo.append(lambda: setattr(time, "time", true_time))

    def _fill_disk(self) -> None:
        with (
            contextlib.suppress(OSError),
            open(Path(self.injection.target, FILLER), "wb", buffering=0) as file,
        ):
            while True:
                file.write(bytes(64 << 10))

    def _remove_file(self) -> None:
        os.unlink(self.injection.target)

    def _truncate_file(self) -> None:
        os.truncate(self.injection.target, os.path.getsize(self.injection.target) // 2)

    def _change_file(self) -> None:
        """Every 4 KiB has another byte, and the file is another one: what a job does that saves at the same place."""
        data = bytearray(Path(self.injection.target).read_bytes())
        for at in range(0, len(data), 4096):
            data[at] ^= 0x20
        part = f"{self.injection.target}.new"
        Path(part).write_bytes(data)
        os.replace(part, self.injection.target)

    def _arm_store(self) -> None:
        urllib.request.urlopen(self.injection.target, timeout=5).close()

    def _tell(self) -> None:
        """The harness does the rest, once it sees the journal, and answers by a file beside it."""
        answer = Path(f"{self.injection.journal}.done")
        while not answer.exists():
            time.sleep(0.01)


def _signal(number: int) -> Callable[[Injector], None]:
    def send(_: Injector) -> None:
        os.kill(os.getpid(), number)

    return send


def _exit(_: Injector) -> None:
    sys.exit(0)


def _vanish(_: Injector) -> None:
    os._exit(0)


ACTIONS: dict[str, Callable[[Injector], None]] = {
    "raises": Injector._raise,
    "SIGKILL": _signal(signal.SIGKILL),
    "SIGSTOP": _signal(signal.SIGSTOP),
    "sys.exit(0)": _exit,
    "os._exit(0)": _vanish,
    "clock": Injector._turn_clock,
    "full disk": Injector._fill_disk,
    "missing file": Injector._remove_file,
    "truncated file": Injector._truncate_file,
    "changed file": Injector._change_file,
    "store": Injector._arm_store,
    "harness": Injector._tell,
}
