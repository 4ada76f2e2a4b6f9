"""What a checkpoint file holds, before any of it is read: lazy tensors and inert objects. Free of torch.

A file's pickle becomes a tree of dicts, lists, tuples, numbers, strings and bytes, and of the values below.
None of them runs code or reads a storage; `rankload.loader.materialize.facade` turns them into real ones on demand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .dtypes import ITEMSIZE


@dataclass(frozen=True, slots=True)
class StorageRef:
    """One storage's bytes in a local file."""

    file: str
    """Path of the file on this node."""
    key: str
    """The record's name in the zip, or the storage's key in a legacy file."""
    offset: int
    """Of the storage's first byte, from the start of ``file``."""
    nbytes: int
    crc32: int | None
    """What the bytes must sum to; None where the file keeps no checksum."""
    header: int = -1
    """Where its record's header starts, in a zip; its data follow."""


@dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """A tensor that has not been read: where its elements lie, and how they are laid out.

    ``stride`` and ``storage_offset`` count elements of ``dtype``. Whoever makes one has checked that every
    element it can reach lies inside ``storage``.
    """

    storage: StorageRef
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int = 0
    requires_grad: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Row-major without gaps, so that its elements are one byte range of the storage."""
        return self.numel == 0 or is_row_major(self.shape, self.stride)


def is_row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether `stride` is the C-contiguous one for `shape`; strides of dimensions of size 1 do not matter."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


@dataclass(slots=True, eq=False)
class InertObject:
    """An object of some class, as its pickle describes it: what would have been called, never called.

    ``global_name`` is ``module.qualified_name``. ``known`` is True for the classes that real checkpoints are
    known to hold (their fields are in ``state``); an object that is not known is an error wherever it is still
    in the tree once ``ignore_keys`` have been applied, unless ``safe_types`` allows its name.
    """

    global_name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    items: list[Any] = field(default_factory=list)
    """What the pickle appended to it."""
    entries: dict[Any, Any] = field(default_factory=dict)
    """What the pickle set by key."""
    known: bool = False
    via_new: bool = False
    """Whether the pickle asks for ``cls.__new__(cls, *args)`` instead of ``cls(*args)``."""


@dataclass(frozen=True, slots=True)
class GlobalName:
    """A class or function that the pickle holds as a value, by name alone."""

    name: str
    known: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class InertArray:
    """A NumPy array, or a scalar where ``shape`` is () and ``scalar`` is True.

    ``dtype`` is NumPy's own string with byte order (``<u4``); object dtypes are never made.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    fortran_order: bool = False
    scalar: bool = False


UNSUPPORTED = "object"
"""``dtype`` of an array whose elements are Python objects or structures. It has no data."""
