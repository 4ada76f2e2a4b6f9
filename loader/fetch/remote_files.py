"""The remote files of one load that come in parts: begun by the rank that fetches for its node, known to all of it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from ...distributed.range_server import PeerAddress, RangeServer, Served
from ..byte_ranges import ByteRange
from ..cache.folder import folder_of
from ..cache.holes import Landed
from ..errors import CorruptError
from ..formats.sniff import HEAD_BYTES, sniff
from ..formats.torch_file import FileIndex, read_index
from ..http.connections import Connections
from ..ranges.base import RangeSource
from ..ranges.engine import ObjectRead, ReadReport, read_ranges
from ..ranges.open import RangeServers, open_range_source
from ..ranges.targets import FileTarget
from ..ranges.window import WindowSource
from ..ranges.workers import Stop
from ..store_errors import TryAgainError
from ..stores.base import ObjectInfo, OnBytes, Store
from .remote_file import RemoteFile, open_remote_file
from .tars import RemoteArchive, open_archive
from .whole_checks import Compared, WholeChecks

if TYPE_CHECKING:
    from ..cache.node import NodeCache

HEAD_AND_TAIL_BYTES = 256 << 10
"""What is read of a file at first from each end: its pickle and its directory, mostly."""
PARALLEL_FROM_BYTES = 32 << 20
"""From this size on several connections bring a whole object sooner than one."""
GAPS_BYTES = 64 << 10
"""With so little missing a file may as well be whole: what a full restore leaves is between the records."""
SMALL_ARCHIVE_BYTES = 1 << 20
"""Archives up to this size come whole."""
_COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".lzma", ".zst")
"""Names of what comes whole, so that the store need not be asked what it can do."""


class RemoteFiles:
    """Context manager around a load. On ranks that do not fetch, it only knows which files come in parts."""

    def __init__(self, checks: WholeChecks | None = None) -> None:
        self.checks = checks or WholeChecks("off")
        self._compared: dict[str, Compared] = {}
        self._files: dict[str, RemoteFile] = {}
        self._begun: dict[tuple[str, str], InParts] = {}
        """By store and object."""
        self._archives: dict[str, RemoteArchive] = {}
        self._indexes: dict[str, FileIndex] = {}
        self._server: RangeServer | None = None
        self._objects: dict[str, tuple[Store, ObjectInfo]] = {}
        self._lock = threading.Lock()
        self._connections: Connections | None = None
        self._servers = RangeServers()
        self.stopping = Stop()
        """Set where what is under way is not wanted any more."""
        self.known = KnownParts(self._shared_connections)

    def __enter__(self) -> RemoteFiles:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        self.known.close()
        for file in self._files.values():
            file.close()
        if self._connections is not None:
            self._connections.close()

    def may_come_in_parts(self, info: ObjectInfo) -> bool:
        """False where an object comes whole for sure, by its name or its size."""
        return not (info.name.endswith(_COMPRESSED) or 0 <= (info.size_bytes or -1) <= _smallest(info))

    def begin(
        self,
        store: Store,
        info: ObjectInfo,
        cache: NodeCache,
        load_id: str,
        on_bytes: OnBytes,
    ) -> InParts | None:
        """Opens a torch zip, or a tar that may hold some, and brings its index here; None for anything else.

        One that was begun before, for another rank, is told of as it is. Called from several threads. None for stores
        without ranges, too. Raises as the store, `read_index` and `archive.unpack` do.
        """
        with self._lock:
            begun = self._begun.get((store.identity, info.name))
        if begun is not None:
            return replace(begun, fetched_bytes=0)
        begun = self._begin(store, info, cache, load_id, on_bytes)
        if begun is not None:
            with self._lock:
                self._begun[store.identity, info.name] = begun
                self._objects[begun.path] = store, info
        return begun

    def _begin(
        self, store: Store, info: ObjectInfo, cache: NodeCache, load_id: str, on_bytes: OnBytes
    ) -> InParts | None:
        described = store.describe(info.name)
        if not self.may_come_in_parts(info):
            return None
        source = self._source(store, info)
        if source is None:
            return None
        with contextlib.ExitStack() as undoing:
            undoing.callback(source.close)
            size = source.size_bytes
            if size <= _smallest(info):
                return None
            file = open_remote_file(store, info, source, cache, load_id, described, on_bytes)
            undoing.pop_all()
            undoing.callback(file.close)
            file.ensure([ByteRange(0, HEAD_AND_TAIL_BYTES)], on_bytes)
            kind = sniff(file.read(0, HEAD_BYTES))
            begun = None
            if kind == "torch-zip":
                file.ensure([ByteRange(size - HEAD_AND_TAIL_BYTES, size)], on_bytes)
                index = read_index(file.path, name=described, open_file=file.opener(on_bytes), partial=True)
                with self._lock:
                    self._files[file.path], self._indexes[file.path] = file, index
                begun = InParts(file.path, "file", size, file.fetched_bytes, (), {"": part_of(info, source)})
            elif kind == "tar" and size > SMALL_ARCHIVE_BYTES:
                archive = open_archive(file, info.name, described, HEAD_AND_TAIL_BYTES, on_bytes)
                if archive is not None:
                    with self._lock:
                        self._files |= {file.path: file, **archive.files}
                        self._indexes |= archive.indexes
                        self._archives[archive.path] = archive
                    begun = InParts(
                        archive.path,
                        "archive",
                        size,
                        archive.fetched_bytes,
                        archive.members,
                        {
                            name: part_of(info, archive.files[os.path.join(archive.path, name)].source)
                            for name in archive.parts
                        },
                    )
            if begun is not None:
                undoing.pop_all()
            return begun

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
            target = FileTarget(path, source.size_bytes)
            try:
                read_ranges([ObjectRead(source, [ByteRange(0, source.size_bytes)], target)], on_bytes)
            finally:
                target.close()
            return True
        finally:
            source.close()

    def stop(self) -> None:
        """Ends what is under way."""
        self.stopping.set()

    def serve(self, host: str) -> PeerAddress:
        """Hands out what has landed here to the ranks that fetch for other nodes, until the load ends."""
        if self._server is None:
            self._server = RangeServer(self._served, host)
        return self._server.address

    def _served(self, name: str) -> Served | None:
        path = self.known.find(name)
        if path is None or path not in self._files:
            return None
        landed = Landed(path)
        return Served(path, landed.reach, lambda: sum(file.fetched_bytes for file in self._files.values()))

    def index(self, path: str, name: str) -> FileIndex:
        """The index of a local file, or of one that comes in parts, once it was begun."""
        if path in self._indexes:
            return self._indexes.pop(path)
        return read_index(path, name=name, partial=path in self.known)

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
            source = peer(self.known.name_of(path), file.source.size_bytes) if peer is not None else None
            readings.append(file.reading(ranges, source))
        report = read_ranges([one for one in readings if one is not None], on_bytes)
        for path in wanted:
            self._compare_if_whole(path, on_bytes)
        return report

    def _compare_if_whole(self, path: str, on_bytes: OnBytes) -> None:
        file = self._files[path]
        if path not in self._objects:
            # An archive's member: what is told is of the whole archive.
            return
        if self.checks.verify == "before" and file.missing_bytes <= GAPS_BYTES:
            file.ensure([ByteRange(0, file.source.size_bytes)], on_bytes)
        if not file.missing_bytes and path not in self._compared:
            self._compared[path] = self.checks.compare(*self._objects[path], path, on_bytes)

    def compared(self, path: str) -> Compared | None:
        """What this rank compared all of the file at `path` with; None where it is none of its own."""
        if path not in self._objects:
            return None
        return self._compared.get(path) or Compared((), self.checks.left_out_of_parts(*self._objects[path]))

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

    def fetched_by_path(self) -> dict[str, int]:
        """What this rank brought so far of each file and archive that it began, by its path on this node."""
        files = {path: file.fetched_bytes for path, file in self._files.items()}
        return files | {path: archive.fetched_bytes for path, archive in self._archives.items()}

    @property
    def streamed(self) -> list[str]:
        """What this rank fetched whole because its server does no ranges, without secrets."""
        return list(self._servers.streamed)

    def _source(self, store: Store, info: ObjectInfo) -> RangeSource | None:
        """None where ranges cannot be had."""
        try:
            return self._servers.open(
                store, info, lambda: open_range_source(store, info, self._shared_connections())
            )
        except TryAgainError:
            # The plain way has its own attempts, and tells what it met.
            return None

    def _shared_connections(self) -> Connections:
        with self._lock:
            if self._connections is None:
                self._connections = Connections()
            return self._connections


def _smallest(info: ObjectInfo) -> int:
    """The size up to which an object comes whole."""
    return SMALL_ARCHIVE_BYTES if info.name.endswith(".tar") else 2 * HEAD_AND_TAIL_BYTES


@dataclass(frozen=True, slots=True)
class ObjectPart:
    """An object at one version, or a part of it, for other ranks to open, too."""

    object_name: str
    size_bytes: int
    """Of the whole object."""
    told_version: str | None
    """As the store tells it (`store.ObjectInfo`)."""
    version: str | None
    """As its range source does."""
    base: int = 0
    """Where the file begins in the object: an archive's member."""
    nbytes: int | None = None
    """Of the file; None where it is the whole object."""


