"""Opens checkpoints of one file a rank: a folder in verl's names, or files that a path with ``{rank}`` names.

A folder has ``model_world_size_N_rank_R.pt`` and, for a full load, ``optim_...`` and ``extra_state_...``; its files
name the number of ranks. Where a training script named the files, the shards in the first one tell it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import CorruptError, LayoutError, NotFoundError
from ...saved.contents import Saved, SetFile
from ...saved.demand import Demand
from ...saved.node_file import NodeFile
from ...stores.locate import RANK_FILE
from ..base import Files
from ..single_file import RNG_KEYS, parts_for, rng_of
from .join import Joined, RankTree, join_trees, shards_in

KIND = "rank-shards"
_MOST_RANKS = 1 << 14
_SHOWN = 8
_FLAT = ("_flat_param", "flat_param")
"""How FSDP1 calls the parameters that it has flattened."""


class RankShards:
    """A checkpoint of which each rank saved its own shards, in a file of its own."""

    def recognises(self, files: Files) -> bool:
        if files.in_folder:
            return RANK_FILE.fullmatch(files.first.name) is not None
        if not files.by_rank or files.first.kind != "file":
            return False
        with files.stage("read first"):
            return any(True for _ in shards_in(files.index(files.first).tree))

    def open(self, files: Files, demand: Demand) -> Saved:
        return _of_folder(files, demand) if files.in_folder else _of_template(files, demand)


@dataclass(frozen=True, slots=True)
class _Set:
    """The files of one part of a checkpoint, by saved rank."""

    what: str
    """What messages call them."""
    names: Mapping[int, str]
    fetched: Mapping[str, NodeFile]

    @property
    def any(self) -> bool:
        return bool(self.fetched)

    def check_complete(self, shown: str, count: int) -> None:
        """Raises `NotFoundError`, which names all ranks whose files are missing."""
        lost = [rank for rank, name in self.names.items() if name not in self.fetched]
        if lost:
            examples = ", ".join(self.names[rank] for rank in lost[:_SHOWN])
            raise NotFoundError(
                f"{shown} lacks the {self.what} of saved {_ranks(lost)}, of {count}: {examples}"
                f"{', ...' * (len(lost) > _SHOWN)}. Copy them there, or take another checkpoint",
                path=shown,
            )

    def trees(self, files: Files) -> list[RankTree]:
        indexes = (files.index(self.fetched[name]) for name in self.names.values())
        return [RankTree(index.name, index.tree) for index in indexes]


def _of_folder(files: Files, demand: Demand) -> Saved:
    match = RANK_FILE.fullmatch(files.first.name)
    count = int(match["ranks"]) if match else 0
    _check_count(count, files.first.source)
    own = demand.position.rank
    every = tuple(range(count))
    wanted = {"model": every}
    if not demand.weights_only:
        if demand.optimizer:
            wanted["optim"] = every
        wanted["extra_state"] = (0, own) if 0 < own < count else (0,)
    names = {
        part: {rank: f"{part}_world_size_{count}_rank_{rank}.pt" for rank in ranks}
        for part, ranks in wanted.items()
    }
    found = files.fetch([name for each in names.values() for name in each.values()], "fetch", optional=True)
    sets = {
        part: _Set(f"{part} files", each, {name: found[name] for name in each.values() if name in found})
        for part, each in names.items()
    }
    # A save may leave out parts, but no rank's file of one.
    present = [part for part in sets if part == "model" or files.any(sets[part].what, sets[part].any)]
    with files.stage("read"):
        for part in present:
            sets[part].check_complete(files.name, count)
        trees = {part: sets[part].trees(files) for part in present}
        extra = [one.tree for one in trees.pop("extra_state", ())]
        for each in trees.values():
            _check_ranks(each, count)
        joined = {part: join_trees(each, part) for part, each in trees.items()}
        whole: dict[str, Any] = {}
        if extra:
            whole |= extra[0] if isinstance(extra[0], Mapping) else {"extra_state": extra[0]}
        whole["model"] = joined["model"].tree
        if "optim" in joined:
            whole["optimizer"] = joined["optim"].tree
        notes = [
            f"{files.name} has no {each.what}: what they would hold is not restored"
            for part, each in sets.items()
            if part not in present
        ]
        rng = rng_of(extra[-1]) if extra and own < count else None
        saved = _saved(files, demand, whole, list(joined.values()), count, rng, notes)
        every_name = [f"{part}_world_size_{count}_rank_{rank}.pt" for part in present for rank in every]
        return replace(saved, files=tuple(map(SetFile, every_name)))


def _of_template(files: Files, demand: Demand) -> Saved:
    with files.stage("read"):
        first = files.index(files.first)
        count = max(shard.world_size for _, shard in shards_in(first.tree)) or 1
        _check_count(count, files.first.source)
        names = {rank: files.of_rank(rank, count) for rank in range(count)}
    own = demand.position.rank
    found = _Set("files", names, files.fetch(list(names.values()), "fetch", optional=True))
    with files.stage("read all"):
        found.check_complete(files.name, count)
        trees = found.trees(files)
        _check_ranks(trees, count)
        joined = join_trees(trees)
        rng = rng_of(trees[own].tree) if own < count else None
        saved = _saved(files, demand, joined.tree, [joined], count, rng)
        return replace(saved, files=tuple(map(SetFile, names.values())))


def _saved(
    files: Files,
    demand: Demand,
    tree: Any,
    joined: Sequence[Joined],
    count: int,
    own_rng: list[Any] | None,
    notes: Iterable[str] = (),
) -> Saved:
    """The parts of `tree`, which is made of what was `joined`, with the random states of this rank's file."""
    saved = parts_for(demand, tree, file=files.name)
    if demand.optimizer and not demand.weights_only:
        _check_pipeline(saved, [place for each in joined for place in each.partial], files.name)
    notes = (*notes, *_differing(joined))
    saved = replace(saved, name=files.name, kind=KIND, world_size=count, notes=notes)
    if saved.rng is None or len(saved.rng) > 1:
        return saved  # none, or those of all ranks in each file
    if demand.position.rank >= count:
        return replace(saved, rng_per_rank=True, own_rng=False)
    return replace(saved, rng=own_rng or [], rng_per_rank=True)


