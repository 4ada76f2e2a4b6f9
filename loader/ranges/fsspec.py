"""The range source over a backend's own ranged reads, for stores that are not http(s) and sign no URLs."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import CorruptError
from ..http.answers import Arrived, cut_short
from ..plurals import counted
from ..stores.base import ObjectInfo
from ..stores.fsspec import WHOLE_ONLY, FsspecStore
from .base import pieces

PART_BYTES = 8 << 20
"""The bytes of one request, which a read holds in memory on top of its target."""
_THREADS = frozenset({"memory", "sftp", "ssh", "smb", "hf"})
"""File systems without an event loop of their own that several threads may read from."""


class FsspecSource:
    """The object that the store described as `info`. Answers state no version: `confirm` asks for it again."""

    has_ranges = True

    def __init__(self, store: FsspecStore, info: ObjectInfo, size_bytes: int) -> None:
        self._store = store
        self._info = info
        self.size_bytes = size_bytes
        self.kind = store.protocol
        self.outages = store.outages

    @property
    def version(self) -> str | None:
        return self._info.version

    @property
    def max_connections(self) -> int:
        if getattr(self._store.files(), "async_impl", False):
            return 16
        return 4 if self._store.protocol in _THREADS else 1

    def describe(self) -> str:
        return self._store.describe(self._info.name)

    def read_into(
        self, start: int, stop: int, views: Iterable[memoryview], arrived: Arrived = lambda n_bytes: None
    ) -> None:
        targets = pieces(views)
        view = memoryview(b"")
        for position in range(start, stop, PART_BYTES):
            end = min(stop, position + PART_BYTES)
            data = memoryview(self._read(position, end))
            got = len(data)
            while data:
                view = view or next(targets)
                n_new = min(len(view), len(data))
                view[:n_new] = data[:n_new]
                view, data = view[n_new:], data[n_new:]
                arrived(n_new)
            if got < end - position:
                raise cut_short(self.describe(), position, end - position, got)

    def confirm(self) -> None:
        files = self._store.files()
        files.invalidate_cache(files._parent(self._info.name))
        self._store.forget(self._info.name)
        now = self._store.stat(self._info.name)
        if now is None or (now.size_bytes, now.version) != (self._info.size_bytes, self._info.version):
            got = "nothing" if now is None else f"{now.size_bytes} bytes, version {now.version}"
            raise CorruptError(
                f"{self.describe()}: changed while it was loaded: expected {self.size_bytes} bytes, version "
                f"{self.version}, got {got}",
                path=self.describe(),
            )

    def close(self) -> None:
        """Does nothing: the file system keeps its own connections."""

    def _read(self, start: int, stop: int) -> bytes:
        name = self._info.name
        data: bytes = self._store.once(name, lambda files: files.cat_file(name, start=start, end=stop))
        if len(data) > stop - start:
            raise CorruptError(
                f"{self.describe()}: expected bytes {start}-{stop - 1}, got {counted(len(data), 'byte')}",
                path=self.describe(),
            )
        return data


def open_fsspec_source(store: FsspecStore, info: ObjectInfo) -> FsspecSource | None:
    """The source of the object in `info`; None where its size is not known, or a range costs as much as the whole."""
    if info.size_bytes is None or WHOLE_ONLY & set(store.protocols()):
        return None
    return FsspecSource(store, info, info.size_bytes)
