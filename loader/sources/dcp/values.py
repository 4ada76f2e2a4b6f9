"""Makes saved tensors and objects of a DCP folder's items, whose indexes were read. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import CorruptError, FormatError
from ...formats.dcp_metadata import Chunk, ChunkedTensor, Item, Metadata
from ...formats.torch_file import FileIndex
from ...saved.regions import CoverageError, row_major_stride
from ...saved.tensor import Piece, SavedTensor, StorageRef, Unread
from ...saved.values import InertObject, kind_of

Indexes = Mapping[Item, FileIndex]

_MOST_DIMENSIONS = 16
"""Of a tensor: whether chunks cover it takes a step for each corner of each."""
_NOT_READ = Unread("lies in items of the checkpoint that this rank did not read")


def blank(metadata: Metadata) -> dict[str, Any]:
    """A stand-in for each value, by key: a tensor of which nothing was read, or an object of unknown class."""
    tensors = {key: SavedTensor(one.dtype, one.shape, ()) for key, one in metadata.tensors.items()}
    return {**tensors, **{key: InertObject("an item that was not read") for key in metadata.objects}}


def values(metadata: Metadata, indexes: Indexes, *, name: str) -> dict[str, Any]:
    """The values by key. Objects whose items were not read are left out; `name` is what messages call the metadata.

    Raises `CorruptError` where the chunks of a tensor do not cover it, or an item holds something else than a chunk.
    """
    tensors = {key: _tensor(key, one, indexes, name) for key, one in metadata.tensors.items()}
    objects = {key: indexes[item].tree for key, item in metadata.objects.items() if item in indexes}
    return {**tensors, **objects}


def _tensor(key: str, tensor: ChunkedTensor, indexes: Indexes, name: str) -> SavedTensor:
    # A chunk that several ranks had may be listed for each.
    chunks = {chunk.box: chunk for chunk in tensor.chunks}
    if len(tensor.shape) > _MOST_DIMENSIONS:
        raise FormatError(
            f"{name}: {key} has {len(tensor.shape)} dimensions; at most {_MOST_DIMENSIONS} are supported",
            path=name,
        )
    pieces = [_piece(key, tensor.dtype, chunk, indexes.get(chunk.item)) for chunk in chunks.values()]
    try:
        return SavedTensor.in_pieces(tensor.dtype, tensor.shape, pieces)
    except CoverageError as error:
        raise CorruptError(
            f"{name}: the chunks of {key} do not make a tensor of shape {tensor.shape}: {error}. The save was not "
            "finished, or the file is damaged; take another checkpoint",
            path=name,
        ) from error


def _piece(key: str, dtype: str, chunk: Chunk, index: FileIndex | None) -> Piece:
    box = chunk.box
    if index is None:
        return Piece(box, 0, row_major_stride(box.sizes), _NOT_READ)
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