@dataclass(frozen=True)
class InParts:
    """An object that comes in parts."""

    path: str
    """On this node: its file, or an archive's folder."""
    kind: Literal["file", "archive"]
    size_bytes: int
    fetched_bytes: int
    """So far, by this load."""
    members: tuple[str, ...] = ()
    """An archive's regular files, relative to `path`."""
    parts: Mapping[str, ObjectPart] = field(default_factory=dict)
    """Where those of them come from that come in parts; of a file that does, itself, under ``""``."""


def part_of(info: ObjectInfo, source: RangeSource) -> ObjectPart:
    """Where a source's bytes come from, for other ranks."""
    if not isinstance(source, WindowSource):
        return ObjectPart(info.name, source.size_bytes, info.version, source.version)
    whole = source.whole
    return ObjectPart(
        info.name, whole.size_bytes, info.version, whole.version, source.base, source.size_bytes
    )


class KnownParts:
    """Filled as files are fetched; `connections` gives those that all sources share."""

    def __init__(self, connections: Callable[[], Connections]) -> None:
        self._connections = connections
        self._known: dict[str, tuple[str, ObjectPart]] = {}
        self._path_of: dict[str, str] = {}
        self._sources: dict[str, RangeSource] = {}
        self._own_bytes: dict[str, int] = {}
        self._lock = threading.Lock()

    def note(self, path: str, name: str, origin: ObjectPart) -> None:
        """The node's file at `path` comes in parts. `name` is what the whole job calls it."""
        self._known[path] = (name, origin)
        self._path_of[name] = path

    def __contains__(self, path: str) -> bool:
        return path in self._known

    def name_of(self, path: str) -> str:
        """What the whole job calls the file at `path`."""
        return self._known[path][0]

    def path_of(self, name: str) -> str:
        """Where the file is on this node."""
        return self._path_of[name]

    def find(self, name: str) -> str | None:
        """The same; None where this node does not have it."""
        return self._path_of.get(name)

    def open_source(self, store: Store, path: str) -> RangeSource:
        """The bytes behind the node's file at `path`, for this rank to read itself.

        Raises as `open_range_source` does, and `CorruptError` where the object is another version by now.
        """
        name, origin = self._known[path]
        with self._lock:
            if origin.object_name not in self._sources:
                self._sources[origin.object_name] = self._open(store, name, origin)
            source = self._sources[origin.object_name]
        if origin.nbytes is None:
            return source
        return WindowSource(
            source, origin.base, origin.nbytes, object_name=origin.object_name, described=name
        )

    def add_fetched(self, by_path: Mapping[str, int]) -> None:
        """Notes what this rank read of files past the node's."""
        for path, n_bytes in by_path.items():
            self._own_bytes[path] = self._own_bytes.get(path, 0) + n_bytes

    def own_bytes(self, path: str) -> int:
        """What this rank read for itself alone of the file at `path`, or of the archive whose folder that is."""
        return sum(
            n_bytes
            for each, n_bytes in self._own_bytes.items()
            if path and (each == path or each.startswith(f"{path}/"))
        )

    def close(self) -> None:
        """Closes the sources."""
        for source in self._sources.values():
            source.close()

    def _open(self, store: Store, name: str, origin: ObjectPart) -> RangeSource:
        info = ObjectInfo(origin.object_name, origin.size_bytes, origin.told_version)
        try:
            source = open_range_source(store, info, self._connections())
        except TryAgainError as error:
            raise error.error from error
        if source is None or (source.version, source.size_bytes) != (origin.version, origin.size_bytes):
            got = "nothing" if source is None else f"{source.size_bytes} bytes, version {source.version}"
            raise CorruptError(
                f"{name}: changed while it was loaded: expected {origin.size_bytes} bytes, version "
                f"{origin.version}, got {got}",
                path=name,
            )
        return source
