"""Gives a parameter's tensors, which lie in the partitions of several saved ranks, as `SavedTensor`. Pure.

Nothing is put together: a tensor lists which elements of which files' flat tensors make it up. Those that lie in files
that this rank has not read are in it too, as `Unread`: they are an error only where they are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ...errors import CorruptError
from ...saved.partitions import Slot, padded_share
from ...saved.regions import CoverageError, Run
from ...saved.shares import FlatShares, Shares
from ...saved.tensor import Piece, RowTensor, SavedTensor, StorageRef, Unread
from .contents import ZeroContents
from .layout import FROZEN_GROUP, SavedParameter

FROZEN = "frozen"
"""The kind of a frozen parameter at stage 3, whose shares are in the model files: it has no other."""

_SHOWN = 8
"""How many ranks that do not follow each other a message lists."""


def all_partitioned(zero: ZeroContents, kinds: Sequence[str]) -> dict[str, Mapping[str, SavedTensor]]:
    """As `partitioned`, for every parameter that an optimizer updates, by its name."""
    partitions: dict[int, _Partitions | None] = {}
    found: dict[str, Mapping[str, SavedTensor]] = {}
    for name, parameter in zero.checkpoint.parameters.items():
        group = parameter.group
        if group == FROZEN_GROUP:
            continue
        if group not in partitions:
            partitions[group] = _partitions(zero, parameter, kinds)
        own = partitions[group]
        tensors = None if own is None else _in_a_partition(own, parameter)
        found[name] = partitioned(zero, parameter, kinds) if tensors is None else tensors
    return found


class _Partitions(NamedTuple):
    """The partitions of a group that were read, of stages 1 and 2."""

    size: int
    """Elements of each."""
    ranks: Sequence[int]
    """The saved ranks that have them, in order."""
    rows: tuple[tuple[str, str, Mapping[int, Piece]], ...]
    """For each kind that the files have: its dtype, and by saved rank all of its partition."""


def _partitions(zero: ZeroContents, parameter: SavedParameter, kinds: Sequence[str]) -> _Partitions | None:
    """The partitions of `parameter`'s group; None where its parameters do not lie in partitions."""
    checkpoint = zero.checkpoint
    if checkpoint.partitioned or not checkpoint.stage or not checkpoint.partition_numel:
        return None
    rows = ((kind, *_rows(zero, parameter, kind)) for kind in kinds)
    return _Partitions(
        checkpoint.partition_numel[parameter.group],
        checkpoint.ranks_of(parameter),
        tuple((kind, dtype, row) for kind, dtype, row in rows if dtype is not None),
    )


def _in_a_partition(partitions: _Partitions, parameter: SavedParameter) -> dict[str, SavedTensor] | None:
    """The tensors of a parameter that lies in one partition as a whole; None where it does not, or was not read."""
    _, shape, _, offset = parameter
    numel, size = math.prod(shape), partitions.size
    index = offset // size if size else 0
    start = offset - index * size
    if not numel or start + numel > size or index >= len(partitions.ranks):
        return None
    rank = partitions.ranks[index]
    tensors: dict[str, SavedTensor] = {}
    for kind, dtype, rows in partitions.rows:
        row = rows.get(rank)
        if row is None or row.stride != (1,) or start + numel > row.region.numel:
            return None
        storage = row.storage
        if not isinstance(storage, StorageRef):
            return None
        tensors[kind] = RowTensor(storage, dtype, shape, row.offset + start)
    return tensors


def partitioned(
    zero: ZeroContents, parameter: SavedParameter, kinds: Iterable[str]
) -> dict[str, SavedTensor]:
    """The tensors of `parameter` of these `kinds`: the fp32 masters, or a key of the optimizer's state.

    A kind of which the files that were read have nothing for the parameter's group is left out. Raises `CorruptError`
    where the layout does not place all elements, or a file's tensor is shorter than what lies in it, and `LayoutError`
    where the tensors of several saved ranks differ in their dtype.
    """
    kinds = list(kinds)
    if zero.checkpoint.stage == 0:
        found = {kind: zero.flat(parameter, kind, 0) for kind in kinds}
        return {kind: tensor for kind, tensor in found.items() if tensor is not None}
    in_shares = {kind: _in_shares(zero, parameter, kind) for kind in kinds}
    if kinds and all(in_shares.values()):
        return {kind: tensor for kind, tensor in in_shares.items() if tensor is not None}
    try:
        parts = list(_parts(zero, parameter))
    except CoverageError as error:
        raise CorruptError(
            f"{zero.models[0].file}: {', '.join(kinds)} of {parameter.name}: {error}",
            path=zero.models[0].file,
        ) from error
    tensors = {}
    for kind in kinds:
        dtype, rows = _rows(zero, parameter, kind)
        if dtype is None:
            continue
        pieces = []
        for part in parts:
            if isinstance(part, Piece):
                pieces.append(part)
                continue
            row = rows.get(part.rank)
            if row is None or part.start + part.run.length > row.region.numel:
                pieces.append(_piece(zero, parameter, kind, part, dtype))
            else:
                (step,) = row.stride
                pieces.append(Piece(part.run, row.offset + part.start * step, row.stride, row.storage))
        tensors[kind] = SavedTensor(dtype, parameter.shape, tuple(pieces))
    return tensors


