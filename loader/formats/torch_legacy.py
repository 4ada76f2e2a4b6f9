"""Torch files of the format before 1.6: pickles in a row, then the storages' bytes. Free of torch.

magic number, protocol version, system's properties, the object, storage keys: five pickles,
then for each key a count of elements (8 bytes) and the elements. Nothing is checksummed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from ..errors import CorruptError, FormatError, UnsafeError
from ..saved.values import LazyTensor, StorageRef
from .pickle.inert import SealedTensor
from .pickle.read import read_pickle
from .pickle.scan import PickleScan, scan_beginning, scan_pickle
from .sniff import LEGACY_MAGIC
from .storage_ids import storage_parts

_PROTOCOL_VERSION = 1001
_FIRST_WINDOW = 1 << 20


@dataclass(frozen=True, slots=True)
class _Piece:
    """One pickle of the row: its bytes are ``data[start:scan.end]``."""

    start: int
    scan: PickleScan


def read_legacy(path: str, *, name: str, memory_limit: int) -> tuple[Any, tuple[StorageRef, ...]]:
    """The tree of the legacy torch file at `path`, and its storages in the order of the file.

    Raises `CorruptError` where it is truncated or contradicts itself, `UnsafeError` as `scan_pickle` does,
    `FormatError` where it was written on a big-endian machine.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        data, pieces = _scan_pickles(file, size, name, memory_limit)

        def load(index: int, **options: Any) -> Any:
            piece = pieces[index]
            return read_pickle(
                data, piece.scan, name=name, memory_limit=memory_limit, start=piece.start, **options
            )

        if load(0) != LEGACY_MAGIC or load(1) != _PROTOCOL_VERSION:
            raise FormatError(f"{name}: a torch file of an unknown legacy version.", path=name)
        system = load(2)
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise FormatError(
                f"{name}: written on a big-endian machine, which is not supported. Save it again on a "
                "little-endian one.",
                path=name,
            )
        keys = load(4)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise CorruptError(f"{name}: its list of storage keys is no list of text.", path=name)
        # How long a storage is in bytes depends on its element type, which only the object's pickle says.
        claims = _Claims(path, size)
        load(3, find_storage=claims.claim)
        places = _place_storages(file, keys, claims, pieces[4].scan.end, size, path, name)
    tree = load(3, find_storage=_Places(places).find)
    return tree, tuple(places.values())


def _scan_pickles(file: BinaryIO, size: int, name: str, memory_limit: int) -> tuple[bytes, list[_Piece]]:
    """The file's first bytes, enough of them to hold all five pickles, and where each of those lies."""
    window = min(size, _FIRST_WINDOW)
    while True:
        file.seek(0)
        data = file.read(window)
        if len(data) != window:
            raise CorruptError(f"{name}: it was truncated while it was read.", path=name)
        pieces: list[_Piece] = []
        start = 0
        whole = window == size
        while len(pieces) < 5:
            if whole:
                scan: PickleScan | None = scan_pickle(data, name=name, start=start, memory_limit=memory_limit)
            else:
                scan = scan_beginning(data, name=name, start=start, memory_limit=memory_limit)
            if scan is None:
                break
            pieces.append(_Piece(start, scan))
            start = scan.end
        else:
            return data, pieces
        window = min(size, 4 * window)


class _Claims:
    """Collects what the object's pickle says of each storage: how long its elements are."""

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        self.size = size
        self.itemsize: dict[str, int] = {}

    def claim(self, pid: tuple[Any, ...]) -> LazyTensor:
        parts = storage_parts(pid)
        self.itemsize.setdefault(parts.key, parts.itemsize)
        whole = StorageRef(self.path, parts.key, 0, self.size, None)
        if parts.nbytes > self.size:
            raise CorruptError(
                f"storage {parts.key!r} claims {parts.nbytes:,} bytes, in a file of {self.size:,}"
            )
        return SealedTensor(whole, parts.dtype, (parts.numel,), (1,))


def _place_storages(
    file: BinaryIO, keys: list[str], claims: _Claims, start: int, size: int, path: str, name: str
) -> dict[str, StorageRef]:
    places: dict[str, StorageRef] = {}
    position = start
    for key in keys:
        itemsize = claims.itemsize.get(key)
        if itemsize is None or key in places:
            raise CorruptError(
                f"{name}: it lists storage {key[:80]!r}, which no tensor uses once.", path=name
            )
        file.seek(position)
        count = file.read(8)
        nbytes = int.from_bytes(count, "little") * itemsize
        if len(count) < 8 or position + 8 + nbytes > size:
            raise CorruptError(
                f"{name}: storage {key[:80]!r} at byte {position:,} needs {nbytes:,} bytes, but the file "
                f"ends at {size:,}. The file is truncated; fetch it again.",
                path=name,
            )
        places[key] = StorageRef(path, key, position + 8, nbytes, None)
        position += 8 + nbytes
    if position != size:
        raise UnsafeError(
            f"{name}: {size - position:,} bytes follow its last storage. Do not trust this file.", path=name
        )
    return places


class _Places:
    def __init__(self, places: dict[str, StorageRef]) -> None:
        self.places = places

    def find(self, pid: tuple[Any, ...]) -> LazyTensor:
        parts = storage_parts(pid)
        place = self.places.get(parts.key)
        if place is None:
            raise CorruptError(f"a tensor's storage {parts.key!r} is not in the file")
        first, count = parts.view or (0, parts.numel)
        if max(parts.numel, first + count) * parts.itemsize > place.nbytes:
            raise CorruptError(
                f"storage {parts.key!r} is used as {max(parts.numel, first + count):,} elements of "
                f"{parts.dtype}, but has {place.nbytes:,} bytes"
            )
        if parts.view:
            place = StorageRef(
                place.file,
                place.key,
                place.offset + first * parts.itemsize,
                count * parts.itemsize,
                None,
            )
        return SealedTensor(place, parts.dtype, (count,), (1,))
