"""Reaches one agreement: every rank posts its part, rank 0 combines the parts, and one outcome is settled for all.

A rank other than 0 posts once, then polls the agreement's decision key, every millisecond at first and every 50 in the
end (`POLL_S`). Rank 0 removes the keys of an agreement when all ranks have posted for the next one: by then every rank
has read them. While a rank waits, it raises an error for a peer that left the channel, and for a stall.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from .errors import PeerError, RankloadError, StalledError, from_record
from .heartbeat import SILENT_AFTER_S, described
from .key_value import KeyValue
from .printable import package_logger
from .store_thread import AGREED, HEARTBEAT_S, StoreThread, decision_key

T = TypeVar("T")
Combine = Callable[[Sequence[bytes]], bytes | list[bytes]]
"""What rank 0 makes of all parts: one result for all ranks, or a list with one for each rank."""
POLL_S = (0.001, 0.05)
"""The shortest and the longest pause between two polls."""
PATIENCE = 0.1
"""A rank that has waited for t seconds pauses for ``PATIENCE * t``: it notices the outcome at most that much late."""
LONG_WAIT_S = 10.0
"""A wait of so long is logged, and again each time that it has doubled: as a warning where a rank has not even come."""

_logger = package_logger()


class Agreement:
    """This rank's part in the agreements of one channel. What is raised here, the channel announces to all ranks."""

    def __init__(self, store_thread: StoreThread, rank: int, world_size: int, stall_timeout_s: float) -> None:
        self._store_thread = store_thread
        self._rank = rank
        self._world_size = world_size
        self._stall_timeout_s = stall_timeout_s
        self._dealt: set[int] = set()
        """On rank 0: indexes of agreements with a result for each rank."""

    def reach(self, name: str, part: bytes, combine: Combine | None) -> bytes:
        """Takes part in the next agreement. Every rank must call, with the same ``name``.

        Returns what ``combine`` made of all parts on rank 0, for all ranks or for this one; b"" where it is None.

        Raises:
            RankloadError: the error that was settled; on rank 0 also that a rank is in an agreement of another name.
            PeerError: a rank that this one waits for has left the channel.
            StalledError: nothing moved anywhere for ``stall_timeout_s``.
        """
        index = self._store_thread.index
        self._store_thread.move()
        post = name.encode() + b"\0" + part
        # What comes of it shows when this rank looks for the outcome, which the same thread does after it.
        self._store_thread.call_later(lambda key_value: key_value.put(_post_key(index, self._rank), post))
        result = self._lead(index, name, combine) if self._rank == 0 else self._follow(index, name, combine)
        self._store_thread.index = index + 1
        self._store_thread.move()
        if index == 0:
            self._store_thread.look_now()  # All have arrived, so the heartbeat of every watched rank is there.
        return result

    def spent_keys(self, index: int) -> list[str]:
        """The keys of agreement ``index`` in the store: no rank reads them once all have posted for the next one."""
        own = [_result_key(index, rank) for rank in range(self._world_size)] if index in self._dealt else []
        return [decision_key(index), _result_key(index), *own, *self._post_keys(index)]

    def _lead(self, index: int, name: str, combine: Combine | None) -> bytes:
        keys = self._post_keys(index)

        def posts(key_value: KeyValue, outcome: str | None) -> list[bytes] | None:
            return key_value.all_there(keys) if outcome is None else None

        parts = _matching(name, self._await(index, name, posts))
        made = None if combine is None else combine(parts)

        def conclude(key_value: KeyValue) -> str | None:
            if self._store_thread.unheard():
                return None
            if made is not None:
                self._hand_out(key_value, index, made)
            return key_value.settle(decision_key(index), AGREED)

        self._accept(self._concluded(name, conclude))
        if index > 0:
            # No rank waits for the removal.
            self._store_thread.call_later(lambda key_value: key_value.forget(self.spent_keys(index - 1)))
        return made[0] if isinstance(made, list) else made or b""

    def _concluded(self, name: str, conclude: Callable[[KeyValue], str | None]) -> str:
        """The outcome, once every peer was heard of since this rank woke: those that had waited may have given up."""
        begin = time.monotonic()
        while (outcome := self._store_thread.call(conclude)) is None:
            if self._store_thread.announced is not None:
                raise self._store_thread.announced
            unheard = self._store_thread.unheard()
            if time.monotonic() - begin > SILENT_AFTER_S or any(watch.closed for watch in unheard):
                raise StalledError(
                    f"this rank's process was stopped in {name}, and has heard nothing since it woke of "
                    f"{self._described([watch.rank for watch in unheard])}: the others have given up waiting",
                    rank=self._rank,
                )
            time.sleep(POLL_S[1])
        return outcome

    def _hand_out(self, key_value: KeyValue, index: int, made: bytes | list[bytes]) -> None:
        if not isinstance(made, list):
            key_value.put(_result_key(index), made)
            return
        self._dealt.add(index)
        for rank, own in enumerate(made[1:], start=1):
            key_value.put(_result_key(index, rank), own)

    def _follow(self, index: int, name: str, combine: Combine | None) -> bytes:
        def result(key_value: KeyValue, outcome: str | None) -> bytes | None:
            if outcome is None:
                return None
            if combine is None:
                return b""
            common = key_value.peek(_result_key(index))
            return common if common is not None else key_value.peek(_result_key(index, self._rank)) or b""

        # Rank 0 cannot have combined yet what this rank has just posted.
        time.sleep(POLL_S[0])
        return self._await(index, name, result)

    def _await(self, index: int, name: str, find: Callable[[KeyValue, str | None], T | None]) -> T:
        """Polls until `find` returns a value, and returns it. `find` gets the outcome: `AGREED`, or None so far.

        Raises the error that was settled instead, and what `_check_peers` raises."""

        def look(key_value: KeyValue) -> tuple[str | None, T | None]:
            outcome = key_value.settled(decision_key(index))
            return outcome, find(key_value, outcome) if outcome in (None, AGREED) else None

        # Rank 0's server answers the polls of all ranks: the more ranks, the fewer polls of each.
        shortest, longest = max(POLL_S[0], 2e-6 * self._world_size), max(POLL_S[1], 5e-5 * self._world_size)
        begin, told_after_s = time.monotonic(), LONG_WAIT_S
        while True:
            outcome, found = self._store_thread.call(look)
            if outcome is not None:
                self._accept(outcome)
            if found is not None:
                return found
            self._check_peers(index, name)
            waited = time.monotonic() - begin
            if waited > told_after_s:
                told_after_s *= 2
                missing = self._missing(index)
                watches = self._store_thread.watches
                # A heartbeat of whoever has come was seen by then.
                never_came = waited > 2 * HEARTBEAT_S and any(
                    watches[peer].heartbeat is None for peer in missing if peer in watches
                )
                _logger.log(
                    logging.WARNING if never_came else logging.INFO,
                    "rank %d has waited for %.0f s in %s for %s",
                    self._rank,
                    waited,
                    name,
                    self._described(missing),
                )
            time.sleep(min(max(PATIENCE * waited, shortest), longest))

    def _accept(self, outcome: str) -> None:
        if outcome != AGREED:
            self._store_thread.announced = self._store_thread.announced or from_record(outcome)
        if self._store_thread.announced is not None and outcome != AGREED:
            raise self._store_thread.announced

    def _check_peers(self, index: int, name: str) -> None:
        watches = self._store_thread.watches
        left = [watch for watch in watches.values() if watch.closed]
        still = self._store_thread.still_s
        # Rank 0 can name the ranks that are missing, so its error is the better one: others let it come first.
        stalled = still > self._stall_timeout_s + (0 if self._rank == 0 else 3 * HEARTBEAT_S)
        if not left and not stalled:
            return
        missing = self._missing(index)
        for watch in left:
            if watch.rank in missing and watch.heartbeat is not None:
                raise PeerError(
                    f"rank {watch.rank} left the load while others wait for it in {name}: all ranks must "
                    "make the same calls",
                    rank=watch.rank,
                    host=watch.heartbeat.process.host,
                )
        if stalled and missing:
            heartbeat = watches[missing[0]].heartbeat
            raise StalledError(
                f"no progress for {still:.0f} s in {name} (stall_timeout_s={self._stall_timeout_s:g}); "
                f"waiting for {self._described(missing)}",
                rank=missing[0],
                host=None if heartbeat is None else heartbeat.process.host,
            )

    def _described(self, missing: Sequence[int]) -> str:
        """What is known of the ranks that this one waits for."""
        return described([self._store_thread.watches[peer] for peer in missing])

    def _missing(self, index: int) -> list[int]:
        """The ranks that this one waits for: on rank 0 those that have not posted, elsewhere rank 0."""
        if self._rank != 0:
            return [0]
        keys = self._post_keys(index)
        return self._store_thread.call(
            lambda key_value: [rank for rank, key in enumerate(keys) if not key_value.has_all([key])]
        )

    def _post_keys(self, index: int) -> list[str]:
        return [_post_key(index, rank) for rank in range(self._world_size)]


