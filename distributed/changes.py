"""Tells all ranks alike whether any of them had changed something when the channel failed, and what.

A rank settles `BEGUN` at one key of the store before its first change (`Changes.note`); a rank whose channel failed
settles `OVER` there before it leaves (`Changes.conclude`). Each is one atomic step, and the first one stands for all
ranks: after `OVER` no rank changes anything, after `BEGUN` the failure is one after a change on every rank. Then each
rank posts what it has changed. Rank 0 joins the lists, and waits `TOLD_WITHIN_S` for them at most: a rank that is
stopped posts none.

Not guaranteed where the store itself is lost: a rank that cannot ask takes it that changes had begun, if they could
have (`Changes.expect`).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from .errors import PeerError, RankloadError, from_record
from .key_value import KeyValue
from .store_thread import AGREED, StoreLostError, StoreThread, decision_key

BEGUN, OVER = "begun", "over"
"""What stands at `_FIRST`."""
TOLD_WITHIN_S = 2.0
"""How long rank 0 waits for the lists of all ranks, from when it heard of the failure: a rank notices the failure of
another within about a second."""
_LEAST_S = 1.0
"""How long it waits at least: where all were in a collective until now, they leave it together."""
_PATIENCE_S = 2.0
"""How long a failed channel waits for one answer of the store."""
_POLL_S = 0.02
_FIRST = "changes/first"
_JOINED = "changes/joined"


class Changes:
    """What this rank has changed and, once the channel has failed, what all have. `note` may be called by any thread.

    Attributes:
        begun: whether any rank had changed something; known once the channel has failed.
        by_rank: what each rank had changed by then; a rank that did not tell is not in it.
    """

    def __init__(self, store_thread: StoreThread, rank: int, world_size: int) -> None:
        self._store_thread = store_thread
        self._rank = rank
        self._world_size = world_size
        self._lock = threading.Lock()
        self._own: dict[str, None] = {}
        self._expected = False
        self._used = False
        self.begun = False
        self.by_rank: dict[int, tuple[str, ...]] = {}

    @property
    def own(self) -> tuple[str, ...]:
        """What this rank has changed so far, in that order."""
        return tuple(self._own)

    def expect(self) -> None:
        """Says that from now on any rank may begin. Every rank calls it, after the same agreement."""
        self._expected = True

    def note(self, part: str) -> None:
        """To be called before `part` is first changed. Costs something only the first time.

        Raises the failure of another rank where that came before the first change of any, and as `StoreThread.call`.
        """
        if part in self._own:
            return
        with self._lock:
            if not self._own:
                self._begin()
            self._own[part] = None

    def conclude(self, *, waits: bool = True) -> None:
        """Finds out, once the channel has failed, whether any rank has begun, and what they changed. Raises nothing.

        Without `waits` it only tells the others: for a rank that was interrupted, and ends.
        """
        self._used = True
        try:
            found = self._store_thread.call(lambda key_value: key_value.settle(_FIRST, OVER), _PATIENCE_S)
        except (StoreLostError, RankloadError):
            # Whether others have begun cannot be asked any more.
            self.begun = self._expected or bool(self._own)
            self.by_rank = {self._rank: self.own}
            return
        self.begun = found == BEGUN
        if not self.begun:
            return
        try:
            self.by_rank = self._exchanged(waits)
        except (StoreLostError, RankloadError):
            self.by_rank = {self._rank: self.own}

    def spent_keys(self) -> list[str]:
        """The keys in the store, which no rank reads once all have left."""
        posts = [_post_key(rank) for rank in range(self._world_size)] if self._used else []
        return [_FIRST, *([_JOINED] if self._used else []), *posts]

    def _begin(self) -> None:
        def settle(key_value: KeyValue) -> RankloadError | None:
            if key_value.settle(_FIRST, BEGUN) == BEGUN:
                return None
            index = self._store_thread.index
            for each in (index, index + 1):
                outcome = key_value.settled(decision_key(each))
                if outcome not in (None, AGREED):
                    return from_record(str(outcome))
            return PeerError("another rank has failed, and left the load", rank=None)

        failure = self._store_thread.call(settle)
        if failure is not None:
            raise failure

    def _exchanged(self, waits: bool) -> dict[int, tuple[str, ...]]:
        """Posts what this rank has changed, and returns what all have: rank 0's sum of it, if there is one in time."""
        call = self._store_thread.call
        mine = json.dumps(self.own).encode()
        call(lambda key_value: key_value.put(_post_key(self._rank), mine), _PATIENCE_S)
        if not waits:
            return {self._rank: self.own}
        now, heard = time.monotonic(), self._store_thread.announced_at
        least = max(now + _LEAST_S, (now if heard is None else heard) + TOLD_WITHIN_S)
        until = least if self._rank == 0 else least + TOLD_WITHIN_S
        while True:
            joined = call(lambda key_value: key_value.settled(_JOINED), _PATIENCE_S)
            if joined is not None:
                return _split(joined)
            late = time.monotonic() > until
            if self._rank == 0 or late:
                # Without rank 0, each rank joins what it finds: whoever is first, does so for all.
                posts = call(self._posts, _PATIENCE_S)
                if late or not set(range(self._world_size)) - posts.keys() - self._gone():
                    return _split(call(partial(_settle_joined, _join(posts)), _PATIENCE_S))
            time.sleep(_POLL_S)

    def _posts(self, key_value: KeyValue) -> dict[int, tuple[str, ...]]:
        ranks = range(self._world_size)
        found = key_value.peek_all([_post_key(rank) for rank in ranks])
        return {
            rank: tuple(json.loads(post)) for rank, post in zip(ranks, found, strict=True) if post is not None
        }

    def _gone(self) -> set[int]:
        """Ranks of which no list will come."""
        watches = self._store_thread.watches
        return {rank for rank, watch in watches.items() if watch.closed or watch.death() is not None}


def _join(posts: Mapping[int, Sequence[str]]) -> str:
    """JSON of what each rank changed, each list once."""
    ranks_of: dict[tuple[str, ...], list[int]] = {}
    for rank, parts in posts.items():
        ranks_of.setdefault(tuple(parts), []).append(rank)
    return json.dumps([[list(parts), ranks] for parts, ranks in ranks_of.items()])


def _split(joined: str) -> dict[int, tuple[str, ...]]:
    found: list[Any] = json.loads(joined)
    by_rank = {rank: tuple(parts) for parts, ranks in found for rank in ranks}
    return dict(sorted(by_rank.items()))


def _settle_joined(joined: str, key_value: KeyValue) -> str:
    return key_value.settle(_JOINED, joined)


def _post_key(rank: int) -> str:
    return f"changes/{rank}"
