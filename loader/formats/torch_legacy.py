"""Reads torch files of the format before 1.6: five pickles in a row, then the storages' bytes. Free of torch.

The pickles are the magic number, the protocol version, the system's properties, the object and the list of storage
keys. For each key there follow a count of elements (8 bytes, little-endian) and the elements. The file has no
checksums. The format is that of ``_legacy_save`` in ``torch/serialization.py``.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from ..errors import CorruptError, FormatError, UnsafeError
from ..plurals import counted
from ..saved.tensor import StorageRef
from .pickle.inert import PickledInertTensor, PickledTensor
from .pickle.read import read_pickle
from .pickle.scan import PickleScan, scan_beginning, scan_pickle
from .sniff import LEGACY_MAGIC
from .storage_ids import read_storage_id, tensor_over, unknown_storage

_PROTOCOL_VERSION = 1001
_FIRST_WINDOW = 1 << 20
"""Bytes of the file that are read first; four times as many each time that the pickles go on past them."""


@dataclass(frozen=True, slots=True)
class _ScannedPickle:
    """One of the five pickles: its bytes are ``data[start:scan.end]``."""

    start: int
    scan: PickleScan


def read_legacy(path: str, *, name: str, memory_limit: int) -> tuple[Any, tuple[StorageRef, ...]]:
    """The tree of the legacy torch file at `path`, and its storages in the order of the file.

    Raises `CorruptError` where it is truncated or contradicts itself, `UnsafeError` as `scan_pickle` does,
    `FormatError` where it was written on a big-endian machine.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        return _read(file, _ElementTypes(path, size), name, memory_limit)


def read_legacy_inside(
    data: bytes, path: str, base: int, *, name: str, memory_limit: int
) -> tuple[Any, tuple[StorageRef, ...]]:
    """As `read_legacy`, for a legacy torch file `data` that is part of the file at `path`, from byte `base` on."""
    return _read(io.BytesIO(data), _ElementTypes(path, len(data), base), name, memory_limit)


def _read(
    file: BinaryIO, types: _ElementTypes, name: str, memory_limit: int
) -> tuple[Any, tuple[StorageRef, ...]]:
    data, pickles = _scan_pickles(file, types.size, name, memory_limit)

    def load(index: int, **options: Any) -> Any:
        one = pickles[index]
        return read_pickle(data, one.scan, name=name, memory_limit=memory_limit, start=one.start, **options)

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
    # A storage's count gives its bytes only with its element type, which only the object's pickle names.
    load(3, find_storage=types.note)
    places = _place_storages(file, keys, types, pickles[4].scan.end, name)
    tree = load(3, find_storage=_Places(places).find)
    return tree, tuple(places.values())


def _scan_pickles(
    file: BinaryIO, size: int, name: str, memory_limit: int
) -> tuple[bytes, list[_ScannedPickle]]:
    """The file's first bytes, enough of them to hold all five pickles, and where each of those lies."""
    window = min(size, _FIRST_WINDOW)
    while True:
        file.seek(0)
        data = file.read(window)
        if len(data) != window:
            raise CorruptError(f"{name}: it was truncated while it was read.", path=name)
        pickles: list[_ScannedPickle] = []
        start = 0
        whole = window == size
        while len(pickles) < 5:
            if whole:
                scan: PickleScan | None = scan_pickle(data, name=name, start=start, memory_limit=memory_limit)
            else:
                scan = scan_beginning(data, name=name, start=start, memory_limit=memory_limit)
            if scan is None:
                break
            pickles.append(_ScannedPickle(start, scan))
            start = scan.end
        else:
            return data, pickles
        window = min(size, 4 * window)


class _ElementTypes:
    """Collects the bytes per element of each storage from a first reading of the object's pickle."""

    def __init__(self, path: str, size: int, base: int = 0) -> None:
        """`size` is the torch file's, which begins at byte `base` of the file at `path`."""
        self.path = path
        self.size = size
        self.base = base
        self.itemsize: dict[str, int] = {}
        self.unknown: dict[str, str] = {}
        """Storages whose class is not known, and so their bytes per element: the class."""

    def note(self, pid: tuple[Any, ...]) -> PickledTensor | PickledInertTensor:
        named = read_storage_id(pid)
        if named.unknown:
            self.unknown.setdefault(named.key, named.unknown)
            return unknown_storage(named)
        self.itemsize.setdefault(named.key, named.itemsize)
        whole = StorageRef(self.path, named.key, 0, self.size, None)
        if named.nbytes > self.size:
            raise CorruptError(
                f"storage {named.key!r} claims {named.nbytes:,} bytes, in a file of {self.size:,}"
            )
        return tensor_over(named, whole, named.numel)


def _place_storages(
    file: BinaryIO, keys: list[str], types: _ElementTypes, start: int, name: str
) -> dict[str, StorageRef]:
    """Where each storage of `keys` lies, which follow one another from byte `start` to the end of the file."""
    path, size = types.path, types.size
    places: dict[str, StorageRef] = {}
    position = start
    for key in keys:
        itemsize = types.itemsize.get(key)
        if itemsize is None and key in types.unknown:
            raise FormatError(
                f"{name}: storage {key[:80]!r} is of class {types.unknown[key][:200]}, whose bytes per element are not "
                "known. The format before torch 1.6 states no sizes in bytes, so that nothing after it can be found: "
                "load the file with the torch that wrote it, and save it again in the format of torch 1.6 or newer, or "
                "without that tensor.",
                path=name,
            )
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
                f"ends at {size:,}. The file is truncated; take another copy of it.",
                path=name,
            )
        # Torch files inside one file may use the same key.
        unique = f"{key} at byte {types.base}" if types.base else key
        places[key] = StorageRef(path, unique, types.base + position + 8, nbytes, None)
        position += 8 + nbytes
    if position != size:
        raise UnsafeError(
            f"{name}: its last storage is followed by {counted(size - position, 'byte')}. Do not trust this file.",
            path=name,
        )
    return places


class _Places:
    """Finds the storages that the object's pickle names, once their places are known."""

    def __init__(self, places: dict[str, StorageRef]) -> None:
        self.places = places

    def find(self, pid: tuple[Any, ...]) -> PickledTensor | PickledInertTensor:
        named = read_storage_id(pid)
        if named.unknown:
            return unknown_storage(named)
        place = self.places.get(named.key)
        if place is None:
            raise CorruptError(f"a tensor's storage {named.key!r} is not in the file")
        first, count = named.view or (0, named.numel)
        if max(named.numel, first + count) * named.itemsize > place.nbytes:
            raise CorruptError(
                f"storage {named.key!r} is used as {max(named.numel, first + count):,} elements of "
                f"{named.dtype}, but has {place.nbytes:,} bytes"
            )
        if named.view:
            place = StorageRef(
                place.file,
                place.key,
                place.offset + first * named.itemsize,
                count * named.itemsize,
                None,
            )
        return tensor_over(named, place, count)
