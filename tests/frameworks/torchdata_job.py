"""torchdata's loaders at another number of ranks, simulated in one process: what must hold of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import pytest
import torch
from framework_lines import run_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from rankload.integrations.data import GlobalSampler, gather_loader_states, reshard_loader_state
from rankload.loader import OptionError
from torch.utils.data import DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

SAMPLERS = {
    "DistributedSampler": DistributedSampler,
    "StatefulDistributedSampler": StatefulDistributedSampler,
}
SIZES = st.integers(1, 4)


def examples(number: int) -> Any:
    """So many, the same on every machine and without a deadline: the profile of the tests is not that of this process.
    `TEST_ALL` looks further."""
    return settings(deadline=None, max_examples=number, derandomize=os.environ.get("TEST_ALL") is None)


class Ranks:
    """A job of `world_size` ranks, each with a loader of its own."""

    def __init__(
        self, samples: int, world_size: int, batch_size: int, sampler: str, workers: int, *, every: int = 1
    ) -> None:
        self.world_size, self.batch_size = world_size, batch_size
        self.loaders = [
            StatefulDataLoader(
                range(samples),
                batch_size=batch_size,
                sampler=SAMPLERS[sampler](range(samples), world_size, rank, seed=5, drop_last=True),
                num_workers=workers,
                snapshot_every_n_steps=every,
            )
            for rank in range(world_size)
        ]

    def load(self, states: list[dict[str, Any]]) -> Ranks:
        carried = json.loads(json.dumps(states))
        for rank, loader in enumerate(self.loaders):
            loader.load_state_dict(
                reshard_loader_state(
                    carried, rank=rank, world_size=self.world_size, batch_size=self.batch_size
                )
            )
        assert carried == states, "the states that were passed are changed"
        return self

    def begin(self) -> Iterator[list[int]]:
        """The samples of each step over all ranks, in the order of the epoch."""
        return self._of(list(map(iter, self.loaders)))

    @staticmethod
    def _of(loops: list[Iterator[torch.Tensor]]) -> Iterator[list[int]]:
        for batches in zip(*loops, strict=True):
            dealt = [batch.tolist() for batch in batches]
            yield [sample for row in zip(*dealt, strict=True) for sample in row]

    def gathered(self) -> list[dict[str, Any]]:
        """As each rank's part of a job would have them."""
        return [state for loader in self.loaders for state in gather_loader_states(loader)]

    def states(self) -> list[dict[str, Any]]:
        return [loader.state_dict() for loader in self.loaders]


def order_of(samples: int) -> list[int]:
    return list(DistributedSampler(range(samples), 1, 0, seed=5))


def flat(steps: Iterator[list[int]]) -> list[int]:
    return list(chain.from_iterable(steps))


def _check(
    sampler: str,
    workers: int,
    saved: tuple[int, int],
    now: tuple[int, int],
    steps: int,
    after: int,
    every: int,
    *,
    gathered: bool = False,
) -> None:
    """An epoch of `steps` saved steps and what the new job makes of the rest, saved after `after` steps; states that
    were `gathered` tell the batch size."""
    samples = saved[0] * saved[1] * steps
    job = Ranks(samples, *saved, sampler, workers, every=every)
    seen = flat(islice(job.begin(), after))
    states = job.gathered() if gathered else job.states()
    resumed = Ranks(samples, *now, sampler, workers, every=every)
    total = saved[0] * saved[1] * after
    if total % (now[0] * now[1]):
        with pytest.raises(OptionError, match=f"{saved[0]} ranks had been given {total:,} samples"):
            resumed.load(states)
        return
    if not gathered and workers and 0 < after < every and saved != now:
        with pytest.raises(OptionError, match="snapshot_every_n_steps=1"):
            resumed.load(states)
        return
    rest = resumed.load(states).begin()
    if saved[0] * saved[1] == now[0] * now[1]:
        whole = Ranks(samples, *saved, sampler, 0).begin()
        expected = list(islice(whole, after, None))
        left = list(rest)
        assert left == expected
        seen += chain.from_iterable(left)
    else:
        seen += flat(rest)
    order = order_of(samples)
    assert seen == order[: len(seen)]
    # What no whole share of each rank is left of.
    assert samples - len(seen) < now[0]


