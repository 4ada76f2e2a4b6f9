"""Stages of one load, timed: each is an agreement of all ranks, and a line in the receipt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..distributed.channel import Channel


@dataclass
class Lap:
    """One stage under way on this rank; `bytes` counts what it read or fetched here."""

    stage: str
    seconds: float = 0.0
    bytes: int = 0
    begin_s: float = 0.0
    """When it began, by this machine's clock."""


class Stages:
    """Runs a load's stages over a channel and keeps what each cost this rank."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.laps: list[Lap] = []
        self._current = Lap("start")

    def count(self, nbytes: int) -> None:
        """Says that `nbytes` were just read in the current stage: this rank moves. With 0 it waits, and learns of the
        failure of others."""
        if not nbytes:
            self.channel.check()
            return
        self._current.bytes += nbytes
        self.channel.progress()

    @contextmanager
    def stage(self, name: str) -> Iterator[Lap]:
        """A block that all ranks leave together, or all with the same error (see `Channel.stage`).

        The waiting for the others is not counted: the seconds tell who was slow.
        """
        with self.channel.stage(name), self.lap(name) as lap:
            yield lap

    @contextmanager
    def beside(self, name: str) -> Iterator[Lap]:
        """A timed block in another thread, beside the stage that is under way."""
        lap = Lap(name, begin_s=time.time())
        begin = time.monotonic()
        try:
            yield lap
        finally:
            lap.seconds = time.monotonic() - begin
            self.laps.append(lap)

    @contextmanager
    def lap(self, name: str) -> Iterator[Lap]:
        """A timed block without an agreement of its own."""
        outer, lap = self._current, Lap(name, begin_s=time.time())
        self._current = lap
        begin = time.monotonic()
        try:
            yield lap
        finally:
            self._current = outer
            lap.seconds = time.monotonic() - begin
            self.laps.append(lap)
