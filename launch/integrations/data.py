"""The position in the data: a sampler that counts samples of all ranks, and torchdata's states for another world size.

    sampler = GlobalSampler(dataset, seed=1)
    loader = DataLoader(dataset, batch_size=batch_size // world_size, sampler=sampler)
    for batch in sampler.batches(loader): ...      # save sampler.state_dict(): it holds at any world size

`reshard_loader_state` does it for jobs that save ``StatefulDataLoader.state_dict()``, which counts samples of one rank.

Not guaranteed: the random states of a loader's workers. A worker that draws random numbers draws others after a resume,
and so does torchdata's own.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from ..distributed.printable import warn
from ..distributed.session import current_topology, open_session
from ..loader import OptionError
from .versions import warn_of_version

TRIED = ("0.11",)
_BATCH = "rankload_batch_size"
"""Kept in a gathered state: torchdata's own, with workers, tells the batch size from its first snapshot on."""
_LOADED = object()
"""Stands for a loop during which another position was loaded: it must not go on."""


class GlobalSampler:
    """Deals the samples of each epoch to the ranks, in an order that does not depend on their number.

    The order of an epoch is that of torch's ``DistributedSampler``: a permutation by ``seed + epoch``. Of what is left
    of it, rank r of M gets every M-th sample from the r-th on, so that a step of M batches is the next samples of the
    order, for each M. The position is one number, ``done``, the same on every rank.

    The training loop iterates over `batches`, which counts what it was given. Workers draw further ahead than that, so
    that a loader that is iterated by itself is an `OptionError`.

    Args:
        samples: the data set, or the number of its samples.
        seed: of the order.
        shuffle: False for the data set's own order.
        drop_last: what happens at the end of an epoch, where the samples that are left are not a multiple of the ranks.
            False: the first samples of the epoch fill up the last step. True: the rest is left out.
        rank, world_size: this rank among those that share the samples. None: among all ranks of the job.
    """

    def __init__(
        self,
        samples: Sized | int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise OptionError("GlobalSampler takes rank and world_size together, or neither")
        if rank is None or world_size is None:
            place = current_topology()
            rank, world_size = place.rank, place.world_size
        _check_place(rank, world_size)
        self.samples = samples if isinstance(samples, int) else len(samples)
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.done = 0
        """Samples of this epoch that `batches` has yielded, on all ranks together."""
        self._global_batch: int | None = None
        """Samples of one batch over all ranks, of the loader that was iterated last."""
        self._loop: object = None
        """What stands for the running loop over `batches`."""

    def __len__(self) -> int:
        """This rank's samples of a whole epoch."""
        return self._share(self.samples)

    def _share(self, samples: int) -> int:
        return samples // self.world_size if self.drop_last else -(-samples // self.world_size)

    def __iter__(self) -> Iterator[int]:
        if self._loop is None:
            raise OptionError(
                "a loader with a GlobalSampler was iterated by itself, so that nobody counts its samples: iterate over "
                "sampler.batches(loader)"
            )
        order = self._order()
        left = order[self.done :]
        dealt = self._share(len(left)) * self.world_size
        while len(left) < dealt:
            left += order[: dealt - len(left)]
        yield from left[self.rank : dealt : self.world_size]

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.samples))
        import torch

        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(self.samples, generator=generator).tolist()
        return order

    def batches(self, loader: Any) -> Iterator[Any]:
        """Yields what is left of this epoch, and counts it; at the end the next epoch begins.

        A batch counts as done when it is yielded: save after the step that trains on it. A loop that is left early
        goes on, in the next call, after the last batch that it was given.

        Where the loader has no generator of its own, torch's is left as it was when the loader begins, so that a
        resumed job draws the same random numbers as one that was not stopped.

        Args:
            loader: a ``DataLoader`` or torchdata's ``StatefulDataLoader`` with this sampler. Each rank's has the same
                batch size.

        Raises:
            OptionError: the loader has another sampler, or forms batches whose size is not known before.
        """
        sampler: object = getattr(loader, "sampler", None)
        if sampler is not self:
            raise OptionError(
                "the loader has another sampler, or batches of its own: DataLoader(..., batch_size=..., "
                "sampler=sampler), without batch_sampler"
            )
        if loader.num_workers and not getattr(loader, "in_order", True):
            raise OptionError(
                "the loader yields batches in another order than it draws them, so that the samples which are done "
                "are not known: leave out in_order=False"
            )
        size = (loader.batch_size or 1) * self.world_size
        if self._global_batch is not None:
            _warn_of_pace(self._global_batch, size)
        self._global_batch = size
        return self._counted(loader, size)

    def _counted(self, loader: Any, size: int) -> Iterator[Any]:
        this = self._loop = object()
        # The last batch may be a smaller one; with drop_last, what is left after it is dealt to nobody.
        end = min(self.samples, self.done + self._share(self.samples - self.done) * self.world_size)
        try:
            for batch in _begin(loader, self.seed, self.epoch, self.done, self.rank):
                if self._loop is not this:
                    raise OptionError(
                        "the sampler's position was loaded, or another loop over it began, while this one ran: load "
                        "sampler.state_dict() before the loop, and not the loader's state"
                    )
                self.done = min(self.done + size, end)
                yield batch
        finally:
            if self._loop in (this, _LOADED):
                self._loop = None
        self.done = 0
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """The position and what the order depends on, in plain numbers; the same on every rank."""
        return {
            "epoch": self.epoch,
            "done": self.done,
            "samples": self.samples,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "global_batch": self._global_batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was saved, at whatever world size.

        Raises:
            OptionError: the position is one in another order: another number of samples, seed or shuffle.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise OptionError(
                f"no state of a GlobalSampler: {', '.join(missing)} is missing; pass what its state_dict() returned"
            )
        for name in ("samples", "seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise OptionError(
                    f"the position is that of an order with {name} {state[name]}, and this sampler's {name} is "
                    f"{getattr(self, name)}: make it with that one, or begin a new epoch without the saved position"
                )
        if not 0 <= state["done"] <= self.samples:
            raise OptionError(f"{state['done']} samples are done, of {self.samples}: the state is damaged")
        self.epoch, self.done, self._global_batch = state["epoch"], state["done"], state["global_batch"]
        self._loop = None if self._loop is None else _LOADED


def _begin(loader: Any, *parts: int) -> Iterator[Any]:
    """The loader's iterator, whose workers' seed depends on `parts` alone; torch's generator stays as it is."""
    iterator: Iterator[Any]
    if loader.generator is not None:
        iterator = iter(loader)
        return iterator
    import torch

    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(_mixed(*parts))
    try:
        iterator = iter(loader)
    finally:
        generator.set_state(before)
    return iterator


def _mixed(*parts: int) -> int:
    """A number of 63 bits, another for each other `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def gather_loader_states(loader: Any) -> list[dict[str, Any]]:
    """Every rank's ``loader.state_dict()``, by global rank, on every rank, for ``save_checkpoint(extra=...)``.

    Each has the loader's batch size in addition, which `reshard_loader_state` takes out. All ranks must call it.

    Raises:
        OptionError: a state has more than JSON holds exactly: tensors, tuples.
    """
    with open_session() as session:
        state = loader.state_dict()
        if isinstance(state, Mapping) and isinstance(getattr(loader, "batch_size", None), int):
            state = {**state, _BATCH: loader.batch_size}
        try:
            exact = json.loads(json.dumps(state)) == state
        except (TypeError, ValueError):
            exact = False
        if not exact:
            raise OptionError(
                f"rank {session.topology.rank}'s loader has a state of other values than numbers, texts, lists and "
                "dicts with texts for keys: gather it with torch.distributed.all_gather_object"
            )
        return session.channel.gather("gather loader states", state)


@dataclass(frozen=True)
class _Position:
    """Where a saved rank's loader stood."""

    samples: int
    batches: int
    finished: bool


class _IndivisibleError(OptionError):
    """A state that only the rank which saved it can go on with."""


def reshard_loader_state(
    states: Sequence[Mapping[str, Any]], *, rank: int, world_size: int, batch_size: int
) -> dict[str, Any]:
    """The state with which this rank's ``StatefulDataLoader`` goes on where the saved ranks' stood together.

    For loaders of a data set with a length, with ``StatefulDistributedSampler`` or torch's ``DistributedSampler`` of
    the same seed and epoch, and as many workers as saved. The samples that all saved ranks were given are divided by
    `world_size`. The state of an epoch that has ended begins the next one.

    Args:
        states: every saved rank's ``loader.state_dict()``, in the ranks' order (`gather_loader_states`).
        rank, world_size: this rank among those that share the data now.
        batch_size: the loader's: samples of one rank and step.

    Returns:
        For ``loader.load_state_dict``. At the saved world and batch size, what cannot be divided is returned as it is.

    Raises:
        OptionError: the ranks stood at different positions; the samples are not a multiple of ``world_size *
            batch_size``; the data set is iterable, or it or the sampler has a state of its own.
    """
    warn_of_version("torchdata", TRIED)
    _check_place(rank, world_size)
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}: it is the samples of one rank and step, one or more")
    if not states:
        raise OptionError("no states: pass every saved rank's loader.state_dict()")
    try:
        found = [_position(state, saved) for saved, state in enumerate(states)]
    except _IndivisibleError:
        if len(states) != world_size or _batch_size(states[rank]) not in (None, batch_size):
            raise
        return _without_note(states[rank])
    for saved, position in enumerate(found):
        if position != found[0]:
            raise OptionError(
                f"the saved ranks stood at different positions: rank 0 at {_described(found[0])}, rank {saved} at "
                f"{_described(position)}; gather the states at the same step on every rank"
            )
    if found[0].finished:
        return _moved(states, rank, samples=0, batches=0)
    total = found[0].samples * len(states)
    if total % (world_size * batch_size):
        raise OptionError(
            f"{len(states)} ranks had been given {total:,} samples, which is no multiple of {world_size} ranks x "
            f"{batch_size} samples a step: choose a batch size that divides, or count samples with "
            "rankload.integrations.data.GlobalSampler, which begins anywhere"
        )
    samples = total // world_size
    if found[0].batches and found[0].samples % found[0].batches == 0:
        _warn_of_pace(total // found[0].batches, world_size * batch_size)
    return _moved(states, rank, samples=samples, batches=samples // batch_size)


def _warn_of_pace(saved: int, now: int) -> None:
    if saved != now:
        warn(
            f"a batch of all ranks was {saved:,} samples when the position was saved, and is {now:,} here: no sample "
            "is left out or repeated, but what counts in steps (schedules) goes on at another pace, unless gradient "
            "accumulation makes up for it",
            stacklevel=3,
        )


def _check_place(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise OptionError(f"rank {rank} of world size {world_size}: ranks are 0 to world_size - 1")


def _described(position: _Position) -> str:
    return "the epoch's end" if position.finished else f"{position.samples:,} samples"


def _main_state(state: Mapping[str, Any]) -> Any:
    """What a state says of the sampler: with workers, when its last snapshot was taken."""
    return state["_snapshot"]["_main_snapshot"] if "_snapshot" in state else state


def _batch_size(state: Mapping[str, Any]) -> float | None:
    """Samples of one batch of a saved rank, if its state tells."""
    main = _main_state(state)
    sampled, batches = main["_sampler_iter_state"], main["_sampler_iter_yielded"]
    if not batches or not isinstance(sampled, Mapping) or "samples_yielded" not in sampled:
        return state.get(_BATCH)
    size: float = sampled["samples_yielded"] / batches
    return size


def _without_note(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `state` for torchdata."""
    return copy.deepcopy({key: value for key, value in state.items() if key != _BATCH})


def _position(state: Mapping[str, Any], rank: int) -> _Position:
    """Where saved rank `rank` stood. Raises `OptionError` where its state does not say it."""
    try:
        main, finished = _main_state(state), bool(state["_iterator_finished"])
        sampled, batches = main["_sampler_iter_state"], main["_sampler_iter_yielded"]
        since = state["_steps_since_snapshot"] if "_snapshot" in state else 0
        parts = list(state["_snapshot"]["_worker_snapshots"].values()) if "_snapshot" in state else [state]
        fetched = [part["fetcher_state"] for part in parts]
        kept = [part["dataset_state"] for part in parts]
    except (KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"saved rank {rank}'s state is none that torchdata's StatefulDataLoader returned: {error!r}"
        ) from error
    problem = _indivisible(sampled, fetched, kept)
    if problem is not None:
        raise _IndivisibleError(f"saved rank {rank}'s loader cannot be divided anew: {problem}")
    samples = sampled["samples_yielded"]
    if since and not finished:
        size = _batch_size(state)
        if size is None or size != int(size):
            raise _IndivisibleError(
                f"saved rank {rank}'s loader was {since} steps beyond its last snapshot, at {samples} samples in "
                f"{batches} batches, which does not tell how many samples a step has: save with "
                "snapshot_every_n_steps=1, or by gather_loader_states"
            )
        samples += since * int(size)
    return _Position(samples, batches + since, finished)


def _indivisible(sampled: Any, fetched: Sequence[Any], kept: Sequence[Any]) -> str | None:
    """Why only the rank that saved a state can go on with it, and what to do; None where that is not so.

    Args:
        sampled: the state of the sampler's iterator.
        fetched: the state of the data set's iterator, of each worker.
        kept: the data set's own state, of each worker.
    """
    if any(one is not None for one in fetched):
        return (
            "its data set is iterable, and only it knows its position; resume at the saved world and batch size, or "
            "use a data set with a length"
        )
    if any(one is not None for one in kept):
        return (
            "its data set has a state of its own; resume at the saved world and batch size, or keep state out of the "
            "data set"
        )
    if not isinstance(sampled, Mapping) or "samples_yielded" not in sampled:
        return "it counts no samples, as with batch_size=None or a batch_sampler; give the loader batch_size, sampler"
    if "sampler_iter_state" in sampled or set(sampled.get("sampler_state", ())) - {"yielded"}:
        return (
            "its sampler has a state of its own, and is not known to deal samples to ranks; use "
            "StatefulDistributedSampler, or with a GlobalSampler save its own state_dict()"
        )
    return None


def _moved(states: Sequence[Mapping[str, Any]], rank: int, *, samples: int, batches: int) -> dict[str, Any]:
    """A saved rank's state, at another position. With workers, ranks beyond the saved ones get seeds of their own."""
    state = _without_note(states[rank % len(states)])
    main = _main_state(state)
    state["_iterator_finished"] = False
    main["_sampler_iter_yielded"] = batches
    main["_sampler_iter_state"]["samples_yielded"] = samples
    if "sampler_state" in main["_sampler_iter_state"]:
        main["_sampler_iter_state"]["sampler_state"] = {"yielded": samples}
    if "_snapshot" not in state:
        state["_num_yielded"] = batches
        return state
    state["_steps_since_snapshot"] = 0
    state["_snapshot"]["_snapshot_step"] = batches
    state["_snapshot"]["_last_yielded_worker_id"] = (batches - 1) % main["_num_workers"]
    if rank >= len(states):
        main["_base_seed"] = _mixed(main["_base_seed"], rank)
    return state
