"""Parses the persistent ids by which a pickle of ``torch.save`` names storages. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import CorruptError
from ..saved.dtypes import ITEMSIZE
from ..saved.values import GlobalName
from .pickle.known import STORAGES

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

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


def read_storage_id(pid: tuple[Any, ...]) -> PersistentId:
    """The parsed ``("storage", class, key, location, numel)``; legacy files add a view, mostly None.

    The form is that of ``persistent_id`` in ``torch/serialization.py``. Raises `CorruptError` where `pid` is not of it,
    or its class is no storage class.
    """
    if len(pid) not in (5, 6):
        raise CorruptError("a storage that is not named by class, key, location and size")
    kind, key, _, numel = pid[1:5]
    if not isinstance(kind, GlobalName) or kind.name not in STORAGES:
        raise CorruptError(f"a storage of unknown class {getattr(kind, 'name', '')[:80]}")
    if isinstance(key, bytes):
        key = key.decode("ascii", "replace")
    if not isinstance(key, str) or len(key) > _LONGEST_KEY or not _is_count(numel):
        raise CorruptError("a storage that is not named by class, key, location and size")
    return PersistentId(STORAGES[kind.name], key, numel, _view(pid[5]) if len(pid) == 6 else None)


def _view(view: Any) -> tuple[int, int] | None:
    if view is None:
        return None
    if not isinstance(view, tuple) or len(view) != 3 or not _is_count(view[1]) or not _is_count(view[2]):
        raise CorruptError("a view of a storage without offset and size")
    return view[1], view[2]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST
