"""Which units a subset has: parts are all of them, each once; random ones are as large as asked for."""

from __future__ import annotations

import random

import pytest
from rankload.loader import OptionError
from rankload.loader.wholeness.subset import choose, parse_subset


def some_sizes(seed: int) -> list[int]:
    chance = random.Random(seed)
    return [
        chance.choice((0, 1, 7, 4096, 1 << 20, chance.randrange(1 << 34)))
        for _ in range(chance.randrange(80))
    ]


@pytest.mark.parametrize("seed", range(60))
def test_t_parts_are_all_units_each_once(seed: int) -> None:
    sizes = some_sizes(seed)
    for t in (1, 2, 3, 7, 30, len(sizes) + 5):
        parts = [choose(sizes, parse_subset(f"{n}/{t}"), seed=n) for n in range(1, t + 1)]
        assert sorted(position for part in parts for position in part) == list(range(len(sizes)))
        # Each part is as large as its share, but for the units that its ends fall into.
        largest = max(sizes, default=0)
        assert all(sum(sizes[one] for one in part) <= sum(sizes) / t + largest for part in parts)


@pytest.mark.parametrize("seed", range(60))
def test_a_random_subset_is_the_least_that_has_so_many_bytes(seed: int) -> None:
    sizes = some_sizes(seed)
    for text, wanted in (("5%", 0.05 * sum(sizes)), ("100 %", sum(sizes)), ("1MB", min(10**6, sum(sizes)))):
        chosen = choose(sizes, parse_subset(text), seed)
        assert chosen == sorted(set(chosen))
        have = sum(sizes[one] for one in chosen)
        assert have >= wanted
        assert have - max((sizes[one] for one in chosen), default=0) < max(wanted, 1)
        assert choose(sizes, parse_subset(text), seed) == chosen


def test_other_seeds_choose_other_units() -> None:
    sizes = [10] * 1000
    assert len({tuple(choose(sizes, parse_subset("5%"), seed)) for seed in range(20)}) == 20
    seen = {position for seed in range(200) for position in choose(sizes, parse_subset("5%"), seed)}
    assert len(seen) > 990


@pytest.mark.parametrize(
    "text", ["0%", "101%", "0/3", "4/3", "1/0", "", "x", "-5", "0", "3/", "5 %%", "1.5/3"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="subset"):
        parse_subset(text)


def test_what_is_asked_for() -> None:
    assert parse_subset("5%").share == 0.05
    assert parse_subset(" 2/7 ").part == (2, 7)
    assert parse_subset("10GB").nbytes == 10**10
    assert parse_subset("1.5 GiB").nbytes == 3 << 29
