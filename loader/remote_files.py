"""The remote files of one load that come in parts: begun by the rank that fetches for its node, known to all of it."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from .cache_folder import folder_of
from .cache_records import PARTS, product_name
from .errors import RankloadError
from .http_connections import Connections
from .range_engine import Reading, ReadReport, read_ranges
from .range_open import open_range_source
from .range_source import RangeSource, TryAgainError
from .range_targets import FileTarget
from .ranges import ByteRange
from .remote_file import RemoteFile
from .sniff import HEAD_BYTES, sniff
from .store import ObjectInfo, OnBytes, Store
from .torch_file import FileIndex, read_index
from .workers import Stop

if TYPE_CHECKING:
    from .cache import NodeCache

HEAD_AND_TAIL_BYTES = 256 << 10
"""What is read of a file at first from each end: its pickle and its directory, mostly."""
PARALLEL_FROM_BYTES = 32 << 20
"""From this size on several connections bring a whole object sooner than one."""
_NO_TORCH_ZIP = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".lzma", ".zst")
"""Names of what comes whole, so that the store need not be asked what it can do."""


class RemoteFiles:
    """Context manager around a load. On ranks that do not fetch, it only knows which files come in parts."""

    def __init__(self) -> None:
        self._files: dict[str, RemoteFile] = {}
        self._indexes: dict[str, FileIndex] = {}
        self._partial: set[str] = set()
        self._lock = threading.Lock()
        self._connections: Connections | None = None
        self.stopping = Stop()
        """Set where what is under way is not wanted any more."""

    def __enter__(self) -> RemoteFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        if self._connections is not None:
            self._connections.close()

    def may_come_in_parts(self, info: ObjectInfo) -> bool:
        """False where an object comes whole for sure, by its name or its size."""
        return not (
            info.name.endswith(_NO_TORCH_ZIP) or 0 <= (info.size_bytes or -1) <= 2 * HEAD_AND_TAIL_BYTES
        )

    def begin(
        self,
        store: Store,
        info: ObjectInfo,
        cache: NodeCache,
        load_id: str,
        on_bytes: OnBytes,
    ) -> RemoteFile | None:
        """Opens a torch zip and brings its index here; None for anything else, and for stores without ranges.

        Called from several threads. Raises as the store and `read_index` do.
        """
        described = store.describe(info.name)
        if not self.may_come_in_parts(info):
            return None
        source = self._source(store, info)
        if source is None:
            return None
        file: RemoteFile | None = None
        try:
            if source.has_ranges and source.size_bytes > 2 * HEAD_AND_TAIL_BYTES:
                file = _open_file(store, info, source, cache, load_id, described, on_bytes)
                size = source.size_bytes
                file.ensure([ByteRange(0, HEAD_AND_TAIL_BYTES)], on_bytes)
                if sniff(file.read(0, HEAD_BYTES)) == "torch-zip":
                    file.ensure([ByteRange(size - HEAD_AND_TAIL_BYTES, size)], on_bytes)
                    index = read_index(
                        file.path, name=described, open_file=file.opener(on_bytes), partial=True
                    )
                    with self._lock:
                        self._files[file.path], self._indexes[file.path] = file, index
                    file, source = None, None
                    return self._files[index.path]
        finally:
            if file is not None:
                file.close()
            elif source is not None:
                source.close()
        return None

    def download(self, store: Store, info: ObjectInfo, path: str, on_bytes: OnBytes) -> bool:
        """Brings a whole object into a new file at `path`; False where that is not done in ranges.

        Raises as `read_ranges` does; what is at `path` then is not all of it.
        """
        if 0 <= (info.size_bytes or -1) < PARALLEL_FROM_BYTES:
            return False
        source = self._source(store, info)
        if source is None:
            return False
        try:
            if not source.has_ranges:
                return False
            target = FileTarget(path, source.size_bytes)
            try:
                read_ranges([Reading(source, [ByteRange(0, source.size_bytes)], target)], on_bytes)
            finally:
                target.close()
            return True
        finally:
            source.close()

    def stop(self) -> None:
        """Ends what is under way."""
        self.stopping.set()

    def note(self, path: str) -> None:
        """The node's file at `path` comes in parts: every rank of the node is to know."""
        self._partial.add(path)

    def __contains__(self, path: str) -> bool:
        return path in self._partial

    def index(self, path: str, name: str) -> FileIndex:
        """The index of a local file, or of one that comes in parts, once it was begun."""
        if path in self._indexes:
            return self._indexes.pop(path)
        return read_index(path, name=name, partial=path in self._partial)

    def fetch(self, wanted: Mapping[str, Iterable[ByteRange]], on_bytes: OnBytes) -> ReadReport:
        """Brings the `wanted` ranges here, by path; in parallel, over all files. Raises as `read_ranges` does."""
        readings = [self._files[path].reading(ranges) for path, ranges in wanted.items()]
        return read_ranges([one for one in readings if one is not None], on_bytes)

    def missing_bytes(self, wanted: Mapping[str, Sequence[ByteRange]]) -> int:
        """How many bytes `fetch` would bring."""
        return sum(self.missing_by_folder(wanted).values())

    def missing_by_folder(self, wanted: Mapping[str, Sequence[ByteRange]]) -> dict[str, int]:
        """How many bytes `fetch` would bring into each cache folder."""
        needed: dict[str, int] = {}
        for path, ranges in wanted.items():
            reading = self._files[path].reading(ranges)
            folder = folder_of(path) or os.path.dirname(path)
            missing = sum(stop - start for start, stop in reading.ranges) if reading is not None else 0
            needed[folder] = needed.get(folder, 0) + missing
        return needed

    def fetched_bytes(self, path: str) -> int | None:
        """What this rank brought of the file at `path`; None where it is none of its own."""
        file = self._files.get(path)
        return file.fetched_bytes if file is not None else None

    def resumed_bytes(self) -> int:
        """What earlier processes had brought, over all files."""
        return sum(file.resumed_bytes for file in self._files.values())

    def _source(self, store: Store, info: ObjectInfo) -> RangeSource | None:
        with self._lock:
            if self._connections is None:
                self._connections = Connections()
        try:
            return open_range_source(store, info, self._connections)
        except TryAgainError:
            # The plain way has its own attempts, and tells what it met.
            return None


def _open_file(
    store: Store,
    info: ObjectInfo,
    source: RangeSource,
    cache: NodeCache,
    load_id: str,
    described: str,
    on_bytes: OnBytes,
) -> RemoteFile:
    def compared(count: int) -> None:
        # Something moves, and nothing was fetched.
        on_bytes(count)
        on_bytes(-count)

    # What has no version can't be told from what it was yesterday.
    version = source.version or f"load {load_id}"
    size = source.size_bytes
    entry = cache.entry(
        described,
        store.identity,
        info.name,
        str(size),
        version,
        nbytes=size,
        lasting=source.version is not None,
    )
    for slot in (PARTS, f"{PARTS}-{uuid.uuid4().hex}"):
        folder = os.path.join(entry.folder, slot)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        # Where another job on this node is at it, this one has a file of its own.
        with contextlib.suppress(BlockingIOError):
            return RemoteFile(source, os.path.join(folder, product_name(described)), compared)
    raise RankloadError(f"{described}: no file in {entry.folder} could be opened", path=described)