def _in_shares(zero: ZeroContents, parameter: SavedParameter, kind: str) -> SavedTensor | None:
    """The tensor of a parameter of stage 3, whose pieces are made as they are asked for.

    None where the saved ranks that were read do not follow each other, or their tensors are not all alike: then each
    piece is looked at by itself.
    """
    checkpoint = zero.checkpoint
    if not checkpoint.partitioned or parameter.frozen or not parameter.numel:
        return None
    flats, dtype = _flat_shares(zero, kind, parameter.group)
    share = padded_share(parameter.numel, checkpoint.world_size)
    if flats is None or parameter.offset + share > flats.numel:
        return None
    first = min(flats.first * share, parameter.numel)
    stop = min((flats.first + len(flats.storages)) * share, parameter.numel)
    before, after = Run(0, first), Run(stop, parameter.numel - stop)
    pieces = Shares(
        flats,
        numel=parameter.numel,
        share=share,
        start=parameter.offset,
        before=[_unread(zero, parameter, before)] if before.length else (),
        after=[_unread(zero, parameter, after)] if after.length else (),
    )
    return SavedTensor(dtype, parameter.shape, pieces)


def _flat_shares(zero: ZeroContents, kind: str, group: int) -> tuple[FlatShares | None, str]:
    """The flat tensors of the saved ranks that were read, and their dtype; None where they are not all alike."""
    if (kind, group) not in zero.flat_shares:
        zero.flat_shares[kind, group] = _all_alike(
            min(zero.optims, default=0),
            [zero.optims[rank].tensors.get(kind, {}).get(group) for rank in sorted(zero.optims)],
            consecutive=len(zero.optims) == max(zero.optims, default=0) - min(zero.optims, default=0) + 1,
        )
    return zero.flat_shares[kind, group]


def _all_alike(
    first: int, tensors: Sequence[SavedTensor | None], *, consecutive: bool
) -> tuple[FlatShares | None, str]:
    wholes = [tensor.whole for tensor in tensors if tensor is not None and len(tensor.shape) == 1]
    storages = [one.storage for one in wholes if one is not None and isinstance(one.storage, StorageRef)]
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    places = {(one.offset, one.stride) for one in wholes if one is not None}
    if not consecutive or len(storages) < len(tensors) or len(dtypes) != 1 or len(places) != 1:
        return None, ""
    ((offset, stride),) = places
    if stride != (1,):
        return None, ""
    shortest = min(tensor.numel for tensor in tensors if tensor is not None)
    return FlatShares(first, tuple(storages), offset, shortest), dtypes.pop()


def _rows(zero: ZeroContents, parameter: SavedParameter, kind: str) -> tuple[str | None, Mapping[int, Piece]]:
    """The dtype of the tensors with `parameter`'s elements, None where there are none, and by saved rank all of each
    that is as it should be.

    All parameters of a group lie in the same tensors, which are looked at once.
    """
    known = None if parameter.frozen else zero.rows.get((kind, parameter.group))
    if known is not None:
        return known
    flats = {rank: zero.flat(parameter, kind, rank) for rank in sorted(zero.holders(parameter))}
    dtype = next(
        (flat.dtype for flat in flats.values() if flat is not None), "float32" if kind == FROZEN else None
    )
    rows = {
        rank: flat.whole
        for rank, flat in flats.items()
        if flat is not None and flat.whole is not None and len(flat.shape) == 1 and flat.dtype == dtype
    }
    if not parameter.frozen:
        zero.rows[kind, parameter.group] = dtype, rows
    return dtype, rows


def _parts(zero: ZeroContents, parameter: SavedParameter) -> Iterator[Slot | Piece]:
    """Where the elements lie, in their order; what is in files that were not read is one piece, however many they are.

    The same for every kind. A rank of a large job reads the files of few, so there are few parts.
    """
    position = 0
    for slot in zero.checkpoint.pieces(parameter.name, zero.holders(parameter)):
        if slot.run.start > position:
            yield _unread(zero, parameter, Run(position, slot.run.start - position))
        yield slot
        position = slot.run.stop
    if position < parameter.numel:
        yield _unread(zero, parameter, Run(position, parameter.numel - position))


def _unread(zero: ZeroContents, parameter: SavedParameter, run: Run) -> Piece:
    ranks = _listed(zero.checkpoint.holders(parameter.name, run))
    return Piece(run, 0, (1,), Unread(f"lies partly in the files of saved {ranks}, which were not read"))


def _listed(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if isinstance(ranks, range) or list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks[:_SHOWN]))}{', ...' * (len(ranks) > _SHOWN)}"


def _piece(zero: ZeroContents, parameter: SavedParameter, kind: str, slot: Slot, dtype: str) -> Piece:
    """The elements of `slot` where they lie in the file of its rank, which was read."""
    flat = zero.flat(parameter, kind, slot.rank)
    what = "share" if kind == FROZEN else kind
    if flat is None:
        reason = f"cannot be restored: saved rank {slot.rank} has no {what} of it"
        return Piece(slot.run, 0, (1,), Unread(reason))
    whole = flat.whole
    stop = slot.start + slot.run.length
    if whole is None or len(flat.shape) != 1 or flat.numel < stop or flat.dtype != dtype:
        raise _wrong(zero, parameter, what, slot, flat, dtype)
    (step,) = whole.stride
    return Piece(slot.run, whole.offset + slot.start * step, whole.stride, whole.storage)


def _wrong(
    zero: ZeroContents, parameter: SavedParameter, what: str, slot: Slot, flat: SavedTensor, dtype: str
) -> CorruptError:
    file = zero.holders(parameter)[slot.rank].file
    told = f"{file}: the tensor with the {what} of {parameter.name}, of saved rank {slot.rank},"
    stop = slot.start + slot.run.length
    if len(flat.shape) != 1:
        return CorruptError(f"{told} has shape {flat.shape}, expected one dimension", path=file)
    if flat.numel < stop:
        return CorruptError(f"{told} has {flat.numel} elements, expected at least {stop}", path=file)
    return CorruptError(
        f"{told} has dtype {flat.dtype}, and that of another rank {dtype}: they were not saved together",
        path=file,
    )
