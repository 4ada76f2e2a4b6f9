"""How often, and after how long, reads are tried again: full jitter, and a budget for all of them together."""

from __future__ import annotations

import random
import threading

from ..store_errors import TryAgainError

ATTEMPTS = 6
"""In a row, for one read, without a single byte between them."""
BACKOFF_S = 0.25
MAX_BACKOFF_S = 8.0
BUDGET = 24
"""Retries that all reads have together, beside one for each second request."""


class Retries:
    """Those that are left to one run. Safe between threads."""

    def __init__(self, n_requests: int) -> None:
        self._left = BUDGET + n_requests // 2
        self._lock = threading.Lock()
        self.used = 0

    def pause_s(self, error: TryAgainError, attempt: int) -> float:
        """Seconds to wait before attempt number `attempt` + 1. Raises the failure's own error where none is left."""
        with self._lock:
            if attempt >= ATTEMPTS or self._left <= 0:
                raise error.error from None
            self._left -= 1
            self.used += 1
        jitter = random.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** (attempt - 1)))  # noqa: S311
        return jitter + (error.after_s or 0.0)
