"""Decides whether a failed read of a range is tried again, and after how long.

1. A source raises `TryAgainError` for a failure that another attempt may fix. Which failures those are is said in
   ``http.answers.status_error`` and ``http.exchange.network_error``, and for other sources in `fsspec` and `peer`.
2. `engine.read_ranges` catches it and calls `Retries.pause_s`.
3. That raises the failure's own error, which ends `read_ranges`, after `ATTEMPTS` failures in a row without a byte,
   or where the budget that all reads share is used up.
4. Otherwise the read goes on where it stopped, after a random pause ("full jitter": between 0 and a bound that
   doubles with each attempt) plus what the server's ``Retry-After`` asked for.

Not decided here: downloads of whole objects (``stores.http`` and ``stores.given`` count their own attempts), and what
to do where a source cannot be opened (``fetch.remote_files``).
"""

from __future__ import annotations

import random
import threading

from ..store_errors import TryAgainError

ATTEMPTS = 6
"""How many attempts a read has in a row, without a single byte between them."""
BACKOFF_S = 0.25
"""The longest pause before the second attempt; doubled with each."""
MAX_BACKOFF_S = 8.0
"""The longest pause before any attempt, ``Retry-After`` left out."""
BUDGET = 24
"""How many retries all reads have together, plus one for every two chunks."""


class Retries:
    """The retries of one call of `engine.read_ranges`, which reads `n_chunks`. Threads may share it."""

    def __init__(self, n_chunks: int) -> None:
        self._left = BUDGET + n_chunks // 2
        self._lock = threading.Lock()
        self.used = 0
        """How many there were so far."""

    def pause_s(self, error: TryAgainError, attempt: int) -> float:
        """Seconds to wait before the next attempt, where `attempt` in a row have failed without a byte.

        Raises the failure's own error (`TryAgainError.error`) where there is to be no other.
        """
        with self._lock:
            if attempt >= ATTEMPTS or self._left <= 0:
                raise error.error from None
            self._left -= 1
            self.used += 1
        jitter = random.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** (attempt - 1)))  # noqa: S311
        return jitter + (error.after_s or 0.0)
