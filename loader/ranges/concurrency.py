"""How many connections to keep at work, from what they bring: no setting knows the link. Pure."""

from __future__ import annotations

import math

START = 4
MOST = 32
GROWTH = 4
WINDOWS_S = (0.04, 0.12, 0.32, 0.48)
"""How long a number of connections is tried: judged after the first, and where it seems to bring nothing, again after
longer ones, since distant servers are slow to start."""
STARTED_BYTES = 8 << 20
"""What a connection has brought when it is as fast as it gets: more than what any usual link holds. More connections
that bring nothing are given up then, without longer windows."""
SETTLE_S = 0.02
"""Left out of the judgement after a change."""
WORTH = 0.4
"""The share of what more connections would bring, if each brought as much as those before, that keeps them."""
SOME_GAIN = 1.15
"""How much more than before is more than chance."""
AS_GOOD = 0.95
"""The share of the rate that fewer connections must bring to be kept."""
HOLD_S = 2.0
"""How long the best number is kept until another is tried; doubled with each try that brought nothing."""
MAX_HOLD_S = 60.0
SPARE_S = 1.0
"""After a server said that it has too much to do, for so long it is not taken to say so again."""


class Concurrency:
    """Multiplies the connections while that brings more, goes back as far as it does not, and looks again later."""

    def __init__(self, start: int = START, most: int = MOST) -> None:
        self.most = max(1, most)
        self.limit = max(1, min(start, most))
        self._start = self.limit
        self._kept: tuple[int, float] | None = None
        """The number that proved best so far, and its bytes a second."""
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
        """The number of connections from `now` on; `arrived_bytes` is the sum since the beginning."""
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
        """The server has too much to do: half as many, but not below the start, for a while."""
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
            # Some of them were worth it: as many as would bring this, each as much as those before.
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
        """Whether the connections of today have long been as fast as they get."""
        return self._arrived_bytes - self._changed_at_bytes >= self.limit * STARTED_BYTES

    def _keep(self, rate: float, now: float) -> None:
        self._kept = (self.limit, rate)
        if self.limit < self.most:
            self._change(self.soon, now)
        else:
            self._hold(now)

    def _try_another(self, now: float) -> None:
        """Fewer and more by turns: what was judged in haste, or has changed, comes right."""
        self._tries_fewer = not self._tries_fewer
        if self.limit > self._start and (self._tries_fewer or self.limit == self.most):
            self._change(max(self._start, self.limit // GROWTH), now)
        elif self.limit < self.most:
            self._change(self.soon, now)

    def _hold(self, now: float) -> None:
        # A longer window tells the held number's rate better.
        self._window = len(WINDOWS_S) - 1
        self._holds_until = now + self._hold_s
        self._hold_s = min(self._hold_s * 2, MAX_HOLD_S)

    def _change(self, limit: int, now: float) -> None:
        self.limit = limit
        self._changed_at_bytes = self._arrived_bytes
        self._begin = None
        self._window = 0
        self._settles_until = now + SETTLE_S
