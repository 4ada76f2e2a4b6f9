"""Joins the trees that the ranks of a job have saved to one, whose tensors have a piece in each rank's file. Pure.

A shard (`InertShard`) becomes a tensor of all ranks' shards, which must hold each element once. Of ranks that keep the
same elements, the lowest one's are taken. Anything else is the lowest rank's that has it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import CorruptError, FormatError, LayoutError
from ...plurals import counted
from ...saved.regions import CoverageError
from ...saved.shards import REPLICATE, SHARD, STRIDED, Spread, SpreadError, kept_boxes
from ...saved.strided import Box
from ...saved.tensor import Piece, SavedTensor
from ...saved.tree import iterate, join_path
from ...saved.values import InertShard, kind_of

_MOST_DIMENSIONS = 8
"""Of a tensor in shards: whether these cover it takes time that doubles with each dimension."""
_PLAIN = (bool, int, float, str, bytes)
_READABLE = frozenset({SHARD, STRIDED, REPLICATE})


@dataclass(frozen=True, slots=True)
class RankTree:
    """What one saved rank's file holds, or a part of it."""

    file: str
    """What messages call the file."""
    tree: Any


@dataclass(frozen=True, slots=True)
class Joined:
    """The trees of all ranks as one."""

    tree: Any
    differing: tuple[str, ...]
    """Places of tensors and numbers that are no shards, and are not the same on all ranks."""
    partial: tuple[str, ...]
    """Places of what not all ranks have."""


def shards_in(tree: Any) -> Iterator[tuple[str, InertShard]]:
    """Every shard in `tree`, with its place."""
    return ((place, value) for place, value in iterate(tree) if isinstance(value, InertShard))


def join_trees(trees: Sequence[RankTree], path: str = "") -> Joined:
    """The `trees` of all ranks, in their order, as one; `path` is where they lie in the checkpoint.

    Raises `LayoutError` where shards do not belong together, `CorruptError` where one contradicts itself, and
    `FormatError` where it is not known where one lies; messages name the file and the tensor.
    """
    found = _Found()
    return Joined(_join(path, trees, found), tuple(found.differing), tuple(found.partial))


@dataclass(frozen=True, slots=True)
class _Found:
    """What was met on the way through the trees."""

    differing: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)


def _join(path: str, held: Sequence[RankTree], found: _Found) -> Any:
    first = held[0].tree
    if any(isinstance(one.tree, InertShard) for one in held):
        return _whole(path, held)
    if isinstance(first, SavedTensor):
        if not all(_same(first, one.tree) for one in held[1:]):
            found.differing.append(path)
    elif isinstance(first, _PLAIN):
        if any(one.tree != first for one in held[1:]):
            found.differing.append(path)
    elif isinstance(first, Mapping):
        # A copy keeps the ``_metadata`` attribute of torch's state dicts.
        joined: Any = copy.copy(first)
        for key, values in _by_key(held).items():
            here = join_path(path, key)
            if len(values) < len(held):
                found.partial.append(here)
            joined[key] = _join(here, values, found)
        return joined
    elif type(first) in (list, tuple):
        items = [one for one in held if type(one.tree) is type(first) and len(one.tree) == len(first)]
        each = [
            _join(join_path(path, i), [RankTree(one.file, one.tree[i]) for one in items], found)
            for i in range(len(first))
        ]
        return each if isinstance(first, list) else tuple(each)
    return first


def _by_key(held: Iterable[RankTree]) -> dict[Any, list[RankTree]]:
    """What the mappings among `held` have under each key."""
    found: dict[Any, list[RankTree]] = {}
    for one in held:
        for key, value in one.tree.items() if isinstance(one.tree, Mapping) else ():
            found.setdefault(key, []).append(RankTree(one.file, value))
    return found


def _same(one: SavedTensor, other: Any) -> bool:
    """Whether `other` is the same tensor, as far as that is known without reading it."""
    if not isinstance(other, SavedTensor) or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    mine, theirs = one.storages, other.storages
    whole = len(mine) == len(theirs) == 1 and mine[0].nbytes == theirs[0].nbytes == one.nbytes
    return not whole or None in (mine[0].crc32, theirs[0].crc32) or mine[0].crc32 == theirs[0].crc32


