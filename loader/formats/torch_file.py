"""Reads the index of a file of tensors: its tree, and where every storage lies. Free of torch.

Such a file is a torch file, a plain pickle or a safetensors file. The index takes its directory and pickle, or its
header, never a storage: `materialize.tensors` reads those, once it is known which of them are wanted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import AccessError, CorruptError, FormatError, NotFoundError, UnsafeError
from ..plurals import counted
from ..saved.tensor import StorageRef
from ..saved.tree import check_tree
from .pickle.inert import PickledInertTensor, PickledTensor
from .pickle.read import read_pickle
from .pickle.scan import scan_pickle
from .plain_pickle import read_plain
from .safetensors import read_safetensors
from .sniff import HEAD_BYTES, KINDS, sniff
from .storage_ids import read_storage_id, same_storage_id, tensor_over, unknown_storage
from .torch_legacy import read_legacy
from .torch_zip import OpenFile, ZipRecords, open_local, read_zip

_LEAST_MEMORY = 64 << 20
"""Bytes that a pickle's objects may take, however small the file."""
_MEMORY_RATIO = 24
"""Bytes that objects may take for each byte of the pickle, as the scan counts them: each at the most that it can take.

It counts 19 to 22 for what ``torch.save`` writes of AdamW's or SGD's state of very small parameters, which in fact
takes 12 to 14 while it is read; 4 to 12 for names, numbers and larger tensors.
"""
_LARGEST_PICKLE = 1 << 30


@dataclass(frozen=True, slots=True)
class FileIndex:
    """What a file of tensors holds, before any storage is read."""

    path: str
    name: str
    """What messages call the file: the URL or name it was asked for by."""
    tree: Any
    """Plain values, `SavedTensor` and those of `saved.values`; its dicts, lists and tuples contain no cycle."""
    size_bytes: int
    verifiable: bool
    """Whether the file keeps checksums that its storages can be compared with."""
    storages: tuple[StorageRef, ...]
    """Every storage that the tree refers to, once, by offset."""
    format: Literal["zip", "legacy", "pickle", "safetensors"]
    archive: ZipRecords | None = None
    """The zip's directory; None for the other formats."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What a safetensors file says of itself; empty for the other formats."""

    def check_headers(self, storages: Iterable[StorageRef], open_file: OpenFile = open_local) -> None:
        """Compares these storages' local headers with the zip's directory, where that was put off.

        It is put off for a file that is fetched in parts (`read_zip` with ``derive``); the headers have to be there by
        now. Raises `CorruptError` where a header contradicts the directory.
        """
        if self.archive is not None and self.archive.derived:
            for storage in storages:
                self.archive.check_header(storage.key, open_file)


def read_index(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    open_file: OpenFile = open_local,
    partial: bool = False,
) -> FileIndex:
    """The index of the file of tensors at the local `path`; ``name`` is what messages call it, the path by default.

    `partial`: the file is still being fetched; only what the index takes is there, and is read through `open_file`.

    Nothing that the file names is imported or called. Takes memory in proportion to the file's pickle: 12 times its
    bytes for what torch.save writes; for any file at most 24 times, or 64 MiB where that is more, and twice the bytes
    of the file's storages. Of a safetensors file, in proportion to the values in its header, which is bounded.

    Raises `NotFoundError`, `AccessError`, `CorruptError` (truncated, damaged, contradicts itself), `UnsafeError`
    (asks for more memory or work than a checkpoint can need) or `FormatError` (another kind of file, which the message
    names).
    """
    path = os.fspath(path)
    name = path if name is None else name
    try:
        size = os.path.getsize(path)
        with open_file(path) as file:
            kind = sniff(file.read(HEAD_BYTES))
    except FileNotFoundError:
        raise NotFoundError(f"{name}: no such file: {path}", path=name) from None
    except PermissionError:
        raise AccessError(f"{name}: this user may not read {path}", path=name) from None
    except OSError as error:
        raise CorruptError(f"{name}: {path} cannot be read ({error.strerror}).", path=name) from error
    if kind == "torch-zip":
        archive = read_zip(path, name=name, open_file=open_file, derive=partial)
        return read_zip_index(archive, path, name, size, ZipStorages(archive))
    if kind == "torch-legacy" and not partial:
        limit = _memory_limit(size, min(size, _LARGEST_PICKLE))
        tree, storages = read_legacy(path, name=name, memory_limit=limit)
        check_tree(tree, name=name)
        return FileIndex(path, name, tree, size, False, storages, "legacy")
    if kind == "pickle" and not partial:
        limit = _memory_limit(size, size)
        tree, storages = read_plain(path, name=name, memory_limit=limit, largest=_LARGEST_PICKLE)
        check_tree(tree, name=name)
        return FileIndex(path, name, tree, size, False, storages, "pickle")
    if kind == "safetensors":
        header = read_safetensors(path, size, name=name, open_file=open_file)
        return FileIndex(
            path, name, header.tensors, size, False, header.storages, "safetensors", metadata=header.metadata
        )
    raise other_kind(kind, name, size)


