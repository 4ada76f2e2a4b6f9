"""`GlobalSampler`: whatever the number of ranks at each restart, an epoch has every sample once, in one order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rankload.integrations.data import GlobalSampler, gather_loader_states
from rankload.loader import OptionError
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

WORKERS = (0, 2)
SIZES = [(2, 1), (2, 3), *([(1, 4), (3, 2), (4, 4)] if os.environ.get("TEST_ALL") else [])]
"""Before and after."""


class Ranks:
    """A job of `world_size` ranks in this process, each with its sampler and loader."""

    def __init__(self, samples: int, world_size: int, batch_size: int, workers: int = 0, **how: Any) -> None:
        self.world_size = world_size
        self.samplers = [
            GlobalSampler(samples, seed=5, rank=rank, world_size=world_size, **how)
            for rank in range(world_size)
        ]
        self.loaders = [
            DataLoader(range(samples), batch_size=batch_size, sampler=sampler, num_workers=workers)  # type: ignore[arg-type]
            for sampler in self.samplers
        ]

    def load(self, state: dict[str, Any]) -> Ranks:
        for sampler in self.samplers:
            sampler.load_state_dict(json.loads(json.dumps(state)))
        return self

    def steps(self) -> Iterator[list[int]]:
        """What is left of the epoch: the samples of each step over all ranks, in the order of the epoch."""
        loops = [sampler.batches(loader) for sampler, loader in zip(self.samplers, self.loaders, strict=True)]
        for batches in zip(*loops, strict=True):
            dealt = [batch.tolist() for batch in batches]
            yield [sample for row in zip(*dealt, strict=True) for sample in row]

    def state(self) -> dict[str, Any]:
        """The sampler's, which must be the same on every rank."""
        first, *others = (sampler.state_dict() for sampler in self.samplers)
        assert all(other == first for other in others)
        return first


def taken(steps: Iterator[list[int]], number: int) -> list[list[int]]:
    return list(islice(steps, number))


def flat(steps: Iterator[list[int]]) -> list[int]:
    return list(chain.from_iterable(steps))


def order_of(samples: int, epoch: int = 0) -> list[int]:
    sampler = DistributedSampler(range(samples), 1, 0, seed=5)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    return list(sampler)


@settings(max_examples=40)
@example(samples=3, sizes=[(2, 2, 1)], last=(1, 1), drop_last=True)
@given(
    samples=st.integers(1, 40),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 4)), max_size=4),
    last=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    drop_last=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:a batch of all ranks was")
def test_an_epoch_has_each_sample_once_however_often_the_ranks_change(samples, sizes, last, drop_last):
    seen: list[int] = []
    state, last_to_deal = None, 1
    for world_size, batch_size, stopped_after in [*sizes, (*last, 1000)]:
        job = Ranks(samples, world_size, batch_size, drop_last=drop_last)
        if state is not None:
            job.load(state)
        before, epoch = len(seen), job.samplers[0].epoch
        seen += flat(islice(steps := job.steps(), stopped_after))
        if len(seen) > before:
            last_to_deal = world_size
        if job.samplers[0].epoch > epoch:
            break
        del steps
        state = job.state()
        assert state["done"] == min(len(seen), samples)
    order = order_of(samples)
    if drop_last:
        assert seen == order[: len(seen)]
        assert samples - len(seen) < world_size  # the last job's, which had no step for them
    else:
        assert seen[:samples] == order
        assert len(seen) - samples < last_to_deal
        assert seen[samples:] == (order * 4)[: len(seen) - samples]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_the_batches_are_those_of_a_run_that_was_not_stopped(workers, before, after):
    whole = list(Ranks(60, 1, 12).steps())
    for stopped_after in (0, 1, 3, 5):
        job = Ranks(60, before, 12 // before, workers)
        steps = job.steps()
        assert taken(steps, stopped_after) == whole[:stopped_after]
        resumed = Ranks(60, after, 12 // after, workers).load(job.state())
        assert list(resumed.steps()) == whole[stopped_after:]
        assert list(resumed.steps()) == list(Ranks(60, 1, 12).load(resumed_state(1)).steps())


def resumed_state(epoch: int) -> dict[str, Any]:
    """The state at the beginning of an epoch."""
    job = Ranks(60, 1, 12)
    for _ in range(epoch):
        list(job.steps())
    assert job.state()["epoch"] == epoch
    return job.state()


def test_the_next_epoch_has_another_order_and_the_length_is_of_a_whole_one():
    job = Ranks(10, 2, 2)
    first, second = (flat(job.steps()) for _ in range(2))
    assert first == order_of(10) != second == order_of(10, epoch=1)
    taken(job.steps(), 1)
    assert len(job.samplers[0]) == 5
    assert len(job.loaders[0]) == 3
    assert flat(Ranks(10, 2, 2, shuffle=False).steps()) == list(range(10))


@pytest.mark.parametrize("workers", WORKERS)
def test_a_loop_that_was_left_goes_on_after_the_last_batch_that_it_was_given(workers):
    sampler = GlobalSampler(12, seed=5, rank=0, world_size=1)
    loader = DataLoader(range(12), batch_size=2, sampler=sampler, num_workers=workers)  # type: ignore[arg-type]
    seen = []
    for batch in sampler.batches(loader):
        seen += batch.tolist()
        if len(seen) == 4:
            break
    for batch in sampler.batches(loader):
        seen += batch.tolist()
    assert seen == order_of(12)


@pytest.mark.parametrize("workers", WORKERS)
def test_the_loader_draws_no_random_number_of_the_job(workers):
    sampler = GlobalSampler(8, rank=0, world_size=1)
    loader = DataLoader(range(8), batch_size=2, sampler=sampler, num_workers=workers)  # type: ignore[arg-type]
    before = torch.get_rng_state()
    assert len(list(sampler.batches(loader))) == 4
    assert torch.equal(torch.get_rng_state(), before)


class Drawn(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        return torch.rand(()).item()


def test_workers_draw_other_numbers_in_each_epoch_and_on_each_rank():
    seen = set()
    for rank in range(2):
        sampler = GlobalSampler(8, rank=rank, world_size=2)
        loader = DataLoader(Drawn(), batch_size=2, sampler=sampler, num_workers=2)  # type: ignore[arg-type]
        seen |= {number for _ in range(2) for batch in sampler.batches(loader) for number in batch.tolist()}
    assert len(seen) == 16


def test_another_batch_over_all_ranks_is_warned_of():
    job = Ranks(24, 2, 3)
    taken(job.steps(), 2)
    with pytest.warns(UserWarning, match="was 6 samples when the position was saved, and is 3 here"):
        list(Ranks(24, 1, 3).load(job.state()).steps())


def test_a_loader_that_is_iterated_by_itself_is_refused():
    (loader,) = Ranks(8, 1, 2).loaders
    with pytest.raises(OptionError, match=r"sampler\.batches\(loader\)"):
        next(iter(loader))


class Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[int]:
        return iter(())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda sampler: DataLoader(range(8), batch_size=2), "another sampler"),
        (
            lambda sampler: DataLoader(
                range(8), batch_sampler=torch.utils.data.BatchSampler(sampler, 2, False)
            ),
            "without batch_sampler",
        ),
        (lambda sampler: DataLoader(Endless(), batch_size=2), "another sampler"),
        (
            lambda sampler: DataLoader(
                range(8), batch_size=2, sampler=sampler, num_workers=2, in_order=False
            ),
            "in_order=False",
        ),
    ],
)
def test_a_loader_whose_batches_cannot_be_counted_is_refused(loader, message):
    sampler = GlobalSampler(8, rank=0, world_size=1)
    with pytest.raises(OptionError, match=message):
        sampler.batches(loader(sampler))


