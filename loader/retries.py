"""Decides for how long what failed is tried again: the one policy for every store, and for what other ranks hand out.

1. `TryAgainError` is raised for a failure that another attempt may mend. Which failures those are is said in
   ``http.answers.status_error`` and ``http.exchange.network_error``, of other backends in ``store_errors.outage_in``.
2. It is caught in two places. ``ranges.engine`` goes on where a read stopped; everything else, whole objects, sizes,
   listings and writes, is begun anew in `until_done`. Both ask `Attempts.failed`.
3. `Outages.patience_s`: a server that has answered before is tried for as long as ``stall_timeout_s`` allows without
   progress; one that has never answered for `FIRST_ANSWER_S`. Then the failure's own error ends the work, and where
   that goes on without (with no manifest, say), the next failure is not waited for again until something succeeds.
4. Until then there is a random pause before each attempt ("full jitter": between 0 and a bound that doubles), plus what
   the server's ``Retry-After`` asked for. Meanwhile the caller tells the other ranks that this one lives.
   Answers that keep ending at the same byte are given up after `SAME_END` of them: no further one would go on.
   What a call can do without is waited for no longer than `waiting_at_most` says.
5. `Outages` keeps how long the call waited, for its receipt, and logs a wait from `TOLD_AFTER_S` on.

One `Outages` belongs to one call (a load, a save, a search) on one rank; its stores and range sources share it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from ..distributed.printable import package_logger
from .errors import RankloadError

DEFAULT_STALL_TIMEOUT_S = 120.0
FIRST_ANSWER_S = 10.0
"""For how long a server is tried that has never answered."""
BACKOFF_S = 0.25
"""The longest pause before the second attempt; doubled with each."""
MAX_BACKOFF_S = 8.0
"""The longest pause before any attempt, ``Retry-After`` left out."""
LAST_ATTEMPT_S = 0.5
"""How long before patience ends the last attempt is made, at the latest."""
TOLD_AFTER_S = 5.0
"""A wait of so long is logged, and again each time that it has doubled."""
PAUSE_STEP_S = 0.05
"""How often a pause is interrupted, to see whether the work is given up."""
QUIET_S = 1.0
"""A silence of so long counts as a wait."""
LEAST_SILENCE_S = 2.0
SAME_END = 6
"""So many answers in a row that end at the same byte show that the object is cut short, and is no outage: about four
seconds, with the pauses between them."""

_logger = package_logger()
_CHANCE = random.SystemRandom()
"""Not the global generator: a load leaves the job's random numbers as they are, however often it tries again."""

T = TypeVar("T")
_until: ContextVar[float | None] = ContextVar("rankload_waiting_until", default=None)
"""When the block of `waiting_at_most` that this thread is in has waited for as long as it may."""


@contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """A block in which this thread waits for failures and silences no longer than `seconds`, all of them together."""
    entered = _until.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _until.reset(entered)


def _may_wait_s() -> float:
    until = _until.get()
    return float("inf") if until is None else max(0.0, until - time.monotonic())


