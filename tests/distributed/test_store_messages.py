"""How many messages to the store an agreement takes: counted, since rank 0's server answers those of all ranks."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from typing import Any

import pytest
from rankload.distributed.channel import Channel
from rankload.distributed.key_value import VALUE_BYTES, KeyValue
from torch.distributed import HashStore

WORLD, TIMES = 5, 12
OF_AGREEMENTS = re.compile(r"\d+/(post|result|decision)")


class CountedStore:
    """One rank's way to the store that all share. Counts the messages about agreements, and those that find nothing
    apart: a rank looks again and again for what is not there yet."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.told: Counter[str] = Counter()
        self.in_vain = 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._store, name)

        def counted(*arguments: Any) -> Any:
            found = function(*arguments)
            keys = arguments[0] if arguments else ()
            if not OF_AGREEMENTS.match(keys if isinstance(keys, str) else next(iter(keys), "")):
                return found
            looks = name == "check" or (name == "compare_set" and arguments[1] != "")
            if looks and found in (False, arguments[-1].encode() if name == "compare_set" else None):
                self.in_vain += 1
            else:
                self.told[name] += 1
            return found

        return counted


def agree(kind: str) -> list[Counter[str]]:
    """What `TIMES` agreements of `WORLD` ranks took, by rank, and one before them; the channel's end is not counted."""
    shared = HashStore()
    stores = [CountedStore(shared) for _ in range(WORLD)]
    counts: list[Counter[str]] = [Counter()] * WORLD

    def rank_main(rank: int) -> None:
        channel = Channel(lambda: KeyValue(stores[rank]), rank, WORLD, 60.0)
        channel.gather("first", rank)
        for _ in range(TIMES):
            if kind == "gather":
                assert channel.gather("ranks", rank) == list(range(WORLD))
            elif kind == "deal":
                assert channel.deal("ranks", rank, lambda ranks: [10 * one for one in ranks]) == 10 * rank
            else:
                told = channel.gather_bytes("bytes", bytes([rank]) * (VALUE_BYTES + 1))
                assert [one[0] for one in told] == list(range(WORLD))
        counts[rank] = Counter(stores[rank].told)
        channel.close()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert shared.num_keys() == 0
    return counts


@pytest.mark.parametrize("kind", ["gather", "deal"])
def test_an_agreement_takes_few_messages(kind: str) -> None:
    leader, *others = agree(kind)
    # A rank posts, sees that all have agreed, and reads the result.
    for one in others:
        assert sum(one.values()) <= 3 * (TIMES + 1), one
        assert one["set"] == TIMES + 1
    # Rank 0 sees that all have posted, reads all in one message, and removes what the agreement before left.
    results = WORLD - 1 if kind == "deal" else 1
    assert leader["multi_get"] == TIMES + 1, leader
    assert leader["set"] <= (1 + results) * (TIMES + 1)
    assert leader["delete_key"] <= (WORLD + results + 1) * (TIMES + 1)
    assert sum(leader.values()) <= (WORLD + 2 * results + 5) * (TIMES + 1), leader


def test_large_posts_leave_nothing() -> None:
    leader, *_ = agree("bytes")
    assert leader["delete_key"] > TIMES * 2 * WORLD


def test_a_rank_that_waits_looks_less_and_less() -> None:
    shared = HashStore()
    stores = [CountedStore(shared), CountedStore(shared)]

    def follow() -> None:
        channel = Channel(lambda: KeyValue(stores[1]), 1, 2, 60.0)
        channel.gather("first", 1)
        before.append(stores[1].in_vain)
        channel.gather("second", 1)
        channel.close()

    before: list[int] = []
    thread = threading.Thread(target=follow)
    thread.start()
    channel = Channel(lambda: KeyValue(stores[0]), 0, 2, 60.0)
    channel.gather("first", 0)
    begin = time.monotonic()
    time.sleep(2)
    looks, seconds = stores[1].in_vain - before[0], time.monotonic() - begin
    channel.gather("second", 0)
    channel.close()
    thread.join(60)
    # Once a millisecond for 10 of them, then after a tenth of the time waited, then each 50 ms; and each heartbeat.
    assert 10 < looks < 10 + 42 + 20 * seconds + seconds + 2, looks
