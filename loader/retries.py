"""Decides whether what failed is tried again, and after how long: for reads of ranges and for whole objects.

1. `TryAgainError` is raised for a failure that another attempt may mend. Which failures those are is said in
   ``http.answers.status_error`` and ``http.exchange.network_error``; of other backends in ``ranges.fsspec``,
   ``ranges.peer`` and ``stores.given``.
2. It is caught in two places. ``ranges.engine`` asks `Retries.pause_s`, and goes on where the read stopped. Stores that
   transfer a whole object (``stores.http``, ``stores.given``) do so in `whole_attempts`, which begins it anew.
3. `Retries.pause_s` raises the failure's own error, which ends the work, after `READ_ATTEMPTS` or `WHOLE_ATTEMPTS` in a
   row that brought nothing, or where the budget that all reads of a call share is used up.
4. Otherwise there is a random pause ("full jitter": between 0 and a bound that doubles with each attempt), plus what
   the server's ``Retry-After`` asked for. `pause` waits so long.

Not decided here: what is done where a source of ranges cannot be opened (``fetch.remote_files``). Other backends of
fsspec try again as they are configured.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from .errors import RankloadError

READ_ATTEMPTS = 6
"""How many attempts a read of a range has in a row, without a single byte between them."""
READ_BUDGET = 24
"""How many retries all reads of a call have together, plus one for every two chunks."""
WHOLE_ATTEMPTS = 3
"""How many attempts a request for a whole object has."""
BACKOFF_S = 0.25
"""The longest pause before the second attempt; doubled with each."""
MAX_BACKOFF_S = 8.0
"""The longest pause before any attempt, ``Retry-After`` left out."""
PAUSE_STEP_S = 0.05
"""How often a pause is interrupted, to see whether the work is given up."""

_logger = logging.getLogger("rankload")
_CHANCE = random.SystemRandom()
"""Not the global generator: a load leaves the job's random numbers as they are, however often it tries again."""

T = TypeVar("T")


class TryAgainError(Exception):
    """A failure that another attempt may mend; `error` is what to raise once there is none left."""

    def __init__(
        self, error: RankloadError, *, after_s: float | None = None, throttled: bool = False
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.after_s = after_s
        """How long the server asks to be left alone."""
        self.throttled = throttled
        """Whether the server has too much to do: fewer connections may help."""


class Retries:
    """The retries of one piece of work, whose threads may share it: `attempts` in a row, `budget` in all."""

    def __init__(self, attempts: int, budget: float = float("inf")) -> None:
        self._attempts = attempts
        self._left = budget
        self._lock = threading.Lock()
        self.used = 0
        """How many there were so far."""

    def pause_s(self, error: TryAgainError, attempt: int) -> float:
        """Seconds to wait before the next attempt, where `attempt` in a row have failed without a byte.

        Raises the failure's own error (`TryAgainError.error`) where there is to be no other.
        """
        with self._lock:
            if attempt >= self._attempts or self._left <= 0:
                raise error.error from error.error.__cause__
            self._left -= 1
            self.used += 1
        jitter = _CHANCE.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** (attempt - 1)))
        pause_s = jitter + (error.after_s or 0.0)
        _logger.info(
            "attempt %d of %d failed, the next one in %.1f s: %s",
            attempt,
            self._attempts,
            pause_s,
            error.error.message,
        )
        return pause_s


def read_retries(n_chunks: int) -> Retries:
    """The retries of one call of ``ranges.engine.read_ranges``, which reads `n_chunks`."""
    return Retries(READ_ATTEMPTS, READ_BUDGET + n_chunks // 2)


def whole_attempts(work: Callable[[], T], idle: Callable[[], None] = lambda: None) -> T:
    """What `work` returns, in up to `WHOLE_ATTEMPTS` attempts, as long as it raises `TryAgainError`.

    `idle` is called during pauses. Raises what it raises, what else `work` raises, and the last failure's own error.
    """
    retries = Retries(WHOLE_ATTEMPTS)
    attempt = 0
    while True:
        attempt += 1
        try:
            return work()
        except TryAgainError as error:
            pause_s = retries.pause_s(error, attempt)
        pause(pause_s, idle)


def pause(seconds: float, idle: Callable[[], None]) -> None:
    """Waits, calling `idle` meanwhile, which ends it by raising."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        idle()
        time.sleep(min(left, PAUSE_STEP_S))