class TryAgainError(Exception):
    """A failure that another attempt may mend; `error` is what to raise once patience ends."""

    def __init__(
        self,
        error: RankloadError,
        *,
        origin: Hashable = None,
        is_there: bool = True,
        lasting: bool = False,
        after_s: float | None = None,
        throttled: bool = False,
        ends_at: int | None = None,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.origin = origin
        """Whose failure it is, as `Outages.answered` names it; None where that does not matter."""
        self.is_there = is_there
        """Whether the failure itself shows that the server is there: it answered, or broke off what it had accepted."""
        self.lasting = lasting
        """Whether it stays so where the server never answered: a name that does not resolve."""
        self.after_s = after_s
        """How long the server asks to be left alone."""
        self.throttled = throttled
        """Whether the server has too much to do: fewer connections may help."""
        self.ends_at = ends_at
        """At which byte of the object an answer ended that should have gone on."""


@dataclass(frozen=True)
class Wait:
    """A time in which a rank waited for a store, or for another rank's node, and nothing came."""

    begin_s: float
    """In seconds since 1970, by this machine's clock."""
    seconds: float
    why: str
    """The failure, without secrets."""


class Outages:
    """What one call knows of its servers: which have answered, for how long it waits, and how long it waited.

    `who` is this rank, for logs. Threads may share it.
    """

    def __init__(
        self,
        stall_timeout_s: float | None = None,
        *,
        who: str = "this process",
    ) -> None:
        self.stall_timeout_s = DEFAULT_STALL_TIMEOUT_S if stall_timeout_s is None else stall_timeout_s
        self._who = who
        self._known: set[Hashable] = set()
        self._epoch_s = time.time() - time.monotonic()
        self._lock = threading.Lock()
        self._open: dict[Attempts, tuple[float, str]] = {}
        self._closed: list[Wait] = []
        self._logged_s: dict[Attempts, float] = {}
        self._failing_since: float | None = None
        """When the first of the failures began between which nothing has succeeded."""
        self._succeeded_at = float("-inf")
        self.retries = 0
        """How many attempts there were after a failure."""

    def answered(self, origin: Hashable) -> None:
        """Says that the server `origin` has answered, to this rank or to another one of the job."""
        self._known.add(origin)

    def patience_s(self, error: TryAgainError) -> float:
        """How many seconds without progress `error` is worth, all its attempts together."""
        if error.is_there or error.origin in self._known:
            return self.stall_timeout_s
        return 0.0 if error.lasting else min(FIRST_ANSWER_S, self.stall_timeout_s)

    def silence_s(self, usual_s: float) -> float:
        """After how long a silence a request is given up, where it is `usual_s` usually.

        A moment after the call has stalled: then the stall is what is raised, where somebody watches for it.
        """
        # A request needs some time, however little is left.
        return min(usual_s, self.stall_timeout_s + 3.0, max(_may_wait_s(), LEAST_SILENCE_S))

    def waits(self) -> tuple[Wait, ...]:
        """The waits so far, in the order in which they ended; those of several threads may overlap."""
        now = time.monotonic()
        with self._lock:
            return (*self._closed, *(self._wait(*begun, now) for begun in self._open.values()))

    def _succeeded(self) -> None:
        self._failing_since, self._succeeded_at = None, time.monotonic()

    def _still_s(self, began: float) -> float:
        """For how long nothing has succeeded, where the attempt at `began` is the latest that failed."""
        if self._failing_since is None:
            self._failing_since = max(began, self._succeeded_at)
        return time.monotonic() - self._failing_since

    def _began(self, attempts: Attempts, since: float, why: str) -> None:
        with self._lock:
            begin, _ = self._open.get(attempts, (since, why))
            self._open[attempts] = begin, why
        self._tell(attempts)

    def _ended(self, attempts: Attempts) -> None:
        with self._lock:
            begun = self._open.pop(attempts, None)
            logged = self._logged_s.pop(attempts, None)
            if begun is None:
                return
            wait = self._wait(*begun, time.monotonic())
            self._closed.append(wait)
        if logged is not None:
            _logger.warning("%s waited %.1f s for %s", self._who, wait.seconds, attempts.described)

    def _wait(self, begin: float, why: str, end: float) -> Wait:
        return Wait(begin + self._epoch_s, end - begin, why)

    def _tell(self, attempts: Attempts) -> None:
        """Logs the wait of `attempts`, where it is time for that."""
        with self._lock:
            begun = self._open.get(attempts)
            if begun is None:
                return
            waited = time.monotonic() - begun[0]
            if waited < self._logged_s.get(attempts, TOLD_AFTER_S):
                return
            self._logged_s[attempts] = 2 * max(waited, TOLD_AFTER_S)
        _logger.warning(
            "%s has waited %.0f s for %s, and waits on, for %g s without progress at most: %s",
            self._who,
            waited,
            attempts.described,
            attempts.patience_s,
            begun[1],
        )


class Progress:
    """When a piece of work last got on; the threads that share the work share it."""

    def __init__(self) -> None:
        self.at = time.monotonic()


class Attempts:
    """The attempts at one request, for the thread that makes them. To be closed, as a context manager does it.

    `described` is what it is for. Without a `progress` that it shares, it has its own.
    """

    def __init__(self, outages: Outages, described: str, progress: Progress | None = None) -> None:
        self.described = described
        self.patience_s = outages.stall_timeout_s
        """How long it waits without progress."""
        self._outages = outages
        self._progress = progress or Progress()
        self._moved_at = time.monotonic()
        self._in_row = 0
        self._same_end = 0
        self._ended_at: int | None = None
        self._waits = False

    def __enter__(self) -> Attempts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def moved(self) -> None:
        """Says that something new has come: patience and pauses begin anew."""
        self._moved_at = self._progress.at = time.monotonic()
        self._in_row = self._same_end = 0
        self._outages._succeeded()
        if self._waits:
            self.close()

    def quiet(self) -> None:
        """To be called while nothing comes; a silence that lasts counts as a wait, and is logged."""
        if self._waits or time.monotonic() - self._moved_at >= QUIET_S:
            self._wait("nothing comes")

    def failed(self, error: TryAgainError, idle: Callable[[], None]) -> None:
        """Waits until the next attempt is due.

        `idle` is called meanwhile: it tells the other ranks that this one lives, and ends the wait by raising.

        Raises the failure's own error (`TryAgainError.error`) where patience has ended.
        """
        outages, self._in_row = self._outages, self._in_row + 1
        self.patience_s = outages.patience_s(error)
        self._wait(error.error.message)
        self._judge_end(error)
        still_s = max(time.monotonic() - self._progress.at, outages._still_s(self._moved_at))
        left_s = min(self.patience_s - still_s, _may_wait_s())
        # So that an attempt that takes long is the last one, and not the pause before it.
        margin_s = min(LAST_ATTEMPT_S, 0.1 * self.patience_s)
        if left_s <= margin_s:
            if self._in_row > 1:
                error.error.message += f" (after {self._in_row} attempts, {still_s:.0f} s without progress)"
            raise error.error from error.error.__cause__
        jitter = _CHANCE.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** min(self._in_row - 1, 16)))
        pause_s = min(jitter + (error.after_s or 0.0), left_s - margin_s)
        _logger.info(
            "attempt %d failed, the next one in %.1f s: %s", self._in_row, pause_s, error.error.message
        )

        def step() -> None:
            idle()
            outages._tell(self)

        pause(pause_s, step)
        outages.retries += 1

    def _judge_end(self, error: TryAgainError) -> None:
        """Raises the failure's own error where the answers keep ending at one byte."""
        ended_at = error.ends_at
        self._same_end = self._same_end + 1 if ended_at is not None and ended_at == self._ended_at else 1
        self._ended_at = ended_at
        if ended_at is not None and self._same_end >= SAME_END:
            error.error.message += (
                f" ({self._same_end} answers in a row ended there: the object is cut short where it lies, or by what "
                "is between; put it there again, or load another one)"
            )
            raise error.error from error.error.__cause__

    def close(self) -> None:
        """Ends the wait, if there is one: what was waited for has come, or is given up."""
        if self._waits:
            self._waits = False
            self._outages._ended(self)

    def _wait(self, why: str) -> None:
        if not self._waits or why != "nothing comes":
            self._waits = True
            self._outages._began(self, self._moved_at, why)
        else:
            self._outages._tell(self)


def until_done(
    outages: Outages,
    described: str,
    work: Callable[[], T],
    idle: Callable[[], None],
    *,
    attempts: Attempts | None = None,
) -> T:
    """What `work` returns, which is begun anew as long as it raises `TryAgainError` and `outages` has patience.

    `described` is what it is for; `idle` is called during pauses, as for `Attempts.failed`. Work that gets on for long
    tells so by ``attempts.moved()``. Raises what `idle` raises, what else `work` raises, and the last failure's own
    error.
    """
    with attempts or Attempts(outages, described) as mine:
        while True:
            try:
                found = work()
            except TryAgainError as error:
                failure = error
            except BaseException:
                outages._succeeded()
                raise
            else:
                outages._succeeded()
                return found
            mine.failed(failure, idle)


def pause(seconds: float, idle: Callable[[], None]) -> None:
    """Waits, calling `idle` meanwhile, which ends it by raising."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        idle()
        time.sleep(min(left, PAUSE_STEP_S))


def waited_s(waits: Sequence[Wait]) -> float:
    """The seconds that `waits` cover, each second once."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted((one.begin_s, one.begin_s + one.seconds) for one in waits):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
