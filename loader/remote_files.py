"""The remote files of one load that come in parts: begun by the rank that fetches for its node, known to all of it."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..distributed.range_server import PeerAddress, RangeServer, Served
from .cache_records import product_name
from .errors import CorruptError, RankloadError
from .http_connections import Connections
from .origin import Origin
from .partial_file import Landed
from .range_engine import Reading, ReadReport, read_ranges
from .range_open import open_range_source
from .range_source import RangeSource, TryAgainError
from .range_targets import FileTarget
from .ranges import ByteRange
from .remote_file import RemoteFile
from .sniff import HEAD_BYTES, sniff
from .store import ObjectInfo, OnBytes, Store
from .torch_file import FileIndex, read_index
from .whole_checks import Compared, WholeChecks
from .workers import Stop

if TYPE_CHECKING:
    from .cache import NodeCache

HEAD_AND_TAIL_BYTES = 256 << 10
"""What is read of a file at first from each end: its pickle and its directory, mostly."""
PARALLEL_FROM_BYTES = 32 << 20
"""From this size on several connections bring a whole object sooner than one."""
GAPS_BYTES = 64 << 10
"""With so little missing a file may as well be whole: what a full restore leaves is between the records."""
SLOT = "parts"
_NO_TORCH_ZIP = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".lzma", ".zst")
"""Names of what comes whole, so that the store need not be asked what it can do."""


class RemoteFiles:
    """Context manager around a load. On ranks that do not fetch, it only knows which files come in parts."""

    def __init__(self, checks: WholeChecks | None = None) -> None:
        self.checks = checks or WholeChecks("off")
        self._compared: dict[str, Compared] = {}
        self._files: dict[str, RemoteFile] = {}
        self._begun: dict[tuple[str, str], RemoteFile] = {}
        """By store and object."""
        self._indexes: dict[str, FileIndex] = {}
        self._partial: dict[str, tuple[str, Origin]] = {}
        self._path_of: dict[str, str] = {}
        self._direct_sources: dict[str, RangeSource] = {}
        self._own_bytes: dict[str, int] = {}
        self._server: RangeServer | None = None
        self._objects: dict[str, tuple[Store, ObjectInfo]] = {}
        self._lock = threading.Lock()
        self._connections: Connections | None = None
        self.stopping = Stop()
        """Set where what is under way is not wanted any more."""

    def __enter__(self) -> RemoteFiles:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for source in self._direct_sources.values():
            source.close()
        for file in self._files.values():
            file.close()
        if self._connections is not None:
            self._connections.close()

    def begin(
        self,
        store: Store,
        info: ObjectInfo,
        cache: NodeCache,
        load_id: str,
        on_bytes: OnBytes,
    ) -> RemoteFile | None:
        """Opens a torch zip and brings its index here; None for anything else, and for stores without ranges.

        One that was begun before, for another rank, is returned as it is.

        Called from several threads. Raises as the store and `read_index` do.
        """
        described = store.describe(info.name)
        with self._lock:
            begun = self._begun.get((store.identity, info.name))
        if begun is not None:
            return begun
        if info.name.endswith(_NO_TORCH_ZIP) or 0 <= (info.size_bytes or -1) <= 2 * HEAD_AND_TAIL_BYTES:
            return None
        source = self._source(store, info)
        if source is None:
            return None
        file: RemoteFile | None = None
        try:
            if source.has_ranges and source.size_bytes > 2 * HEAD_AND_TAIL_BYTES:
                file = _open_file(store, info, source, cache, load_id, described)
                size = source.size_bytes
                file.ensure([ByteRange(0, HEAD_AND_TAIL_BYTES)], on_bytes)
                if sniff(file.read(0, HEAD_BYTES)) == "torch-zip":
                    file.ensure([ByteRange(size - HEAD_AND_TAIL_BYTES, size)], on_bytes)
                    index = read_index(
                        file.path, name=described, open_file=file.opener(on_bytes), partial=True
                    )
                    with self._lock:
                        self._files[file.path], self._indexes[file.path] = file, index
                        self._begun[store.identity, info.name] = file
                        self._objects[file.path] = store, info
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

    def note(self, path: str, name: str, origin: Origin) -> None:
        """The node's file at `path` comes in parts: every rank of the node is to know. `name` is what the whole job
        calls it."""
        self._partial[path] = (name, origin)
        self._path_of[name] = path

    def name_of(self, path: str) -> str:
        """What the whole job calls the file at `path`."""
        return self._partial[path][0]

    def path_of(self, name: str) -> str:
        """Where the file is on this node."""
        return self._path_of[name]

    def open_source(self, store: Store, path: str) -> RangeSource:
        """The object behind the node's file at `path`, for this rank to read itself. Raises as `open_range_source`
        does, and `CorruptError` where it is another version by now."""
        if path in self._files:
            return self._files[path].source
        if path not in self._direct_sources:
            name, origin = self._partial[path]
            info = ObjectInfo(origin.object_name, origin.size_bytes, origin.told_version)
            try:
                source = open_range_source(store, info, self._shared_connections())
            except TryAgainError as error:
                raise error.error from error
            if source is None or (source.version, source.size_bytes) != (origin.version, origin.size_bytes):
                got = "nothing" if source is None else f"{source.size_bytes} bytes, version {source.version}"
                raise CorruptError(
                    f"{name}: changed while it was loaded: expected {origin.size_bytes} bytes, version "
                    f"{origin.version}, got {got}",
                    path=name,
                )
            self._direct_sources[path] = source
        return self._direct_sources[path]

    def serve(self, host: str) -> PeerAddress:
        """Hands out what has landed here to the ranks that fetch for other nodes, until the load ends."""
        if self._server is None:
            self._server = RangeServer(self._served, host)
        return self._server.address

    def _served(self, name: str) -> Served | None:
        path = self._path_of.get(name)
        if path is None or path not in self._files:
            return None
        landed = Landed(path)
        return Served(path, landed.reach, lambda: sum(file.fetched_bytes for file in self._files.values()))

    def __contains__(self, path: str) -> bool:
        return path in self._partial

    def index(self, path: str, name: str) -> FileIndex:
        """The index of a local file, or of one that comes in parts, once it was begun."""
        if path in self._indexes:
            return self._indexes.pop(path)
        return read_index(path, name=name, partial=path in self._partial)

    def origin(self, file: RemoteFile, info: ObjectInfo) -> Origin:
        """What other ranks have to know to open the object of `file` themselves."""
        source = file.source
        return Origin(info.name, source.size_bytes, info.version, source.version)

    def fetch(
        self,
        wanted: Mapping[str, Iterable[ByteRange]],
        on_bytes: OnBytes,
        peer: Callable[[str, int], RangeSource] | None = None,
    ) -> ReadReport:
        """Brings the `wanted` ranges here, by path; in parallel, over all files. Raises as `read_ranges` does.

        They come from the store, or from what `peer` opens by the file's name and size.
        """
        readings = []
        for path, ranges in wanted.items():
            file = self._files[path]
            source = peer(self.name_of(path), file.source.size_bytes) if peer is not None else None
            readings.append(file.reading(ranges, source))
        report = read_ranges([one for one in readings if one is not None], on_bytes)
        for path in wanted:
            self._compare_if_whole(path, on_bytes)
        return report

    def _compare_if_whole(self, path: str, on_bytes: OnBytes) -> None:
        file = self._files[path]
        if self.checks.verify == "before" and file.missing_bytes <= GAPS_BYTES:
            file.ensure([ByteRange(0, file.source.size_bytes)], on_bytes)
        if not file.missing_bytes and path not in self._compared:
            self._compared[path] = self.checks.compare(*self._objects[path], path, on_bytes)

    def compared(self, path: str) -> Compared | None:
        """What this rank compared all of the file at `path` with; None where it is none of its own."""
        if path not in self._files:
            return None
        return self._compared.get(path) or Compared((), self.checks.left_out_of_parts(*self._objects[path]))

    def missing_bytes(self, wanted: Mapping[str, Sequence[ByteRange]]) -> int:
        """How many bytes `fetch` would bring."""
        readings = (self._files[path].reading(ranges) for path, ranges in wanted.items())
        return sum(stop - start for one in readings if one is not None for start, stop in one.ranges)

    def fetched_bytes(self, path: str) -> int | None:
        """What this rank brought of the file at `path` for its node; None where it is none of its own."""
        file = self._files.get(path)
        return file.fetched_bytes if file is not None else None

    def add_fetched(self, by_path: Mapping[str, int]) -> None:
        """Notes what this rank read of files past the node's."""
        for path, n_bytes in by_path.items():
            self._own_bytes[path] = self._own_bytes.get(path, 0) + n_bytes

    def own_bytes(self, path: str) -> int:
        """What this rank read of the file for itself alone."""
        return self._own_bytes.get(path, 0)

    def resumed_bytes(self) -> int:
        """What earlier processes had brought, over all files."""
        return sum(file.resumed_bytes for file in self._files.values())

    def _source(self, store: Store, info: ObjectInfo) -> RangeSource | None:
        try:
            return open_range_source(store, info, self._shared_connections())
        except TryAgainError:
            # The plain way has its own attempts, and tells what it met.
            return None

    def _shared_connections(self) -> Connections:
        with self._lock:
            if self._connections is None:
                self._connections = Connections()
            return self._connections


def _open_file(
    store: Store, info: ObjectInfo, source: RangeSource, cache: NodeCache, load_id: str, described: str
) -> RemoteFile:
    # What has no version can't be told from what it was yesterday.
    version = source.version or f"load {load_id}"
    entry = cache.entry(described, store.identity, info.name, str(source.size_bytes), version)
    for slot in (SLOT, f"{SLOT}-{uuid.uuid4().hex}"):
        folder = os.path.join(entry.folder, slot)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        # Where another job on this node is at it, this one has a file of its own.
        with contextlib.suppress(BlockingIOError):
            return RemoteFile(source, os.path.join(folder, product_name(described)))
    raise RankloadError(f"{described}: no file in {entry.folder} could be opened", path=described)
