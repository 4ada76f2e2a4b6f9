"""Writes a stream to a new file, and sums its SHA-256 on the way: no byte is read again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from ..stores.base import OnBytes

CHUNK = 16 << 20
_ENTRY = 256
"""Bytes that torch's archive and pickle need at least for one tensor."""


class SummedFile:
    """What `torch.save` writes to; `on_bytes` hears of every chunk, and what it raises ends the write."""

    def __init__(self, file: Any, on_bytes: OnBytes) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self._sum = hashlib.sha256()
        self.failure: BaseException | None = None
        """What ended the write. torch raises an error of its own in its place."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), CHUNK):
                chunk = view[start : start + CHUNK]
                self._file.write(chunk)
                self._sum.update(chunk)
                self._on_bytes(len(chunk))
        except BaseException as error:
            self.failure = self.failure or error
            raise
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._sum.hexdigest()


def write_summed(path: str, write: Callable[[SummedFile], None], on_bytes: OnBytes) -> str:
    """Makes the file `path`, which is on the disk when this returns, of what `write` writes; returns its SHA-256.

    Raises what `write` and `on_bytes` raise, and OSError.
    """
    with open(path, "xb") as file:
        summed = SummedFile(file, on_bytes)
        try:
            write(summed)
        except BaseException as error:
            if summed.failure is None or error is summed.failure:
                raise
            raise summed.failure from error
        file.flush()
        os.fsync(file.fileno())
    return summed.hexdigest()


def sum_file(path: str, on_bytes: OnBytes) -> str:
    """The SHA-256 of a file that another library wrote, which is on the disk when this returns."""
    with open(path, "rb") as file:
        found = sum_of(file, on_bytes)
        os.fsync(file.fileno())
    return found


def sum_of(file: BinaryIO, on_bytes: OnBytes) -> str:
    """The SHA-256 of what is left of a file that is open; `on_bytes` hears of every chunk."""
    found = hashlib.sha256()
    while chunk := file.read(CHUNK):
        found.update(chunk)
        on_bytes(len(chunk))
    return found.hexdigest()


def least_bytes(tree: Any) -> int:
    """Bytes that `torch.save` of `tree` needs at least: its tensors' storages, each once."""
    storages: dict[int, int] = {}
    _find_storages(tree, storages)
    return sum(storages.values()) + _ENTRY * len(storages)


def _find_storages(value: Any, found: dict[int, int]) -> None:
    if callable(getattr(value, "untyped_storage", None)):
        try:
            storage = value.untyped_storage()
            found[storage.data_ptr() or id(storage)] = storage.nbytes()
        except (NotImplementedError, RuntimeError):
            return  # a sparse tensor, for example, which has none of its own
    elif isinstance(value, Mapping):
        for item in value.values():
            _find_storages(item, found)
    elif isinstance(value, list | tuple):
        for item in value:
            _find_storages(item, found)