def check_records(path: str, *, name: str) -> None:
    """Compares all records of a small torch zip with their checksums; does nothing for a file of another kind.

    Raises `CorruptError` where one differs, or the zip's directory is damaged. Messages call the file `name`.
    """
    with open(path, "rb") as file:
        if sniff(file.read(HEAD_BYTES)) != "torch-zip":
            return
    with contextlib.suppress(FormatError, UnsafeError):
        archive = read_zip(path, name=name)
        for record, place in archive.records.items():
            archive.read(record, limit=place.size)


def read_zip_index(archive: ZipRecords, path: str, name: str, size: int, finder: ZipStorages) -> FileIndex:
    if "byteorder" in archive.records:
        order = archive.read("byteorder", limit=64)
        if order != b"little":
            raise FormatError(
                f"{name}: its byte order is {order.decode('ascii', 'replace')!r}; only little is supported. "
                "Save it again on a little-endian machine.",
                path=name,
            )
    if archive.derived:
        archive.check_header("data.pkl", archive.open_file)
    data = archive.read("data.pkl", limit=_LARGEST_PICKLE)
    memory_limit = _memory_limit(size, len(data))
    base = archive.records["data.pkl"].offset
    scan = scan_pickle(data, name=name, base=base, memory_limit=memory_limit)
    if scan.end != len(data):
        raise CorruptError(
            f"{name}: the pickle in data.pkl is followed by {counted(len(data) - scan.end, 'byte')}.",
            path=name,
        )
    tree = read_pickle(data, scan, name=name, memory_limit=memory_limit, find_storage=finder.find)
    if scan.shares:
        check_tree(tree, name=name)
    storages = tuple(sorted(finder.found.values(), key=lambda storage: storage.offset))
    return FileIndex(path, name, tree, size, archive.verifiable, storages, "zip", archive)


class ZipStorages:
    """Finds the zip's records by the keys that its pickle names; each storage becomes one `StorageRef`."""

    def __init__(self, archive: ZipRecords, base: int = 0, key: str = "") -> None:
        """`base` is where the zip begins in its file, `key` what its storages' keys begin with there.

        Of a zip with a `key` all headers were compared already, so its storages refer to none.
        """
        self.archive = archive
        self.base = base
        self.key = key
        self.found: dict[str, StorageRef] = {}
        self._last: tuple[tuple[Any, ...], PickledTensor] | None = None

    def find(self, pid: tuple[Any, ...]) -> PickledTensor | PickledInertTensor:
        if self._last is not None and same_storage_id(pid, self._last[0]):
            # Of an engine, all parameters of a group lie in one storage.
            return self._last[1]
        named = read_storage_id(pid)
        if named.unknown:
            return unknown_storage(named)
        storage = self.found.get(named.key)
        if storage is None:
            record = self.archive.records.get(f"data/{named.key}")
            if record is None:
                raise CorruptError(
                    f"a tensor's storage {named.key!r} is not in the file; take another copy of it"
                )
            storage = StorageRef(
                self.archive.path,
                f"{self.key}data/{named.key}",
                self.base + record.offset,
                record.size,
                self.archive.crc32(record),
                -1 if self.key else record.header,
            )
            self.found[named.key] = storage
        if named.nbytes > storage.nbytes:
            raise CorruptError(
                f"storage {named.key!r} is used as {named.numel:,} elements of {named.dtype}, but has "
                f"{storage.nbytes:,} bytes"
            )
        made = tensor_over(named, storage, named.numel)
        self._last = pid, made
        return made


def _memory_limit(file_size: int, pickle_size: int) -> int:
    """Bytes that the pickle's objects may take, not counting the pickle itself and a copy of it.

    Where the file does not say how long its pickle is, `pickle_size` is the most that it can have.
    """
    return max(_LEAST_MEMORY, _MEMORY_RATIO * pickle_size) + 2 * max(0, file_size - pickle_size)


def other_kind(kind: str, name: str, size: int) -> CorruptError | FormatError:
    described = KINDS[kind]
    if kind == "lfs":
        return CorruptError(f"{name} is {described}: run `git lfs pull` in the clone.", path=name)
    if kind in ("empty", "html", "xml", "text", "unknown"):
        return CorruptError(
            f"{name}: expected a file that torch.save wrote, or a safetensors file, but it is {described} "
            f"({counted(size, 'byte')}). The transfer may have failed; look at the file at its source.",
            path=name,
        )
    return FormatError(
        f"{name}: expected a file that torch.save wrote, or a safetensors file, but it is {described} "
        f"({counted(size, 'byte')}). Pass the checkpoint that it was made from, or save its weights by torch.save "
        "under the model's names.",
        path=name,
    )