def _check_count(count: int, shown: str) -> None:
    if not 1 <= count <= _MOST_RANKS:
        raise LayoutError(f"{shown} is of {count} ranks, expected 1 to {_MOST_RANKS}", path=shown)


def _check_ranks(trees: Sequence[RankTree], count: int) -> None:
    """Raises `CorruptError` where a file is of more ranks than there are files, and `LayoutError` where it has FSDP1's
    flattened parameters."""
    for one in trees:
        for place, shard in shards_in(one.tree):
            if shard.world_size > count:
                raise CorruptError(
                    f"{one.file}: {place} is a shard of {shard.world_size} ranks, expected one of {count}: the file is "
                    "of another save",
                    path=one.file,
                )
            if place.rpartition("/")[2].rpartition(".")[2] in _FLAT:
                raise LayoutError(
                    f"{one.file}: {place} is what FSDP1 has flattened parameters to (LOCAL_STATE_DICT): which of its "
                    "elements are of which weight is not in the files. Save with StateDictType.SHARDED_STATE_DICT or "
                    "FULL_STATE_DICT, in a job like the one that saved it",
                    path=one.file,
                )


def _check_pipeline(saved: Saved, partial: Iterable[str], shown: str) -> None:
    """Raises `LayoutError` where ranks hold different parameters, and number them in the optimizer each by itself."""
    model, optimizers = saved.state.get("model", {}), saved.state.get("optimizers", {})
    states = [one.get("state") for one in optimizers.values() if isinstance(one, Mapping)]
    numbered = any(isinstance(key, int) for state in states if isinstance(state, Mapping) for key in state)
    odd = next((place for place in partial if place.rpartition("/")[2] in model), None)
    if numbered and odd is not None:
        raise LayoutError(
            f"{shown}: not all ranks hold {odd}, as in the stages of a pipeline, and their optimizers number what they "
            "hold: which is which is not known. Load the weights with load_weights_only=True, or "
            "leave_out=['optimizer']",
            path=shown,
        )


def _differing(joined: Iterable[Joined]) -> tuple[str, ...]:
    places = [place for each in joined for place in each.differing if place.partition("/")[0] not in RNG_KEYS]
    if not places:
        return ()
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return (
        f"not the same in all ranks' files, and taken from the lowest rank's: {', '.join(places[:_SHOWN])}{more}",
    )


def _ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0, 2 to 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}"
