"""Counts what a rank fetches, and reports it to the other ranks while it does."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ...distributed.channel import Channel
from ..errors import StalledError
from ..stores.base import OnBytes
from ..workers import Stop


class OnProgress(NamedTuple):
    """What to call as the work on one object goes on. The first two raise once the work is to end."""

    arrived: OnBytes
    """With the bytes that were just fetched."""
    unpacked: OnBytes
    """With the bytes that were just unpacked or compared."""
    comes_whole: OnBytes
    """With the object's size, once it is known not to come in parts."""


@dataclass(frozen=True, slots=True)
class FetchedAgain:
    """Bytes of one file that were fetched a second time, because they did not match their checksum."""

    name: str
    """Path or URI, without secrets."""
    nbytes: int
    why: str
    """What did not match: both sums, or what was wrong."""


class Tally:
    """Counts bytes per file: worker threads add, the thread that watches them reads."""

    def __init__(self, before: Mapping[str, float]) -> None:
        """`before` are this rank's counters so far, which are added to."""
        self._before_done = int(before.get("bytes_done", 0))
        self._before_total = int(before.get("bytes_total", 0))
        self._done: dict[str, int] = {}
        self._total: dict[str, int] = {}
        self.moved = 0
        """Grows whenever anything moves, unpacking included."""

    def expect(self, name: str, size: int | None) -> None:
        """Counts `size` bytes as still to come for `name`."""
        self._done[name], self._total[name] = 0, size or 0

    def of(self, name: str, stop: Stop) -> OnProgress:
        """What to call as the work on `name` goes on; raises once `stop` is set."""

        def arrived(n_bytes: int) -> None:
            stop.check()
            if n_bytes:
                self._done[name] = self._done.get(name, 0) + n_bytes
                self.moved += 1

        def unpacked(n_bytes: int) -> None:
            stop.check()
            self.moved += 1

        def comes_whole(n_bytes: int) -> None:
            self._total[name] = n_bytes

        return OnProgress(arrived, unpacked, comes_whole)

    def settle(self, name: str, size: int, fetched: int) -> None:
        """Ends the count of `name`, which is here: `size` bytes are done; none where nothing was fetched for it."""
        self.moved += 1
        if self._done.get(name) or fetched:
            self._done[name] = self._total[name] = max(size, fetched)
        elif name in self._total:
            self._total[name] = 0

    def counters(self) -> dict[str, float]:
        """This rank's ``bytes_done`` and ``bytes_total``, for the channel; {} while nothing has to be fetched."""
        done = self._before_done + sum(self._done.values())
        total = self._before_total + sum(self._total.values())
        return {"bytes_done": done, "bytes_total": max(done, total)} if total or done else {}

    def unfinished(self) -> str:
        """The files that are being fetched and how far they are, for messages; "" where none is."""
        names = [name for name, total in self._total.items() if self._done[name] < total or not total]
        shown = [f"{os.path.basename(name)} at byte {self._done[name]}" for name in names[:4]]
        return ", ".join(shown)


class FetchWatch:
    """Reports a `Tally` to the channel while files are fetched, and ends the fetch when nothing moves any more."""

    def __init__(self, channel: Channel, tally: Tally) -> None:
        self.tally = tally
        self._channel = channel
        self._seen = -1
        self._since = time.monotonic()

    def tick(self) -> None:
        """To be called several times a second. Raises another rank's failure, or `StalledError`."""
        now = time.monotonic()
        if self.tally.moved != self._seen:
            self._seen, self._since = self.tally.moved, now
        elif now - self._since > self._channel.stall_timeout_s:
            where = self.tally.unfinished() or self._channel.waiting_for or "waiting for the store"
            raise StalledError(
                f"nothing has arrived for {now - self._since:.0f} s: {where}",
                rank=self._channel.rank,
                host=self._channel.host,
            )
        # Called whether or not anything moved, since it raises another rank's failure; stalls are found above.
        self._channel.progress(**self.tally.counters())
