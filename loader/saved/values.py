"""Holds what a torch file's pickle describes: lazy tensors, inert objects, arrays and names. Free of torch.

`formats` turns a pickle into a tree of dicts, lists, tuples, numbers, strings and bytes, and of the values below. They
run no code and read no storage; `materialize.objects` makes real ones of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .dtypes import ITEMSIZE

UNSUPPORTED = "object"
"""The ``dtype`` of an `InertArray` whose elements are Python objects or structures; its data are not kept."""


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


@dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """A tensor that has not been read: where its elements lie, and how they are laid out.

    ``stride`` and ``storage_offset`` count elements of ``dtype``. The code that makes one checks that all its elements
    lie inside ``storage``.
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
        """Whether it is row-major without gaps, so that its elements are one byte range of the storage."""
        return self.numel == 0 or _is_row_major(self.shape, self.stride)


@dataclass(slots=True, eq=False)
class InertObject:
    """An object as its pickle describes it: the class or function that the pickle calls, which is never called here.

    ``global_name`` is ``module.qualified_name``. ``known`` is True for those that real checkpoints hold
    (`formats.pickle.known`). Any other that is still in the tree after ``ignore_keys`` is an error, unless
    ``safe_types`` allows its name.
    """

    global_name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    items: list[Any] = field(default_factory=list)
    """Items that the pickle appends to it."""
    entries: dict[Any, Any] = field(default_factory=dict)
    """Items that the pickle sets by key."""
    known: bool = False
    via_new: bool = False
    """Whether the pickle makes it by ``cls.__new__(cls, *args)`` instead of ``cls(*args)``."""


@dataclass(frozen=True, slots=True)
class GlobalName:
    """A class or function that is itself a value in the pickle; only its name."""

    name: str
    known: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class InertArray:
    """The bytes of a NumPy array; of a scalar where ``scalar`` is True, whose ``shape`` is ().

    ``dtype`` is NumPy's string with the byte order (``<u4``), or `UNSUPPORTED`.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    fortran_order: bool = False
    scalar: bool = False


def kind_of(value: Any) -> str:
    """What `value` was to whoever saved it, for messages: ``tensor``, ``NumPy array``, or the name of its class."""
    if isinstance(value, LazyTensor):
        return "tensor"
    if isinstance(value, InertArray):
        return "NumPy array"
    if isinstance(value, InertObject):
        return value.global_name
    if isinstance(value, GlobalName):
        return value.name
    return type(value).__name__


def _is_row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether `stride` is that of a C-contiguous tensor of `shape`; dimensions of size 1 may have any."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
