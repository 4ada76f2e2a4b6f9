"""Describes a saved tensor that was not read: of which pieces it is made, and where the elements of each lie. Pure.

A tensor of an ordinary file is one piece: all of it, in one storage. One that ZeRO partitioned is made of runs in the
flat tensors of several files, one of a sharded checkpoint of boxes. It is never put together as a whole: a target asks
`fill` which elements of which storages go where in the memory that it keeps.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..plurals import counted
from .dtypes import ITEMSIZE
from .regions import (
    CoverageError,
    Laid,
    Run,
    as_run,
    check_cover,
    extent,
    hull,
    intersect,
    row_major_stride,
    whole_box,
)
from .strided import Box, Layout

if TYPE_CHECKING:
    from typing_extensions import Self

StorageId = tuple[str, str]
"""A storage's name on every rank: its file's name, the same on all of them, and its key there."""


@dataclass(frozen=True, slots=True)
class StorageRef:
    """Where one storage's bytes lie in a local file."""

    file: str
    """Path of the file on this node."""
    key: str
    """The record's name in the zip, or the storage's key in a legacy file."""
    offset: int
    """Of the storage's first byte, from the start of ``file``, in bytes."""
    nbytes: int
    crc32: int | None
    """The CRC-32 that the bytes must have; None where the file states none."""
    header: int = -1
    """Where the header of its record starts in a zip, in bytes; the storage follows it. -1 in other files."""

    def __hash__(self) -> int:
        # There are as many as tensors, and each is looked up often. The ranks' files have theirs at the same
        # offsets, under the same keys.
        return hash((self.file, self.offset))


@dataclass(frozen=True, slots=True)
class Unread:
    """In place of a storage, one that this rank does not know: its file was not read, or does not have it."""

    reason: str
    """For the message of who needs it after all: ``lies in the files of saved rank 3, which were not read``."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece(Laid):
    """A region of a saved tensor whose elements lie in one storage; ``offset`` and ``stride`` count elements in it."""

    storage: StorageRef | Unread


@dataclass(frozen=True, slots=True, eq=False)
class SavedTensor:
    """A tensor of a checkpoint that was not read.

    The code that makes one makes sure that every piece lies inside its storage, and that several hold each element
    once (`in_pieces` checks that); they are in the order of their first elements.
    """

    dtype: str
    """The name that follows ``torch.``."""
    shape: tuple[int, ...]
    pieces: Sequence[Piece]
    """A tuple, or `shares.Shares`, which makes them as they are asked for."""
    requires_grad: bool = False

    def __repr__(self) -> str:
        piece = self.whole
        where = f"in {counted(len(self.pieces), 'piece')}"
        if piece is not None and isinstance(piece.storage, StorageRef):
            where = f"all in {piece.storage.key}"
        return f"<{self.dtype} {self.shape}, {where}>"

    @classmethod
    def in_storage(
        cls,
        storage: StorageRef,
        dtype: str,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        offset: int = 0,
        *,
        requires_grad: bool = False,
    ) -> Self:
        """A tensor whose elements all lie in one storage, as ``torch.save`` writes it."""
        piece = Piece(whole_box(shape), offset, stride, storage)
        return cls(dtype, shape, (piece,), requires_grad)

    @classmethod
    def in_pieces(cls, dtype: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> Self:
        """A tensor made of `pieces`, in any order. Raises `CoverageError` unless they hold each element once."""
        check_cover(shape, [piece.region for piece in pieces])
        filled = [piece for piece in pieces if piece.region.numel]
        in_order = sorted(filled, key=lambda piece: extent(shape, piece.region))
        return cls(dtype, shape, tuple(in_order))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, each counted once."""
        return self.numel * self.itemsize

    @property
    def whole(self) -> Piece | None:
        """The one piece that is all of it, in one storage and a box; None for a tensor in runs, shards or unread."""
        pieces = self.pieces
        if len(pieces) != 1:
            return None
        piece = pieces[0]
        known = isinstance(piece.region, Box) and isinstance(piece.storage, StorageRef)
        return piece if known else None

    @property
    def row(self) -> tuple[StorageRef, int] | None:
        """The storage that has all elements, in row-major order without gaps, and the place of the first one there.

        None for any other tensor, and for some that repeat dimensions of one element.
        """
        pieces = self.pieces
        if len(pieces) != 1:
            return None
        piece = pieces[0]
        region = piece.region
        if not isinstance(piece.storage, StorageRef):
            return None
        if isinstance(region, Run):
            in_order = piece.stride == (1,) and region == Run(0, self.numel)
        else:
            in_order = piece.stride == row_major_stride(self.shape) and region == whole_box(self.shape)
        return (piece.storage, piece.offset) if in_order else None

    @property
    def storages(self) -> tuple[StorageRef, ...]:
        """The storages of its pieces that are known, each once."""
        known = (piece.storage for piece in self.pieces)
        return tuple(dict.fromkeys(one for one in known if isinstance(one, StorageRef)))

    @property
    def is_contiguous(self) -> bool:
        """Whether it lies in one storage, row-major without gaps, so that its elements are one range of bytes."""
        if self.numel == 0:
            return True
        piece = self.whole
        return piece is not None and Layout(self.shape, piece.stride, 0).is_contiguous


