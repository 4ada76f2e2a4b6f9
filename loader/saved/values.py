"""Holds what a torch file's pickle describes, beside tensors: inert objects, arrays and names. Free of torch.

`formats` turns a pickle into a tree of dicts, lists, tuples, numbers, strings and bytes, of `tensor.SavedTensor` and of
the values below. They run no code and read no storage; `materialize.objects` makes real ones of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .shards import Spread
from .strided import Box
from .tensor import SavedTensor

UNSUPPORTED = "object"
"""The ``dtype`` of an `InertArray` whose elements are Python objects or structures; its data are not kept."""


@dataclass(slots=True, eq=False)
class InertObject:
    """An object as its pickle describes it: the class or function that the pickle calls, which is never called here.

    ``global_name`` is ``module.qualified_name``. ``known`` is True for those that real checkpoints hold
    (`formats.pickle.known`). Any other is an error where it would be restored, unless ``safe_types`` allows its
    name, and stays as it is elsewhere.
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


@dataclass(slots=True, eq=False)
class InertTensor(InertObject):
    """A tensor whose values are not the bytes of one storage: sparse, quantized, conjugated, a shard, of a subclass ...

    Where ``known``, `materialize.objects` makes it as a whole of the saved tensors in ``args``, as the torch function
    ``global_name`` does; `dtype`, `shape` and `layout` are checked against what they hold. Others cannot be made, and
    only `kind` says what they are.
    """

    kind: str = "tensor of an unknown kind"
    """What messages call it, after "a"."""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    layout: str = "strided"
    """``strided``, ``sparse_coo``, ``sparse_csr`` and so on, or a quantized tensor's scheme (``per_tensor_affine``)."""


@dataclass(slots=True, eq=False)
class InertShard(InertTensor):
    """What one rank has saved of a tensor that is spread over ranks: a DTensor, or a ShardedTensor.

    `dtype` and `shape` are those of the whole tensor. It can be restored together with the other ranks' shards alone,
    by the source that reads all of their files; where its file is restored by itself, it is an inert tensor as any.
    """

    spread: Spread | None = None
    """Of a DTensor: how it lies on its mesh, and this rank's place there."""
    local: SavedTensor | None = None
    """Of a DTensor: what this rank holds."""
    boxes: tuple[tuple[Box, SavedTensor], ...] = ()
    """Of a ShardedTensor: what this rank holds, each with its place in the whole."""
    world_size: int = 0
    """Ranks of the job that saved it, as far as it tells."""
    problem: str = ""
    """Why it is not known where the shard lies, naming the class and the field; "" where it is."""


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
    if isinstance(value, SavedTensor):
        return "tensor"
    if isinstance(value, InertTensor):
        return value.kind
    if isinstance(value, InertArray):
        return "NumPy array" if value.dtype != UNSUPPORTED else "NumPy array of Python objects"
    if isinstance(value, InertObject):
        return value.global_name
    if isinstance(value, GlobalName):
        return value.name
    return type(value).__name__


def is_tensor(value: Any) -> bool:
    """Whether `value` was a tensor when it was saved, whether or not it can be restored."""
    return isinstance(value, SavedTensor | InertTensor)


def can_be_restored(value: Any) -> bool:
    """Whether `value` is a tensor that can be restored, piece by piece or made as a whole."""
    return isinstance(value, SavedTensor) or (isinstance(value, InertTensor) and value.known)
