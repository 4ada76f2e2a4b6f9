"""Signs of life: what a rank says about itself once a second, and what its watchers make of it.

Times are measured by the watcher's own monotonic clock, and only while the watcher itself was looking: a
process that slept (stopped, suspended, starved) does not take its own sleep for the silence of others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .liveness import ProcessIdentity, how_ended, is_stopped, is_watchable

SILENT_AFTER_S = 8.0
"""Seconds without a beat after which a rank that can't be watched by its pid counts as dead."""


@dataclass(frozen=True)
class Heartbeat:
    """One sign of life.

    ``progress`` counts what the rank itself did, ``moved`` (rank 0 only) what it saw anyone do. ``closed``:
    the rank has left the channel in good order and sends no further beats.
    """

    sequence: int
    process: ProcessIdentity
    stage: str = ""
    progress: int = 0
    moved: int = 0
    counters: dict[str, float] = field(default_factory=dict)
    closed: bool = False

    def encode(self) -> bytes:
        return json.dumps({**vars(self), "process": self.process.as_dict()}).encode()


def decode_heartbeat(raw: bytes) -> Heartbeat:
    """What `Heartbeat.encode` wrote."""
    fields: dict[str, Any] = json.loads(raw)
    return Heartbeat(**{**fields, "process": ProcessIdentity(**fields["process"])})


class PeerWatch:
    """What one rank knows of another."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.beat: Heartbeat | None = None
        self.silent_s = 0.0
        self.idle_s = 0.0

    def observe(self, raw: bytes | None, looked_for_s: float) -> bool:
        """Takes in the latest beat (None: still none) after ``looked_for_s`` of looking; whether anything
        moved."""
        beat = None if raw is None else decode_heartbeat(raw)
        fresh = beat is not None and (self.beat is None or beat.sequence != self.beat.sequence)
        moved = fresh and beat is not None and (self.beat is None or _steps(beat) != _steps(self.beat))
        self.silent_s = 0.0 if fresh else self.silent_s + looked_for_s
        self.idle_s = 0.0 if moved else self.idle_s + looked_for_s
        self.beat = beat if fresh else self.beat
        return moved

    @property
    def closed(self) -> bool:
        return self.beat is not None and self.beat.closed

    def death(self) -> str | None:
        """How the peer died, in words; None while it may live, has not arrived yet, or left in good order.

        On this machine the pid decides: a stopped or starved process is silent, but not dead."""
        if self.beat is None or self.beat.closed:
            return None
        ended = how_ended(self.beat.process)
        if ended is None and not is_watchable(self.beat.process) and self.silent_s >= SILENT_AFTER_S:
            return f"no sign of life for {self.silent_s:.0f} s (process, machine or network is gone)"
        return ended

    def describe(self) -> str:
        """Which rank it is, where it runs, and how far it was when last heard of."""
        if self.beat is None:
            return f"rank {self.rank} (never heard of: it has not started, or not reached this load)"
        process = self.beat.process
        stopped = "; the process is stopped" if is_stopped(process) else ""
        counters = "".join(f", {name}={value:g}" for name, value in sorted(self.beat.counters.items()))
        return (
            f"rank {self.rank} (host {process.host}, pid {process.pid}, {place(self.beat.stage)}; "
            f"last progress {self.idle_s:.0f} s ago{counters}{stopped})"
        )


def place(stage: str) -> str:
    """Where a rank is, in words."""
    return f"in stage '{stage}'" if stage else "between stages"


def _steps(beat: Heartbeat) -> tuple[int, int, bool]:
    return beat.progress, beat.moved, beat.closed