class RowTensor(SavedTensor):
    """A tensor whose elements follow each other in one storage, as a run: those of a parameter in a partition.

    Its one piece is made when it is asked for: there are several of these for each parameter.
    """

    __slots__ = ("_offset", "_storage")
    _storage: StorageRef
    _offset: int

    def __init__(self, storage: StorageRef, dtype: str, shape: tuple[int, ...], offset: int) -> None:
        keep = object.__setattr__
        keep(self, "_storage", storage)
        keep(self, "dtype", dtype)
        keep(self, "shape", shape)
        keep(self, "_offset", offset)
        keep(self, "requires_grad", False)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (Piece(Run(0, self.numel), self._offset, (1,), self._storage),)

    @property
    def whole(self) -> None:
        return None

    @property
    def row(self) -> tuple[StorageRef, int]:
        return self._storage, self._offset

    def __reduce__(self) -> tuple[Any, ...]:
        return SavedTensor, (self.dtype, self.shape, self.pieces, self.requires_grad)


def same_shape(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether tensors of these shapes fit each other: () and (1,) do, as in `of_one_element`."""
    return one == other or {one, other} == {(), (1,)}


def of_one_element(tensor: SavedTensor, shape: tuple[int, ...]) -> SavedTensor:
    """`tensor` with `shape`, where one of the two shapes is () and the other (1,); else `tensor` as it is.

    Old versions of torch had no tensors without dimensions, and saved a number as a tensor of shape (1,).
    """
    if tensor.shape == shape or not same_shape(tensor.shape, shape):
        return tensor
    whole = whole_box(shape)
    stride = (1,) * len(shape)
    pieces = tuple(
        Piece(whole, piece.offset, stride, piece.storage) if isinstance(piece.region, Box) else piece
        for piece in tensor.pieces
    )
    return SavedTensor(tensor.dtype, shape, pieces, tensor.requires_grad)


def fill(tensor: SavedTensor, into: Laid) -> Iterator[tuple[Piece, Layout, Layout]]:
    """What fills the region `into` of `tensor`: a piece, where the elements lie in its storage, and where in `into`.

    Each element of the region is in exactly one of the results. Few pieces of many are looked at where they lie in the
    tensor's order. Raises `CoverageError` where the pieces do not have all elements.
    """
    wanted = into.region.numel
    if not wanted:
        return
    found = 0
    in_order = as_run(tensor.shape, into)
    for piece in _near(tensor, into):
        for source, target in intersect(
            tensor.shape, piece, in_order if isinstance(piece.region, Run) else into
        ):
            found += math.prod(source.shape)
            yield piece, source, target
    if found != wanted:
        raise CoverageError(f"{found} of {wanted} wanted elements are in the saved pieces")


def _near(tensor: SavedTensor, into: Laid) -> Sequence[Piece]:
    """The pieces that may have elements of `into`."""
    shape, pieces = tensor.shape, tensor.pieces
    if len(pieces) < 8:
        return pieces
    first, stop = extent(shape, into.region)
    low = 0
    high = bisect_left(pieces, stop, key=lambda piece: extent(shape, piece.region)[0])
    if all(isinstance(piece.region, Run) for piece in pieces):
        low = bisect_right(pieces, first, hi=high, key=lambda piece: extent(shape, piece.region)[1])
        if isinstance(into.region, Run):
            return pieces[low:high]
    bounds = hull(shape, into.region)
    if bounds.numel == tensor.numel:
        return pieces[low:high]
    # Most pieces are another part of the first dimension, which is told without a call for each.
    begin, end = bounds.starts[0], bounds.starts[0] + bounds.sizes[0]
    return [
        piece
        for piece in pieces[low:high]
        if not (
            isinstance(box := piece.region, Box)
            and (box.starts[0] >= end or box.starts[0] + box.sizes[0] <= begin)
        )
        and _meet(hull(shape, box), bounds)
    ]


def _meet(one: Box, other: Box) -> bool:
    """Whether there are elements that are in both; of boxes that have any."""
    for first, size, other_first, other_size in zip(
        one.starts, one.sizes, other.starts, other.sizes, strict=True
    ):
        if first >= other_first + other_size or other_first >= first + size:
            return False
    return True
