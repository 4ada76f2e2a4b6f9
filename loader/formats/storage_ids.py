"""What a pickle says of a storage: the persistent ids that ``torch.save`` writes. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import CorruptError
from ..saved.dtypes import ITEMSIZE
from ..saved.values import GlobalName
from .pickle.known import STORAGES

_LARGEST = 1 << 62
_LONGEST_KEY = 256


@dataclass(frozen=True, slots=True)
class StorageParts:
    """A storage as a tensor names it; ``numel`` counts elements of ``dtype``."""

    dtype: str
    key: str
    numel: int
    view: tuple[int, int] | None = None
    """First element and count, where a legacy file names a part of the storage."""

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


def storage_parts(pid: tuple[Any, ...]) -> StorageParts:
    """What ``("storage", class, key, location, numel)`` says; legacy files add a view, mostly None.

    Raises `CorruptError` where it is not of that form, or the class is no storage's.
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
    return StorageParts(STORAGES[kind.name], key, numel, _view(pid[5]) if len(pid) == 6 else None)


def _view(view: Any) -> tuple[int, int] | None:
    if view is None:
        return None
    if not isinstance(view, tuple) or len(view) != 3 or not _is_count(view[1]) or not _is_count(view[2]):
        raise CorruptError("a view of a storage without offset and size")
    return view[1], view[2]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST
