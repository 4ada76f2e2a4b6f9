"""Decides how many connections read at once, from the bytes a second that each number of them brings. Pure.

No setting says how fast a link is. So the number is multiplied while that pays, goes back to the best one where it
does not, and from time to time a smaller or larger number is tried again.
"""

from __future__ import annotations

import math

START = 4
"""How many there are at first."""
MOST = 32
GROWTH = 4
"""The factor from one number to the next."""
WINDOWS_S = (0.04, 0.12, 0.32, 0.48)
"""How long a number of connections is measured: judged after the first window, and where it seems to bring nothing,
again after longer ones, since distant servers are slow to start."""
STARTED_BYTES = 8 << 20
"""A connection that has brought so much is as fast as it gets: no usual link holds more in flight. More connections
that bring nothing by then are given up without longer windows."""
SETTLE_S = 0.02
"""Left out of the measurement after a change."""
WORTH = 0.4
"""More connections are kept where the rate rises by this share of what it would if each brought as much as before."""
SOME_GAIN = 1.15
"""A rate that is higher by this factor is so by more than chance."""
AS_GOOD = 0.95
"""Fewer connections are kept where they bring this share of the rate."""
HOLD_S = 2.0
"""How long the best number is kept until another is tried; doubled with each try that brought nothing."""
MAX_HOLD_S = 60.0
SPARE_S = 1.0
"""How long further throttling by a server is ignored after it was answered: several reads meet the same overload."""


class Concurrency:
    """The number of connections (`limit`), as `observe` adjusts it. Not safe between threads: callers hold a lock."""

    def __init__(self, start: int = START, most: int = MOST) -> None:
        self.most = max(1, most)
        self.limit = max(1, min(start, most))
        """How many connections there may be now."""
        self._start = self.limit
        self._kept: tuple[int, float] | None = None
        """The best number so far, and its bytes a second."""
        self._begin: tuple[float, int] | None = None
        self._arrived_bytes = 0
        self._changed_at_bytes = 0
        self._window = 0
        self._settles_until = 0.0
        self._holds_until = 0.0
        self._hold_s = HOLD_S
        self._spared_until = 0.0
        self._tries_fewer = False

    @property
    def soon(self) -> int:
        """How many connections there may be after the next change."""
        return min(self.most, self.limit * GROWTH)

    def observe(self, now: float, arrived_bytes: int) -> int:
        """The number of connections from `now` on, in seconds; `arrived_bytes` is the sum since the beginning."""
        self._arrived_bytes = arrived_bytes
        if now < self._settles_until or arrived_bytes == 0:
            return self.limit
        if self._begin is None:
            self._begin = (now, arrived_bytes)
            return self.limit
        since, before = self._begin
        if now - since < WINDOWS_S[self._window]:
            return self.limit
        rate = (arrived_bytes - before) / (now - since)
        self._begin = (now, arrived_bytes)
        if self._kept is None:
            self._keep(rate, now)
        elif self.limit > self._kept[0]:
            self._judge_more(rate, self._kept, now)
        elif self.limit < self._kept[0]:
            self._judge_fewer(rate, self._kept, now)
        else:
            self._kept = (self.limit, rate)
            if now >= self._holds_until:
                self._try_another(now)
        return self.limit

    def throttled(self, now: float) -> None:
        """Halves the connections for a while, but not below the start, since the server has too much to do."""
        if now < self._spared_until:
            return
        self._spared_until = now + SPARE_S
        self._change(max(min(self._start, self.limit), self.limit // 2), now)
        self._kept = (self.limit, 0.0)
        self._hold(now)

    def _judge_more(self, rate: float, kept: tuple[int, float], now: float) -> None:
        n_kept, kept_rate = kept
        if rate >= kept_rate * (1 + WORTH * (self.limit / n_kept - 1)):
            self._hold_s = HOLD_S
            self._keep(rate, now)
        elif self._window + 1 < len(WINDOWS_S) and not self._have_started():
            self._window += 1
        else:
            # As many as would bring this rate, if each brought as much as before.
            gain = rate / kept_rate
            if gain >= SOME_GAIN:
                n_kept = min(self.limit, math.ceil(n_kept * gain))
                self._kept = (n_kept, rate)
            self._change(n_kept, now)
            self._hold(now)

    def _judge_fewer(self, rate: float, kept: tuple[int, float], now: float) -> None:
        n_kept, kept_rate = kept
        if rate < kept_rate * AS_GOOD:
            self._change(n_kept, now)
            self._hold(now)
        elif self._window + 1 < len(WINDOWS_S):
            self._window += 1
        else:
            self._kept = (self.limit, rate)
            self._hold(now)

    def _have_started(self) -> bool:
        """Whether the present connections have brought enough to be as fast as they get."""
        return self._arrived_bytes - self._changed_at_bytes >= self.limit * STARTED_BYTES

    def _keep(self, rate: float, now: float) -> None:
        self._kept = (self.limit, rate)
        if self.limit < self.most:
            self._change(self.soon, now)
        else:
            self._hold(now)

    def _try_another(self, now: float) -> None:
        """Tries fewer and more by turns, since the link may have changed, or a judgement was wrong."""
        self._tries_fewer = not self._tries_fewer
        if self.limit > self._start and (self._tries_fewer or self.limit == self.most):
            self._change(max(self._start, self.limit // GROWTH), now)
        elif self.limit < self.most:
            self._change(self.soon, now)

    def _hold(self, now: float) -> None:
        # The longest window measures the rate of the number that is kept best.
        self._window = len(WINDOWS_S) - 1
        self._holds_until = now + self._hold_s
        self._hold_s = min(self._hold_s * 2, MAX_HOLD_S)

    def _change(self, limit: int, now: float) -> None:
        self.limit = limit
        self._changed_at_bytes = self._arrived_bytes
        self._begin = None
        self._window = 0
        self._settles_until = now + SETTLE_S