def test_a_loader_without_batches_counts_single_samples():
    sampler = GlobalSampler(8, seed=5, rank=0, world_size=2)
    loader = DataLoader(range(8), batch_size=None, sampler=sampler)  # type: ignore[arg-type]
    next(sampler.batches(loader))
    assert sampler.done == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed 6, and this sampler's seed is 5"),
        ({"samples": 9}, "samples 9, and this sampler's samples is 8"),
        ({"shuffle": False}, "shuffle False"),
        ({"done": 9}, "9 samples are done, of 8"),
        ({"done": -1}, "-1 samples are done"),
    ],
)
def test_a_position_in_another_order_is_refused(change, message):
    job = Ranks(8, 1, 2)
    with pytest.raises(OptionError, match=message):
        job.load({**job.state(), **change})
    assert job.state()["done"] == 0


def test_a_state_of_something_else_is_refused():
    with pytest.raises(OptionError, match="done, global_batch, samples, seed, shuffle is missing"):
        Ranks(8, 1, 2).load({"epoch": 1})


def test_two_loops_at_once_and_a_load_in_a_loop_are_refused():
    sampler = GlobalSampler(8, rank=0, world_size=1)
    loader = DataLoader(range(8), batch_size=2, sampler=sampler)  # type: ignore[arg-type]
    first, second = sampler.batches(loader), sampler.batches(loader)
    next(first)
    next(second)
    with pytest.raises(OptionError, match="another loop over it began"):
        next(first)
    sampler.load_state_dict(sampler.state_dict())
    with pytest.raises(OptionError, match="position was loaded"):
        next(second)
    assert len(list(sampler.batches(loader))) == 2  # each loop was given one


def test_places():
    alone = GlobalSampler(range(8))
    assert (alone.rank, alone.world_size, alone.samples) == (0, 1, 8)
    with pytest.raises(OptionError, match="together"):
        GlobalSampler(8, rank=0)
    with pytest.raises(OptionError, match="rank 2 of world size 2"):
        GlobalSampler(8, rank=2, world_size=2)


class Loader:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state


def test_states_are_gathered_as_they_are_or_refused():
    state = {"_num_yielded": 1, "fetcher_state": None, "_sampler_iter_state": {"samples_yielded": 2}}
    assert gather_loader_states(Loader(state)) == [state]
    for other in ({"generator": torch.zeros(1)}, {"at": (1, 2)}, {"at": {1: 2}}):
        with pytest.raises(OptionError, match="all_gather_object"):
            gather_loader_states(Loader(other))