def no_sample_is_lost_or_repeated(sampler: str) -> None:
    @examples(200)
    @given(
        saved=st.tuples(SIZES, SIZES), now=st.tuples(SIZES, SIZES), steps=st.integers(1, 8), data=st.data()
    )
    def property_(saved: tuple[int, int], now: tuple[int, int], steps: int, data: Any) -> None:
        after = data.draw(st.integers(0, steps - 1))
        _check(sampler, 0, saved, now, steps, after, 1)

    property_()


def with_workers(sampler: str) -> None:
    for saved, now in (
        ((2, 6), (1, 12)),
        ((2, 6), (3, 4)),
        ((1, 4), (4, 1)),
        ((3, 2), (2, 3)),
        ((2, 2), (2, 2)),
    ):
        for after, every in ((0, 1), (3, 1), (5, 1), (3, 2), (1, 3)):
            _check(sampler, 2, saved, now, 6, after, every)

    @examples(15)
    @given(
        saved=st.tuples(st.integers(1, 3), SIZES),
        now=st.tuples(st.integers(1, 3), SIZES),
        steps=st.integers(1, 5),
        every=st.integers(1, 3),
        data=st.data(),
    )
    def property_(saved: tuple[int, int], now: tuple[int, int], steps: int, every: int, data: Any) -> None:
        after = data.draw(st.integers(0, steps - 1))
        _check(sampler, 2, saved, now, steps, after, every, gathered=True)

    property_()


def an_epoch_that_ended_begins_anew(sampler: str) -> None:
    for workers in (0, 2):
        job = Ranks(24, 2, 3, sampler, workers)
        assert flat(job.begin()) == order_of(24)
        for world_size in (2, 3, 1):
            assert flat(Ranks(24, world_size, 2, sampler, workers).load(job.states()).begin()) == order_of(24)


def workers_of_new_ranks_have_seeds_of_their_own() -> None:
    job = Ranks(24, 2, 3, "StatefulDistributedSampler", 2)
    list(islice(job.begin(), 2))
    states = job.states()
    seeds = [
        reshard_loader_state(states, rank=rank, world_size=4, batch_size=3)["_snapshot"]["_main_snapshot"][
            "_base_seed"
        ]
        for rank in range(4)
    ]
    assert seeds[:2] == [state["_snapshot"]["_main_snapshot"]["_base_seed"] for state in states]
    assert len(set(seeds)) == 4


