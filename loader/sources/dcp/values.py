"""Makes saved tensors and objects of a DCP folder's items, whose indexes were read. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import CorruptError, FormatError
from ...formats.dcp_metadata import ChunkedTensor, Metadata
from ...formats.torch_file import FileIndex
from ...saved.division import Division
from ...saved.regions import row_major_stride
from ...saved.strided import Box
from ...saved.tensor import Piece, SavedTensor, StorageRef, Unread
from ...saved.values import InertObject, kind_of

Indexes = Mapping[int, FileIndex]
"""Of the items of one key: by their numbers, of an object under 0."""

_MOST_DIMENSIONS = 16
"""Of a tensor: whether chunks cover it takes a step for each corner of each."""
_NOT_READ = Unread("lies in items of the checkpoint that this rank did not read")


def blank(metadata: Metadata) -> dict[str, Any]:
    """A stand-in for each value, by key: a tensor of which nothing was read, or an object of unknown class."""
    tensors = {key: SavedTensor(one.dtype, one.shape, ()) for key, one in metadata.tensors.items()}
    return {**tensors, **{key: InertObject("an item that was not read") for key in metadata.objects}}


def values(metadata: Metadata, read: Mapping[str, Indexes], *, name: str) -> dict[str, Any]:
    """The values by key. Objects whose items were not read are left out; `name` is what messages call the metadata.

    Raises `CorruptError` where the chunks of a tensor do not cover it, or an item holds something else than a chunk.
    """
    unread: dict[int, list[Piece]] = {}
    tensors: dict[str, Any] = {}
    for key, tensor in metadata.tensors.items():
        division = tensor.division
        if id(division) not in unread:
            _check_dimensions(key, division, name)
            unread[id(division)] = _unread(division)
        tensors[key] = _tensor(key, tensor, read.get(key, {}), unread[id(division)], name)
    return {**tensors, **{key: read[key][0].tree for key in metadata.objects if key in read}}


def _check_dimensions(key: str, division: Division, name: str) -> None:
    if len(division.shape) > _MOST_DIMENSIONS:
        raise FormatError(
            f"{name}: {key} has {len(division.shape)} dimensions; at most {_MOST_DIMENSIONS} are supported",
            path=name,
        )


def _unread(division: Division) -> list[Piece]:
    """A piece for each box, of which nothing was read; tensors that are cut alike share them."""
    boxes = [division.boxes[number] for number in division.order]
    return [Piece(box, 0, row_major_stride(box.sizes), _NOT_READ) for box in boxes]


def _tensor(key: str, tensor: ChunkedTensor, indexes: Indexes, unread: list[Piece], name: str) -> SavedTensor:
    division = tensor.division
    pieces = unread.copy()
    for number, index in indexes.items():
        piece = _piece(tensor.dtype, division.boxes[number], index)
        # A chunk that several ranks had may be listed for each, and one without elements is no piece.
        if division.place[number] >= 0:
            pieces[division.place[number]] = piece
    if division.problem:
        raise CorruptError(
            f"{name}: the chunks of {key} do not make a tensor of shape {tensor.shape}: {division.problem}. The save "
            "was not finished, or the file is damaged; take another checkpoint",
            path=name,
        )
    return SavedTensor(tensor.dtype, tensor.shape, tuple(pieces))


def _piece(dtype: str, box: Box, index: FileIndex) -> Piece:
    saved = index.tree
    whole = saved.whole if isinstance(saved, SavedTensor) else None
    if (
        whole is None
        or not isinstance(whole.storage, StorageRef)
        or (saved.dtype, saved.shape) != (dtype, box.sizes)
    ):
        got = f"{saved.dtype} {saved.shape}" if isinstance(saved, SavedTensor) else f"a {kind_of(saved)}"
        raise CorruptError(
            f"{index.name}: expected a tensor {dtype} {box.sizes}, got {got}: the files are not of one save, or are "
            "damaged; take another checkpoint",
            path=index.name,
        )
    return Piece(box, whole.offset, whole.stride, whole.storage)
