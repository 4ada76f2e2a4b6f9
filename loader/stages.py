"""Times the stages of one load, each a line in the receipt: what fails in one on any rank fails on all.

A stage ends in an agreement of all ranks where others need what it did; elsewhere its failure is only announced, and
ends all ranks at the next agreement.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..distributed.channel import Channel
from ..distributed.printable import package_logger
from .plurals import counted
from .workers import check_stopped

_logger = package_logger()


@dataclass
class Timing:
    """What one stage took on this rank."""

    stage: str
    seconds: float = 0.0
    """0 until it has ended."""
    bytes: int = 0
    """What this rank read or fetched in it."""
    begin_s: float = 0.0
    """When it began, in seconds since 1970, by this machine's clock."""


class Stages:
    """Runs a load's stages over `channel`; `timings` keeps what each took on this rank, in the order they ended."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.timings: list[Timing] = []
        self._current = Timing("start")

    @contextmanager
    def stage(self, name: str) -> Iterator[Timing]:
        """A timed block that all ranks leave together, or all with the same error (see `Channel.stage`).

        Every rank must enter. The wait for the others at its end is not counted: the seconds show who was slow.
        """
        with self.channel.stage(name), self.timed(name) as timing:
            yield timing

    @contextmanager
    def announced(self, name: str) -> Iterator[Timing]:
        """A timed block that all ranks enter and leave each by itself; a failure in it is all ranks', by the next
        agreement (see `Channel.announced`)."""
        with self.channel.announced(name), self.timed(name) as timing:
            yield timing

    @contextmanager
    def timed(self, name: str) -> Iterator[Timing]:
        """A timed block without an agreement of its own; `count` adds to it until it ends."""
        outer, timing = self._current, Timing(name, begin_s=time.time())
        self._current = timing
        begin = time.monotonic()
        try:
            yield timing
        finally:
            self._current = outer
            self._ended(timing, begin)

    @contextmanager
    def timed_in_thread(self, name: str) -> Iterator[Timing]:
        """A timed block in another thread; `count` keeps adding to the stage under way in this load's own thread."""
        timing = Timing(name, begin_s=time.time())
        begin = time.monotonic()
        try:
            yield timing
        finally:
            self._ended(timing, begin)

    def _ended(self, timing: Timing, begin: float) -> None:
        timing.seconds = time.monotonic() - begin
        self.timings.append(timing)
        _logger.debug("stage %s: %.3f s, %s", timing.stage, timing.seconds, counted(timing.bytes, "byte"))

    def count(self, nbytes: int) -> None:
        """Adds `nbytes`, just read, to the current stage, and counts as this rank's progress.

        With 0 the rank only waits: no progress. Either raises the failure of another rank (see `Channel.progress`).
        """
        if not nbytes:
            self.channel.check()
            return
        self._current.bytes += nbytes
        self.channel.progress()

    def heard(self, nbytes: int, waiting_for: str) -> None:
        """For a store that waits for an answer (`stores.base.Heard`): progress where something came, but no bytes of a
        stage. Any thread may call it. Raises as `Channel.heard`, and `Stopped` where its thread's work is given up."""
        check_stopped()
        self.channel.heard(nbytes, waiting_for)
