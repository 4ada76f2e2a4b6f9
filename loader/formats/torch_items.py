"""Reads the indexes of torch files that lie inside of larger files, as in those of a DCP folder. Free of torch.

A folder has hundreds of thousands of them, and those of tensors of one shape and dtype are the same bytes, but for the
tensors' values and checksums. `ItemForms` keeps which bytes an index was made of, and makes that of the next such item
by comparing them: what all of these say need not be worked out again.
"""

from __future__ import annotations

import errno
import io
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

from ..errors import CorruptError
from ..saved.tensor import StorageRef
from .pickle.inert import PickledTensor
from .sniff import HEAD_BYTES, sniff
from .torch_file import FileIndex, ZipStorages, other_kind, read_zip_index
from .torch_zip import OpenFile, ZipRecords, directory_place, open_local, read_zip

ITEM_END_BYTES = 2 << 10
"""Bytes that are read at once of each end of a torch file inside of a larger one; its index takes half of that."""
SMALL_ITEM_BYTES = 16 << 10
"""Bytes up to which such a file is read at once."""
_SERIAL = ".data/serialization_id"
"""A record that torch makes of the checksums of the others. No index takes anything of it."""
_MOST_SIZES = 256
_MOST_OF_A_SIZE = 16
_SCALARS = (int, float, str, bool, type(None))
_CRC_BYTES = 4
# Where a record's checksum and flags are in its local header, and the checksum, the lengths of what follows and the
# local header's place in its entry of the directory.
_LOCAL_FLAGS, _LOCAL_CRC, _ENTRY_CRC, _ENTRY_LENGTHS, _ENTRY_HEADER, _ENTRY_BYTES = 6, 14, 16, 28, 42, 46
_SIZES_FOLLOW = 0x08


def item_ends(size: int) -> tuple[tuple[int, int], ...]:
    """Which bytes of an item of `size` are its ends: where they begin, and how many there are."""
    if size <= SMALL_ITEM_BYTES:
        return ((0, size),)
    return (0, ITEM_END_BYTES), (size - ITEM_END_BYTES, ITEM_END_BYTES)


@dataclass(frozen=True, slots=True)
class _Ends:
    """An item's ends, one after the other."""

    data: bytes
    size: int
    """Of the item."""

    @property
    def missing(self) -> int:
        """Bytes of the item between its ends."""
        return self.size - len(self.data)

    def place(self, position: int) -> int:
        """Where a byte of the item is in `data`; of one between the ends, where the second one begins."""
        if position <= ITEM_END_BYTES or not self.missing:
            return position
        return max(ITEM_END_BYTES, position - self.missing)

    def read(self, position: int, length: int) -> bytes:
        """Bytes of the item; fewer where they are between its ends."""
        return self.data[self.place(position) : self.place(position + length)]


@dataclass(frozen=True, slots=True)
class _Form:
    """The bytes that say what the index of an item is, and that index."""

    same: tuple[tuple[int, int, bytes], ...]
    """Bytes of an item's ends that have to be the same: where they begin and end, and what they are."""
    pairs: tuple[tuple[int, int], ...]
    """Where checksums begin that have to be equal in the item: in a local header, and in the directory."""
    tree: Any
    """The item's tensor, whose storage is as if the item were a file of its own; or a value without a tensor."""
    crc32: int
    """Where the checksum of the tensor's storage begins."""

    def fits(self, ends: bytes) -> bool:
        for start, stop, expected in self.same:
            if ends[start:stop] != expected:
                return False
        return all(
            ends[local : local + _CRC_BYTES] == ends[entry : entry + _CRC_BYTES]
            for local, entry in self.pairs
        )


class ItemForms:
    """The forms of the items that were read so far."""

    def __init__(self) -> None:
        self._of_size: dict[int, list[_Form]] = {}
        """The last ones first."""

    def index(self, path: str, start: int, size: int, ends: bytes, name: str, key: str) -> FileIndex | None:
        """What `read_item` gives for an item, where its `ends` (of `item_ends`) are as those of one before; else
        None."""
        for form in self._of_size.get(size, ()):
            if not form.fits(ends):
                continue
            tree = form.tree
            if type(tree) is not PickledTensor:
                return FileIndex(path, name, tree, size, True, (), "zip")
            like = tree.storage
            crc32 = int.from_bytes(ends[form.crc32 : form.crc32 + _CRC_BYTES], "little")
            storage = StorageRef(path, key + like.key, start + like.offset, like.nbytes, crc32)
            return FileIndex(path, name, tree.moved_to(storage), size, True, (storage,), "zip")
        return None

    def learn(self, archive: ZipRecords, index: FileIndex, start: int, ends: bytes, key: str) -> None:
        """Keeps the form of an item, where it is one by which others' indexes can be made."""
        size = index.size_bytes
        form = _form_of(archive, index, start, _Ends(ends, size), key)
        if form is not None and (size in self._of_size or len(self._of_size) < _MOST_SIZES):
            self._of_size[size] = [form, *self._of_size.get(size, ())][:_MOST_OF_A_SIZE]


