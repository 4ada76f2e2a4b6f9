"""A file on this machine as a source of ranges: what stands for a remote object where no server is needed."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rankload.loader.errors import CorruptError
from rankload.loader.http.answers import Arrived
from rankload.loader.ranges.base import pieces
from rankload.loader.retries import Outages
from rankload.loader.store_errors import store_error
from rankload.loader.stores.base import ObjectInfo


class FileSource:
    """`info` is what ``LocalStore.stat`` said; the file is opened here."""

    kind = "file"
    has_ranges = True
    max_connections = 4

    def __init__(self, path: str, info: ObjectInfo) -> None:
        self._path = path
        self.outages = Outages()
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise store_error(error, path) from error
        found = os.fstat(self._file.fileno())
        self.size_bytes = found.st_size
        self.version: str | None = _version(found)
        if info.size_bytes is not None and (info.size_bytes, info.version) != (self.size_bytes, self.version):
            self.close()
            raise self._changed(info.version or "", self.version or "")

    def describe(self) -> str:
        return self._path

    def read_into(
        self, start: int, stop: int, views: Iterable[memoryview], arrived: Arrived = lambda n_bytes: None
    ) -> None:
        targets = pieces(views)
        view = memoryview(b"")
        position = start
        while position < stop:
            view = view or next(targets)
            try:
                n_new = os.preadv(self._file.fileno(), [view[: stop - position]], position)
            except (OSError, ValueError) as error:
                raise store_error(error, self._path) from error
            if not n_new:
                raise self._changed(f"{self.size_bytes} bytes", f"{position}")
            view = view[n_new:]
            position += n_new
            arrived(n_new)

    def confirm(self) -> None:
        now = _version(os.fstat(self._file.fileno()))
        if now != self.version:
            raise self._changed(self.version or "", now)

    def close(self) -> None:
        self._file.close()

    def _changed(self, expected: str, got: str) -> CorruptError:
        return CorruptError(
            f"{self._path}: changed while it was loaded: expected {expected}, got {got}", path=self._path
        )


def _version(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns}-{found.st_ino}"