def join_json(parts: Sequence[bytes]) -> bytes:
    """JSON texts as one JSON list, for `Agreement.reach`."""
    return b"[" + b",".join(parts) + b"]"


def join_bytes(parts: Sequence[bytes]) -> bytes:
    """Byte strings as one, for `Agreement.reach`; `split_bytes` takes it apart again."""
    return json.dumps([len(part) for part in parts]).encode() + b"\0" + b"".join(parts)


def split_bytes(joined: bytes) -> list[bytes]:
    """What `join_bytes` joined."""
    head, _, body = joined.partition(b"\0")
    parts, start = [], 0
    for length in json.loads(head):
        parts.append(body[start : start + length])
        start += length
    return parts


def _matching(name: str, posts: Sequence[bytes]) -> list[bytes]:
    parts = []
    for rank, post in enumerate(posts):
        theirs, _, part = post.partition(b"\0")
        if theirs.decode() != name:
            raise RankloadError(
                f"the ranks are in different places: rank 0 in {name}, rank {rank} in {theirs.decode()}; "
                "all ranks must make the same calls, in the same order"
            )
        parts.append(part)
    return parts


def _post_key(index: int, rank: int) -> str:
    return f"{index}/post/{rank}"


def _result_key(index: int, rank: int | None = None) -> str:
    """The key of the result for all ranks, or for ``rank`` alone."""
    return f"{index}/result" if rank is None else f"{index}/result/{rank}"