def _form_of(archive: ZipRecords, index: FileIndex, start: int, ends: _Ends, key: str) -> _Form | None:
    """The form of the item that begins at byte `start` of its file; None where its ends do not say all of its index."""
    tree, records = index.tree, archive.records
    values = [_SERIAL] if _SERIAL in records else []
    record_of_tensor = ""
    if type(tree) is PickledTensor and index.storages == (tree.storage,):
        storage = tree.storage
        record_of_tensor = storage.key[len(key) :]
        values.append(record_of_tensor)
        tree = tree.moved_to(StorageRef("", record_of_tensor, storage.offset - start, storage.nbytes, None))
    elif type(tree) not in _SCALARS or index.storages:
        return None  # what holds others could be changed by those who have it
    entries = _directory(ends)
    if not entries or not records["data.pkl"].crc32:
        return None  # without any checksum, the file keeps none at all
    headers = sorted(entries)
    free: list[tuple[int, int]] = []
    pairs: list[tuple[int, int]] = []
    crc32 = -1
    for name in values:
        record = records[name]
        entry, flags = entries.get(record.header, -1), ends.read(record.header + _LOCAL_FLAGS, 1)
        if entry < 0 or not flags:
            return None
        # All up to the next header: the value, and after it a descriptor, which is not looked at.
        free.append((record.offset, headers[bisect_right(headers, record.header)]))
        free.append((entry + _ENTRY_CRC, entry + _ENTRY_CRC + _CRC_BYTES))
        if not flags[0] & _SIZES_FOLLOW:
            local = record.header + _LOCAL_CRC
            if len(ends.read(local, _CRC_BYTES)) < _CRC_BYTES:
                return None
            free.append((local, local + _CRC_BYTES))
            pairs.append((ends.place(local), ends.place(entry + _ENTRY_CRC)))
        if name == record_of_tensor:
            crc32 = ends.place(entry + _ENTRY_CRC)
    same = _others(ends, free)
    return _Form(same, tuple(pairs), tree, crc32) if same else None


def _directory(ends: _Ends) -> dict[int, int]:
    """Where each local header of the zip begins, and the directory's entry for it; and last, of the directory itself.

    Empty where not all of the directory is in the item's second end.
    """
    place = directory_place(ends.data, ends.size)
    if place is None or place[0] + place[1] != place[2]:
        return {}
    at, _, end = place
    found = {at: at}
    while at < end:
        entry = ends.read(at, _ENTRY_BYTES)
        if len(entry) < _ENTRY_BYTES or entry[:4] != b"PK\1\2":
            return {}
        lengths = struct.unpack_from("<3H", entry, _ENTRY_LENGTHS)
        found[struct.unpack_from("<L", entry, _ENTRY_HEADER)[0]] = at
        at += _ENTRY_BYTES + sum(lengths)
    return found


def _others(ends: _Ends, free: list[tuple[int, int]]) -> tuple[tuple[int, int, bytes], ...]:
    """All bytes of the ends but those of `free`; none where not all between the ends is free."""
    between = (ITEM_END_BYTES, ITEM_END_BYTES + ends.missing)
    if ends.missing and not any(start <= between[0] and stop >= between[1] for start, stop in free):
        return ()
    is_same = bytearray(b"\x01") * len(ends.data)
    for start, stop in free:
        first, last = ends.place(start), ends.place(stop)
        is_same[first:last] = bytes(last - first)
    runs = (run.span() for run in re.finditer(rb"\x01+", is_same))
    return tuple((start, stop, ends.data[start:stop]) for start, stop in runs)


def read_item(
    path: str,
    start: int,
    stop: int,
    *,
    name: str,
    key: str,
    open_file: OpenFile = open_local,
    forms: ItemForms | None = None,
) -> FileIndex:
    """The index of the torch zip that is bytes ``[start, stop)`` of the file at `path`, one of several in it.

    Its storages lie in that file; their keys there begin with `key`, which is this item's own. With `forms`, those are
    kept of it that the next ones may have. The same promises and errors as `read_index`, of which `FormatError` where
    those bytes are no torch zip.
    """
    size = stop - start
    with open_file(path) as file:
        ends = {first: _bytes(file, start + first, length) for first, length in item_ends(size)}

    def open_part(path: str) -> BinaryIO:
        if len(ends[0]) == size:
            return io.BytesIO(ends[0])
        return cast(BinaryIO, _PartOfFile(open_file(path), start, stop, ends))

    try:
        archive = read_zip(path, name=name, open_file=open_part, size=size)
    except CorruptError:
        with open_part(path) as part:
            kind = sniff(part.read(HEAD_BYTES))
        if kind != "torch-zip":
            raise other_kind(kind, name, size) from None
        raise
    index = read_zip_index(archive, path, name, size, ZipStorages(archive, start, key))
    if forms is not None:
        forms.learn(archive, index, start, b"".join(ends.values()), key)
    # All headers were compared; the directories of many items would take more memory than all the rest of them.
    return replace(index, archive=None)


def _bytes(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


class _PartOfFile(io.RawIOBase):
    """Bytes ``[start, stop)`` of a file, as a file of their own. `known`, by where they begin, were read before."""

    def __init__(self, file: BinaryIO, start: int, stop: int, known: Mapping[int, bytes]) -> None:
        super().__init__()
        self._file = file
        self._start = start
        self._size = stop - start
        self._known = known
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence] + offset
        if position < 0:
            raise OSError(errno.EINVAL, "a position before the beginning")
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        size = left if size < 0 else min(size, left)
        for first, held in self._known.items():
            at = self._position - first
            if at >= 0 and at + size <= len(held):
                data = held[at : at + size]
                break
        else:
            data = _bytes(self._file, self._start + self._position, size)
        self._position += len(data)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()
