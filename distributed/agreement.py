"""One agreement: every rank posts its part, rank 0 combines them, and exactly one outcome is settled for all.

Per agreement, a rank other than 0 sends its post, and looks at the decision (every millisecond at first, every 50
in the end). Keys of an agreement are removed when all have posted for the next one: by then everybody has read
them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from .errors import PeerError, RankloadError, StalledError, from_record
from .key_value import KeyValue
from .store_thread import AGREED, BEAT_S, StoreThread, decision_key

T = TypeVar("T")
Combine = Callable[[Sequence[bytes]], bytes | list[bytes]]
"""What rank 0 makes of all parts: one result for all, or a list with one for each rank."""
POLL_S = (0.001, 0.05)
PATIENCE = 0.1
"""The share of what was waited so far that goes by until the next look: more of it would be lost each time."""
NAMED_AT_MOST = 8


class Agreement:
    """This rank's part in the agreements of one channel. Any exception here is for the channel to
    announce."""

    def __init__(self, courier: StoreThread, rank: int, world_size: int, stall_timeout_s: float) -> None:
        self._courier = courier
        self._rank = rank
        self._world_size = world_size
        self._stall_timeout_s = stall_timeout_s
        self._dealt: set[int] = set()
        """On rank 0: agreements with a result for each rank."""

    def reach(self, name: str, part: bytes, combine: Combine | None) -> bytes:
        """Takes part; returns what ``combine`` made of all parts on rank 0 (nothing where there is none), for all
        ranks or for this one."""
        index = self._courier.index
        self._courier.move()
        post = name.encode() + b"\0" + part
        self._courier.call(lambda mailbox: mailbox.put(_post_key(index, self._rank), post))
        result = self._lead(index, name, combine) if self._rank == 0 else self._follow(index, name, combine)
        self._courier.index = index + 1
        self._courier.move()
        if index == 0:
            self._courier.beat_now()  # All have arrived: from here on, everybody knows whom it watches.
        return result

    def spent_keys(self, index: int) -> list[str]:
        """All keys of an agreement."""
        own = [_result_key(index, rank) for rank in range(self._world_size)] if index in self._dealt else []
        return [decision_key(index), _result_key(index), *own, *self._post_keys(index)]

    def _lead(self, index: int, name: str, combine: Combine | None) -> bytes:
        keys = self._post_keys(index)

        def posts(mailbox: KeyValue, outcome: str | None) -> list[bytes | None] | None:
            return mailbox.peek_all(keys) if outcome is None and mailbox.has_all(keys) else None

        parts = _matching(name, [post or b"\0" for post in self._await(index, name, posts)])
        made = None if combine is None else combine(parts)

        def conclude(mailbox: KeyValue) -> str:
            if made is not None:
                self._hand_out(mailbox, index, made)
            return mailbox.settle(decision_key(index), AGREED)

        self._accept(self._courier.call(conclude))
        if index > 0:
            # Nobody waits for that.
            self._courier.call_later(lambda mailbox: mailbox.forget(self.spent_keys(index - 1)))
        return made[0] if isinstance(made, list) else made or b""

    def _hand_out(self, mailbox: KeyValue, index: int, made: bytes | list[bytes]) -> None:
        if not isinstance(made, list):
            mailbox.put(_result_key(index), made)
            return
        self._dealt.add(index)
        for rank, own in enumerate(made[1:], start=1):
            mailbox.put(_result_key(index, rank), own)

    def _follow(self, index: int, name: str, combine: Combine | None) -> bytes:
        def result(mailbox: KeyValue, outcome: str | None) -> bytes | None:
            if outcome is None:
                return None
            if combine is None:
                return b""
            common = mailbox.peek(_result_key(index))
            return common if common is not None else mailbox.peek(_result_key(index, self._rank)) or b""

        return self._await(index, name, result)

    def _await(self, index: int, name: str, find: Callable[[KeyValue, str | None], T | None]) -> T:
        """What `find` finds, given that the agreement is settled as agreed, or not settled (None).

        Raises the error that it was settled as."""

        def look(mailbox: KeyValue) -> tuple[str | None, T | None]:
            outcome = mailbox.settled(decision_key(index))
            return outcome, find(mailbox, outcome) if outcome in (None, AGREED) else None

        # Rank 0 alone carries the looks of all: many ranks look less often.
        shortest, longest = max(POLL_S[0], 2e-6 * self._world_size), max(POLL_S[1], 5e-5 * self._world_size)
        begin = time.monotonic()
        while True:
            outcome, found = self._courier.call(look)
            if outcome is not None:
                self._accept(outcome)
            if found is not None:
                return found
            self._check_peers(index, name)
            time.sleep(min(max(PATIENCE * (time.monotonic() - begin), shortest), longest))

    def _accept(self, outcome: str) -> None:
        if outcome != AGREED:
            self._courier.announced = self._courier.announced or from_record(outcome)
        if self._courier.announced is not None and outcome != AGREED:
            raise self._courier.announced

    def _check_peers(self, index: int, name: str) -> None:
        watches = self._courier.watches
        left = [watch for watch in watches.values() if watch.closed]
        still = self._courier.still_s
        # Rank 0 sees who is missing: its word on a stall is the better one, and gets the time to be said.
        stalled = still > self._stall_timeout_s + (0 if self._rank == 0 else 3 * BEAT_S)
        if not left and not stalled:
            return
        missing = self._missing(index)
        for watch in left:
            if watch.rank in missing and watch.beat is not None:
                raise PeerError(
                    f"rank {watch.rank} left the load while others wait for it in {name}: all ranks must "
                    "make the same calls",
                    rank=watch.rank,
                    host=watch.beat.process.host,
                )
        if stalled and missing:
            waiting = [watches[peer] for peer in missing]
            beat = waiting[0].beat
            more = f"; and {len(waiting) - NAMED_AT_MOST} more" if len(waiting) > NAMED_AT_MOST else ""
            raise StalledError(
                f"no progress for {still:.0f} s in {name} (stall_timeout_s={self._stall_timeout_s:g}); "
                f"waiting for {'; '.join(watch.describe() for watch in waiting[:NAMED_AT_MOST])}{more}",
                rank=waiting[0].rank,
                host=None if beat is None else beat.process.host,
            )

    def _missing(self, index: int) -> list[int]:
        """The ranks that this rank waits for."""
        if self._rank != 0:
            return [0]
        keys = self._post_keys(index)
        return self._courier.call(
            lambda mailbox: [rank for rank, key in enumerate(keys) if not mailbox.has_all([key])]
        )

    def _post_keys(self, index: int) -> list[str]:
        return [_post_key(index, rank) for rank in range(self._world_size)]


def join_json(parts: Sequence[bytes]) -> bytes:
    """JSON texts as one JSON list."""
    return b"[" + b",".join(parts) + b"]"


def join_bytes(parts: Sequence[bytes]) -> bytes:
    """Byte strings as one; `split_bytes` takes it apart again."""
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
    """Where the outcome for all ranks is, or for one."""
    return f"{index}/result" if rank is None else f"{index}/result/{rank}"