class Counted(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[int]:
        return iter(range(12))


class WithState(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        return index

    def state_dict(self) -> dict[str, int]:
        return {"seen": 1}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


def what_cannot_be_divided_is_refused() -> None:
    def dealt(samples: Any = range(12)) -> Any:
        return StatefulDistributedSampler(samples, 1, 0)

    counting = GlobalSampler(12, rank=0, world_size=1)
    loaders = [
        (StatefulDataLoader(Counted(), batch_size=2), "its data set is iterable"),
        (StatefulDataLoader(Counted(), batch_size=2, num_workers=2), "its data set is iterable"),
        (StatefulDataLoader(WithState(), batch_size=2, sampler=dealt()), "has a state of its own"),
        (StatefulDataLoader(WithState(), batch_size=2, num_workers=2, sampler=dealt()), "state of its own"),
        (StatefulDataLoader(range(12), batch_size=2, shuffle=True), "its sampler has a state of its own"),
        (StatefulDataLoader(range(12), batch_size=None, sampler=dealt()), "counts no samples"),
        (
            StatefulDataLoader(range(12), batch_sampler=torch.utils.data.BatchSampler(dealt(), 2, False)),
            "counts no samples",
        ),
    ]
    for loader, message in loaders:
        next(iter(loader))
        state = loader.state_dict()
        with pytest.raises(OptionError, match=message):
            reshard_loader_state([state], rank=0, world_size=2, batch_size=1)
        # The rank that saved it goes on with it, if it has batches of that size.
        assert reshard_loader_state([state], rank=0, world_size=1, batch_size=2).keys() == state.keys()
        if message != "counts no samples":
            with pytest.raises(OptionError, match=message):
                reshard_loader_state([state], rank=0, world_size=1, batch_size=1)
    loader = StatefulDataLoader(range(12), batch_size=2, sampler=counting)
    next(counting.batches(loader))
    with pytest.raises(OptionError, match=r"with a GlobalSampler save its own state_dict"):
        reshard_loader_state([loader.state_dict()], rank=0, world_size=2, batch_size=1)
    with pytest.raises(OptionError, match="none that torchdata's StatefulDataLoader returned"):
        reshard_loader_state([{"epoch": 1}], rank=0, world_size=2, batch_size=1)
    with pytest.raises(OptionError, match="no states"):
        reshard_loader_state([], rank=0, world_size=2, batch_size=1)


def ranks_at_different_positions_are_refused() -> None:
    job = Ranks(24, 2, 3, "DistributedSampler", 0)
    list(islice(job.begin(), 1))
    next(iter(job.loaders[0]))
    first = job.states()
    list(islice(job.begin(), 2))
    with pytest.raises(OptionError, match="rank 0 at 3 samples, rank 1 at 6 samples"):
        reshard_loader_state([first[0], job.states()[1]], rank=0, world_size=1, batch_size=3)


def a_global_sampler_counts_what_was_yielded() -> None:
    """Of torchdata's loader too, whose own state is refused where it is loaded."""
    for workers in (0, 2):
        for world_size, batch_size in ((1, 6), (2, 3), (3, 2)):
            before = _counting(2, 3, workers)
            seen = flat(islice(_steps(before), 2))
            now = _counting(world_size, batch_size, workers)
            for sampler, _ in now:
                sampler.load_state_dict(before[1][0].state_dict())
            assert seen + flat(_steps(now)) == order_of(30)
        ((sampler, loader),) = _counting(1, 3, workers)
        next(sampler.batches(loader))
        state = loader.state_dict()
        ((sampler, loader),) = _counting(1, 3, workers)
        loader.load_state_dict(state)
        with pytest.raises(OptionError, match="not the loader's state"):
            next(sampler.batches(loader))


def _counting(world_size: int, batch_size: int, workers: int) -> list[tuple[GlobalSampler, Any]]:
    found = []
    for rank in range(world_size):
        sampler = GlobalSampler(30, seed=5, rank=rank, world_size=world_size)
        found.append(
            (
                sampler,
                StatefulDataLoader(range(30), batch_size=batch_size, sampler=sampler, num_workers=workers),
            )
        )
    return found


def _steps(job: list[tuple[GlobalSampler, Any]]) -> Iterator[list[int]]:
    return Ranks._of([sampler.batches(loader) for sampler, loader in job])


def _job() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    """What each real rank has."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    sampler = StatefulDistributedSampler(range(48), world_size, rank, seed=5)
    loader = StatefulDataLoader(range(48), batch_size=12 // world_size, sampler=sampler, num_workers=2)
    return model, torch.optim.AdamW(model.parameters()), loader


def save_by_the_lines(path: str) -> None:
    model, optimizer, loader = _job()
    loop = iter(loader)
    next(loop)
    names = {"path": path, "model": model, "optimizer": optimizer, "loader": loader}
    run_lines("torchdata-save", names)


def resume_by_the_lines(path: str) -> None:
    """Prints what this rank is given."""
    model, optimizer, loader = _job()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    names = {"path": path, "model": model, "optimizer": optimizer, "loader": loader}
    run_lines("torchdata-resume", {**names, "rank": rank, "world_size": world_size})
    print(json.dumps({"samples": flat(batch.tolist() for batch in loader), "order": order_of(48)}))