def _whole(path: str, held: Sequence[RankTree]) -> SavedTensor:
    """The tensor at `path`, of which `held` are the ranks' shards."""
    shards = [_Shard(one.file, one.tree) for one in held if isinstance(one.tree, InertShard)]
    first = shards[0]
    for one in held:
        if not isinstance(one.tree, InertShard):
            kinds = f"a {first.value.kind} in {first.file}, and a {kind_of(one.tree)} in {one.file}"
            raise CorruptError(f"{path} is {kinds}: they were not saved together", path=one.file)
    dtype, shape = first.value.dtype, first.value.shape
    for shard in shards:
        value = shard.value
        if value.problem:
            raise FormatError(
                f"{shard.file}: {path} is a {value.global_name} of a form that is not known: {value.problem}. Save "
                "full tensors, or with torch.distributed.checkpoint",
                path=shard.file,
            )
        if (value.dtype, value.shape) != (dtype, shape):
            raise CorruptError(
                f"{path} is {dtype} of shape {shape} in {first.file}, and {value.dtype} of {value.shape} in "
                f"{shard.file}: they were not saved together",
                path=shard.file,
            )
    if len(shape) > _MOST_DIMENSIONS:
        raise LayoutError(
            f"{first.file}: {path} is a shard of {len(shape)} dimensions; at most {_MOST_DIMENSIONS} are supported",
            path=first.file,
        )
    pieces = [piece for shard in _needed(path, shards) for piece in _pieces(path, shard)]
    try:
        return SavedTensor.in_pieces(dtype, shape, pieces)
    except CoverageError as error:
        raise CorruptError(
            f"the shards of {path} in {counted(len(shards), 'file')}, from {first.file} on, do not make up a tensor of "
            f"shape {shape}: {error}. A rank's file lacks it, or they are of several saves.",
            path=first.file,
        ) from error


@dataclass(frozen=True, slots=True)
class _Shard:
    file: str
    value: InertShard


def _needed(path: str, shards: Sequence[_Shard]) -> list[_Shard]:
    """Those of a tensor's `shards` that together are all of it, each share once.

    Raises where two are of one place, or lie on meshes or by placements that differ.
    """
    spread = [(shard, shard.value.spread) for shard in shards if shard.value.spread is not None]
    if not spread:
        return list(shards)
    on_mesh = [(shard, one) for shard, one in spread if one.coordinate is not None]
    if not on_mesh:
        return []
    _, head = on_mesh[0]
    places: dict[tuple[int | None, tuple[int, ...] | None], _Shard] = {}
    shares: dict[tuple[int, ...], _Shard] = {}
    for shard, one in on_mesh:
        _check_spread(path, shard, one, on_mesh[0][0], head)
        other = places.setdefault((one.origin, one.coordinate), shard)
        if other is not shard:
            raise CorruptError(
                f"{other.file} and {shard.file} both hold the shard of {path} at {one.coordinate} of its mesh: they "
                "were not saved together, or one is a copy of the other",
                path=shard.file,
            )
        # Tensors that tensor parallelism leaves whole lie on one mesh for each of its ranks: these are copies.
        if one.origin == head.origin:
            shares.setdefault(one.share, shard)
    return list(shares.values())


def _check_spread(path: str, shard: _Shard, spread: Spread, first: _Shard, head: Spread) -> None:
    unknown = [str(one) for one in spread.placements if one.kind not in _READABLE]
    if unknown:
        raise LayoutError(
            f"{shard.file}: {path} is a DTensor placed as {', '.join(unknown)}; only Shard, _StridedShard and "
            "Replicate can be put together. Save it after redistribute(), or as a full tensor",
            path=shard.file,
        )
    if (spread.mesh, spread.placements) != (head.mesh, head.placements):
        raise CorruptError(
            f"{path} is placed as {head} in {first.file}, and as {spread} in {shard.file}: they were not saved "
            "together",
            path=shard.file,
        )


def _pieces(path: str, shard: _Shard) -> Iterator[Piece]:
    value = shard.value
    if value.spread is None:
        for box, tensor in value.boxes:
            if tensor.shape != box.sizes:
                problem = f"has a shard of shape {tensor.shape} for a place of {box.sizes}"
                raise _contradicts(path, shard, problem)
            yield from _piece(path, shard, tensor, box, (0,) * len(box.sizes))
    elif value.local is not None:
        try:
            boxes = kept_boxes(value.shape, value.spread, value.local.shape)
        except SpreadError as error:
            raise _contradicts(path, shard, str(error)) from error
        for box, start in boxes:
            yield from _piece(path, shard, value.local, box, start)


def _piece(
    path: str, shard: _Shard, tensor: SavedTensor, box: Box, start: tuple[int, ...]
) -> Iterator[Piece]:
    """The `box` of the whole, which begins at `start` in the rank's own `tensor`."""
    if tensor.dtype != shard.value.dtype:
        raise _contradicts(path, shard, f"is {shard.value.dtype} and holds a shard of {tensor.dtype}")
    ends = (first + size for first, size in zip(box.starts, box.sizes, strict=True))
    if len(box.sizes) != len(shard.value.shape) or any(
        end > size for end, size in zip(ends, shard.value.shape, strict=True)
    ):
        raise _contradicts(path, shard, f"of shape {shard.value.shape} has a shard at {box.starts}")
    own = tensor.whole
    if own is None or not box.numel:
        return
    if tensor.nbytes > sum(storage.nbytes for storage in tensor.storages):
        raise _contradicts(path, shard, "holds a shard with several elements in one place")
    offset = own.offset + sum(at * step for at, step in zip(start, own.stride, strict=True))
    yield Piece(box, offset, own.stride, own.storage)


def _contradicts(path: str, shard: _Shard, problem: str) -> CorruptError:
    return CorruptError(
        f"{shard.file}: {path} {problem}. The file contradicts itself; take another copy, or save it again.",
        path=shard.file,
    )
