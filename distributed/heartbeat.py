"""A rank's heartbeat, and what a rank that watches it concludes: alive, dead (`PeerWatch.death`), or without progress.

`store_thread` sends the heartbeats and feeds the watches. Times are measured by the watcher's own monotonic clock, and
only while the watcher itself was looking: a process that slept (stopped, suspended, starved) does not take its own
sleep for the silence of others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .liveness import ProcessIdentity, how_ended, is_stopped, is_watchable

HEARD = 2
"""A rank that was stopped has heard of another one after so many heartbeats: one may have waited for it to wake."""
SILENT_AFTER_S = 6.0
"""Seconds without a heartbeat after which a rank counts as dead, if neither its watcher nor any other rank sees its
process."""
SUSPECT_AFTER_S = 2.0
"""Seconds without a heartbeat after which the ranks of its machine are asked for a rank elsewhere. A second each until
they are asked, until they look, and until their answer is read must come before `SILENT_AFTER_S`."""
ASKED_AT_MOST = 16
"""Silent ranks that a heartbeat asks for."""

NAMED_AT_MOST = 8
"""Ranks that a message describes; the others are counted."""


@dataclass(frozen=True)
class Enrolled:
    """Which process a rank is, and how many calls it has made over one store."""

    process: ProcessIdentity
    calls: int

    def encode(self) -> bytes:
        """JSON; `decode_enrolled` reads it."""
        return json.dumps({"process": self.process.as_dict(), "calls": self.calls}).encode()


def decode_enrolled(raw: bytes) -> Enrolled:
    """What `Enrolled.encode` wrote."""
    fields: dict[str, Any] = json.loads(raw)
    return Enrolled(ProcessIdentity(**fields["process"]), fields["calls"])


@dataclass(frozen=True)
class Heartbeat:
    """What a rank reports of itself once a second.

    ``sequence`` counts its heartbeats, ``progress`` its own steps, ``moved`` (rank 0 only) how often it saw
    another rank move. ``closed``: the rank has left the channel in good order and sends no further heartbeats.
    ``waiting_for``: what it waits for outside of the channel, such as a file that a server does not send; or "".
    ``stopped``: ranks whose processes it watches, and sees stopped: they are silent, but not dead.
    ``silent`` (rank 0 only): ranks that it has not heard of for a while, and whose processes it can't see: those who
    can are to bear witness.
    """

    sequence: int
    process: ProcessIdentity
    stage: str = ""
    progress: int = 0
    moved: int = 0
    counters: dict[str, float] = field(default_factory=dict)
    closed: bool = False
    waiting_for: str = ""
    stopped: list[int] = field(default_factory=list)
    silent: dict[int, ProcessIdentity] = field(default_factory=dict)

    def encode(self) -> bytes:
        """JSON; `decode_heartbeat` reads it."""
        silent = {rank: process.as_dict() for rank, process in self.silent.items()}
        return json.dumps({**vars(self), "process": self.process.as_dict(), "silent": silent}).encode()


def decode_heartbeat(raw: bytes) -> Heartbeat:
    """What `Heartbeat.encode` wrote."""
    fields: dict[str, Any] = json.loads(raw)
    silent = {int(rank): ProcessIdentity(**process) for rank, process in fields["silent"].items()}
    return Heartbeat(**{**fields, "process": ProcessIdentity(**fields["process"]), "silent": silent})


@dataclass(frozen=True)
class Witness:
    """What a rank sees of the process of a silent one: that it lives, and whether it is stopped.

    ``number`` counts what this witness has said, so that its own silence is told from another look.
    """

    by: int
    number: int
    stopped: bool

    def encode(self) -> bytes:
        """JSON; `decode_witness` reads it."""
        return json.dumps(vars(self)).encode()


def decode_witness(raw: bytes) -> Witness:
    """What `Witness.encode` wrote."""
    return Witness(**json.loads(raw))


class PeerWatch:
    """What one rank knows of another: its last heartbeat, and for how long it sent none or made no progress."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.heartbeat: Heartbeat | None = None
        self.silent_s = 0.0
        self.idle_s = 0.0
        self.stopped = False
        """Whether a rank on its machine has seen its process stopped."""
        self.witness: Witness | None = None
        self.witnessed_s = 0.0
        """For how long that `witness` has been the last one."""
        self.heard = HEARD
        """How many heartbeats came since this rank woke, if it was stopped."""
        self.expected: Enrolled | None = None
        """What an earlier call told of it, where it has not come to this one yet."""

    def observe(self, raw: bytes | None, looked_for_s: float) -> bool:
        """Takes in the latest heartbeat (None: none so far) after ``looked_for_s`` of looking.

        Returns whether the peer made progress, saw progress, or left since the heartbeat before.
        """
        heartbeat = None if raw is None else decode_heartbeat(raw)
        fresh = heartbeat is not None and (
            self.heartbeat is None or heartbeat.sequence != self.heartbeat.sequence
        )
        moved = (
            fresh
            and heartbeat is not None
            and (self.heartbeat is None or _steps(heartbeat) != _steps(self.heartbeat))
        )
        self.silent_s = 0.0 if fresh else self.silent_s + looked_for_s
        self.heard += fresh
        if fresh:
            self.witnessed_s = SILENT_AFTER_S  # what was said of an earlier silence says nothing of the next
        self.idle_s = 0.0 if moved else self.idle_s + looked_for_s
        self.heartbeat = heartbeat if fresh else self.heartbeat
        return moved

    @property
    def is_suspect(self) -> bool:
        """Whether it is silent, and its process cannot be seen from here: other ranks may see it."""
        return (
            self.heartbeat is not None
            and self.is_silent_for(SUSPECT_AFTER_S)
            and not is_watchable(self.heartbeat.process)
        )

    def hear(self, raw: bytes | None, looked_for_s: float) -> None:
        """Takes in what the last witness said of it (None: nobody so far) after ``looked_for_s`` of looking."""
        witness = None if raw is None else decode_witness(raw)
        self.witnessed_s = 0.0 if witness != self.witness else self.witnessed_s + looked_for_s
        self.witness = witness

    @property
    def _seen(self) -> bool:
        """Whether a rank that is not silent itself sees its process."""
        return self.stopped or (self.witness is not None and self.witnessed_s < SILENT_AFTER_S)

    @property
    def closed(self) -> bool:
        return self.heartbeat is not None and self.heartbeat.closed

    def is_silent_for(self, seconds: float) -> bool:
        """Whether it was heard of, and sent no heartbeat for more than `seconds`. A process that lives, and works or
        waits, sends one each second: so this one is stopped, or starved."""
        return self.heartbeat is not None and not self.closed and self.silent_s > seconds

    @property
    def may_still_leave(self) -> bool:
        """Whether its process lives, is not stopped, and has not left."""
        if self.heartbeat is None or self.closed or self.death() is not None:
            return False
        return not self._is_stopped(self.heartbeat.process)

    def _is_stopped(self, process: ProcessIdentity) -> bool:
        told = self._seen and self.witness is not None and self.witness.stopped
        return self.stopped or told or is_stopped(process)

    def death(self) -> str | None:
        """How the peer died, in words; None while it may live, or left in good order.

        On one machine the pid decides, of this rank or of a witness: a stopped or starved process is silent, but not
        dead."""
        if self.heartbeat is None:
            return None if self.expected is None else how_ended(self.expected.process)
        if self.heartbeat.closed:
            return None
        ended = how_ended(self.heartbeat.process)
        told_by_silence = not self._seen and not is_watchable(self.heartbeat.process)
        if ended is None and told_by_silence and self.silent_s >= SILENT_AFTER_S:
            return (
                f"no sign of life for {self.silent_s:.0f} s, and no other rank sees its process: it is stopped or "
                "gone, or its machine or network is"
            )
        return ended

    def describe(self) -> str:
        """Which rank it is, where it runs, and how far it was when last heard of."""
        if self.heartbeat is None:
            if self.expected is None:
                return f"rank {self.rank} (never heard of: it has not started, or not made this call)"
            process, calls = self.expected.process, self.expected.calls
            made = f": it has made {calls} before, and all ranks must make the same calls" if calls else ""
            return f"rank {self.rank} (host {process.host}, pid {process.pid}, never heard of in this call{made})"
        process = self.heartbeat.process
        stopped = "; the process is stopped" if self._is_stopped(process) else ""
        waiting = f", waiting for {self.heartbeat.waiting_for}" if self.heartbeat.waiting_for else ""
        counters = "".join(f", {name}={value:g}" for name, value in sorted(self.heartbeat.counters.items()))
        return (
            f"rank {self.rank} (host {process.host}, pid {process.pid}, {place(self.heartbeat.stage)}; "
            f"last progress {self.idle_s:.0f} s ago{waiting}{counters}{stopped})"
        )


def described(watches: Sequence[PeerWatch]) -> str:
    """What is known of some ranks, in words; those after the first `NAMED_AT_MOST` are counted."""
    shown = [watch.describe() for watch in watches[:NAMED_AT_MOST]]
    more = f"; and {len(watches) - NAMED_AT_MOST} more" if len(watches) > NAMED_AT_MOST else ""
    return "; ".join(shown) + more


def place(stage: str) -> str:
    """Where a rank is, in words, for messages."""
    return f"in stage '{stage}'" if stage else "between stages"


def _steps(heartbeat: Heartbeat) -> tuple[int, int, bool]:
    return heartbeat.progress, heartbeat.moved, heartbeat.closed
