"""Parses the persistent ids by which a pickle of ``torch.save`` names storages. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import CorruptError
from ..saved.dtypes import ITEMSIZE
from ..saved.tensor import StorageRef
from ..saved.values import GlobalName, InertObject, kind_of
from .pickle.inert import PickledInertTensor, PickledTensor, QuantizedStorage
from .pickle.known import QUANTIZED_STORAGES, STORAGES

_LARGEST = 1 << 62
"""Elements; no storage has more."""
_LONGEST_KEY = 256


@dataclass(frozen=True, slots=True)
class PersistentId:
    """A storage as a tensor names it."""

    dtype: str
    key: str
    numel: int
    """Elements of ``dtype``."""
    view: tuple[int, int] | None = None
    """First element and count, where a legacy file names a part of the storage."""
    quantized: str = ""
    """The dtype of a quantized tensor's storage, whose integers are of ``dtype``."""
    unknown: str = ""
    """The storage's class, where it is not known; ``dtype`` says nothing then."""

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


def read_storage_id(pid: tuple[Any, ...]) -> PersistentId:
    """The parsed ``("storage", class, key, location, numel)``; legacy files add a view, mostly None.

    The form is that of ``persistent_id`` in ``torch/serialization.py``. Raises `CorruptError` where `pid` is not of it.
    A class that is not known damages nothing: only what uses the storage cannot be restored.
    """
    if len(pid) not in (5, 6):
        raise CorruptError("a storage that is not named by class, key, location and size")
    kind, key, _, numel = pid[1:5]
    if not isinstance(kind, GlobalName | InertObject):
        raise CorruptError("a storage that is not named by class, key, location and size")
    if isinstance(kind, GlobalName) and not kind.name.endswith("Storage"):
        raise CorruptError(f"a storage of the class {kind.name[:80]}, which is none")
    if isinstance(key, bytes):
        key = key.decode("ascii", "replace")
    if not isinstance(key, str) or len(key) > _LONGEST_KEY or not _is_count(numel):
        raise CorruptError("a storage that is not named by class, key, location and size")
    view = _view(pid[5]) if len(pid) == 6 else None
    name = kind_of(kind)
    if name in STORAGES:
        return PersistentId(STORAGES[name], key, numel, view)
    if name in QUANTIZED_STORAGES:
        quantized, dtype = QUANTIZED_STORAGES[name]
        return PersistentId(dtype, key, numel, view, quantized)
    return PersistentId("uint8", key, numel, view, unknown=name)


def same_storage_id(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether `one` names the same as `other`, of which `read_storage_id` has found that it is of its form."""
    if len(one) != 5 or len(other) != 5:
        return False
    _, kind, key, _, numel = one
    _, other_kind, other_key, _, other_numel = other
    return (
        kind is other_kind
        and type(key) is type(other_key)
        and key == other_key
        and type(numel) is int
        and numel == other_numel
    )


def tensor_over(named: PersistentId, storage: StorageRef, numel: int) -> PickledTensor:
    """The one-dimensional tensor over `storage`, of `numel` elements of the dtype that it was named with."""
    if named.quantized:
        return QuantizedStorage(storage, named.dtype, (numel,), quantized=named.quantized)
    return PickledTensor(storage, named.dtype, (numel,), (1,))


def unknown_storage(named: PersistentId) -> PickledInertTensor:
    """What stands for a storage whose class is not known."""
    return PickledInertTensor.unmade(f"storage of class {named.unknown[:200]}")


def _view(view: Any) -> tuple[int, int] | None:
    if view is None:
        return None
    if not isinstance(view, tuple) or len(view) != 3 or not _is_count(view[1]) or not _is_count(view[2]):
        raise CorruptError("a view of a storage without offset and size")
    return view[1], view[2]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST
