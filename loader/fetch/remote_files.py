"""Keeps the remote files of one load that come in parts: on the rank that fetches them, and on all ranks of the node.

`RemoteFiles.begin` fetches an object's index, `RemoteFiles.fetch` ranges of objects; only the leader of a node calls
them. `KnownParts` is what every rank knows: which files come in parts (an `ObjectPart` each), so that a rank may read
one itself, directly. `InParts` is what `begin` found of one object.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

from ...distributed.printable import package_logger
from ...distributed.range_server import PeerAddress, RangeServer, Served
from ..byte_ranges import ByteRange
from ..cache.folder import folder_of
from ..cache.holes import Landed, fetching_again
from ..errors import UNPROVED, CorruptError, FormatError, RankloadError, UnsafeError, fetched_twice
from ..formats.safetensors import index_bytes
from ..formats.sniff import HEAD_BYTES, sniff
from ..formats.torch_file import FileIndex, read_index
from ..http.connections import Connections
from ..plurals import counted
from ..ranges.base import RangeSource
from ..ranges.concurrency import START, Concurrency
from ..ranges.destinations import FileDestination
from ..ranges.engine import ObjectRead, ReadReport, read_ranges
from ..ranges.open import RangeServers, open_range_source
from ..ranges.window import WindowSource
from ..retries import TryAgainError, until_done
from ..stores.base import ObjectInfo, OnBytes, Store
from ..stores.names import path_of
from ..stores.probes import AT_ONCE
from ..workers import Stop, stopped_by
from . import ahead
from .ahead import COMPRESSED_NAMES, HEAD_AND_TAIL_BYTES, OF_ITEMS, TORCH_NAMES
from .object_cache import ObjectCache
from .remote_file import RemoteFile, open_remote_file
from .tally import FetchedAgain
from .tars import RemoteArchive, open_archive
from .whole_checks import Compared, WholeChecks

PARALLEL_FROM_BYTES = 32 << 20
"""From this size on, a whole object is fetched over several connections."""
GAPS_BYTES = 64 << 10
"""With ``verify="before"``, if no more than this is missing of an object, the rest is fetched too, so that the object's
own checksum can be compared: a full restore leaves only the gaps between the records."""
SMALL_ARCHIVE_BYTES = 1 << 20
"""Archives up to this size come whole."""
LATE_S = 0.01
"""From this latency on, a store's answers are late."""
LATE_START = 16
"""How many connections read at first where they are: of a few requests, none waits for another one's answer."""
_logger = package_logger()


@dataclass(frozen=True, slots=True)
class ObjectPart:
    """Where a file's bytes are: in one version of an object, as the whole of it or (an archive's member) a part."""

    object_name: str = field(repr=False)  # may have a signature in it
    size_bytes: int
    """Of the whole object."""
    store_version: str | None
    """The version that the store states (`stores.base.ObjectInfo`)."""
    version: str | None
    """The version that the object's range source states."""
    base: int = 0
    """Where the file begins in the object."""
    nbytes: int | None = None
    """The file's size; None where it is the whole object."""


@dataclass(frozen=True)
class InParts:
    """An object that comes in parts, of which the index is here."""

    path: str
    """On this node: its file, or an archive's folder."""
    kind: Literal["file", "archive"]
    size_bytes: int
    fetched_bytes: int
    """How many bytes this load fetched of it so far."""
    members: tuple[str, ...] = ()
    """An archive's regular files, relative to `path`."""
    parts: Mapping[str, ObjectPart] = field(default_factory=dict)
    """Of an archive: the members that come in parts, by name. Of a file: the file itself, under ``""``."""


class RemoteFiles:
    """Context manager around a load. On ranks that do not fetch for their node, only `known` is filled."""

    def __init__(self, checks: WholeChecks | None = None, *, renew_indexes: bool = False) -> None:
        """`checks` compare objects that came whole; by default they compare nothing. With `renew_indexes`, those that
        no checksum proves are fetched although the node's cache has them."""
        self.checks = checks or WholeChecks("off")
        self.renew_indexes = renew_indexes
        self._compared: dict[str, Compared] = {}
        self._files: dict[str, RemoteFile] = {}
        self._in_parts: dict[tuple[str, str], InParts] = {}
        """By store and object."""
        self._archives: dict[str, RemoteArchive] = {}
        self._indexes: dict[str, FileIndex] = {}
        self._index_spans: dict[str, ByteRange] = {}
        """Where the index lies that no checksum of its own proves, by path."""
        self._by_records: set[str] = set()
        """Paths of files all of whose storages have checksums of their own."""
        self.renewed: set[str] = set()
        """Paths of files all of which was fetched again, while ranks may have read of it."""
        self._server: RangeServer | None = None
        self._objects: dict[str, tuple[Store, ObjectInfo]] = {}
        self._lock = threading.Lock()
        self._connections: Connections | None = None
        self._servers = RangeServers()
        self.fetched_again: list[FetchedAgain] = []
        """By this rank, because it did not match its checksum."""
        self.stopping = Stop()
        """Set when the reads that are under way are to end."""
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

    def note_again(self, name: str, n_bytes: int, why: str) -> None:
        """Notes for the receipt that `n_bytes` of the file `name` were fetched again, and logs it."""
        why = why.partition(". The file is ")[0].rstrip(". ")
        if n_bytes:
            _logger.warning("%s: %s; %s fetched again", name, why, counted(n_bytes, "byte"))
            with self._lock:
                same = [one for one in self.fetched_again if (one.name, one.why) == (name, why)]
                self.fetched_again = [one for one in self.fetched_again if one not in same]
                n_bytes += sum(one.nbytes for one in same)
                self.fetched_again.append(FetchedAgain(name, n_bytes, why))

    def may_come_in_parts(self, info: ObjectInfo) -> bool:
        """False where the object's name or size shows that it comes whole."""
        return not (
            path_of(info.name).endswith(COMPRESSED_NAMES) or 0 <= (info.size_bytes or -1) <= _smallest(info)
        )

    def begin(self, objects: ObjectCache, info: ObjectInfo, on_bytes: OnBytes) -> InParts | None:
        """Opens a torch zip, a safetensors file, or a tar that may hold torch zips, and fetches its index.

        None for any other object, and where the store does no ranges: it has to come whole then. An object that was
        begun before is returned with 0 `fetched_bytes`. May be called from several threads. Raises as the store,
        `read_index` and `archive.unpack` do.
        """
        key = objects.store.identity, info.name
        with self._lock:
            in_parts = self._in_parts.get(key)
        if in_parts is not None:
            return replace(in_parts, fetched_bytes=0)
        in_parts = self._begin(objects, info, on_bytes)
        if in_parts is not None:
            with self._lock:
                self._in_parts[key] = in_parts
                self._objects[in_parts.path] = objects.store, info
        return in_parts

    def _begin(self, objects: ObjectCache, info: ObjectInfo, on_bytes: OnBytes) -> InParts | None:
        described = objects.store.describe(info.name)
        if not self.may_come_in_parts(info):
            return None
        source = self._source(objects.store, info, on_bytes)
        if source is None:
            return None
        with contextlib.ExitStack() as undoing:
            undoing.callback(source.close)
            size = source.size_bytes
            if size <= _smallest(info):
                return None
            file = open_remote_file(objects, info, source, on_bytes)
            undoing.pop_all()
            undoing.callback(file.close)
            head = file.read(0, HEAD_BYTES) if self.renew_indexes else b""
            if sniff(head) == "safetensors":
                # An earlier load left it.
                file.forget([ByteRange(0, index_bytes(head, size))])
            for start, data in ahead.taken(objects.store, info.name):
                on_bytes(file.put(start, data))
            if file.damaged_bytes:
                self.note_again(described, file.damaged_bytes, "what the cache held was damaged")
            try:
                in_parts = self._read_begin(info, file, described, on_bytes)
            except (CorruptError, FormatError, UnsafeError) as error:
                # One bit that flipped on the way can make an index anything.
                dropped = file.forget_what_was_read()
                if not dropped:
                    raise
                in_parts = self._read_begin_again(info, file, described, on_bytes)
                self.note_again(described, dropped, error.message.removeprefix(f"{described}: "))
            if in_parts is not None:
                undoing.pop_all()
                self.known.lend(info.name, source)
            return in_parts

    def _read_begin_again(
        self, info: ObjectInfo, file: RemoteFile, described: str, on_bytes: OnBytes
    ) -> InParts | None:
        try:
            return self._read_begin(info, file, described, on_bytes)
        except CorruptError as error:
            raise fetched_twice(error) from error.__cause__

    def _read_begin(
        self, info: ObjectInfo, file: RemoteFile, described: str, on_bytes: OnBytes
    ) -> InParts | None:
        """Fetches the index of `file`; None where the object has to come whole."""
        source, size = file.source, file.source.size_bytes
        if path_of(info.name).endswith(OF_ITEMS):
            with self._lock:
                self._files[file.path] = file
            part = _part_of(info, source)
            return InParts(file.path, "file", size, file.fetched_bytes, (), {"": part})
        at_end = ByteRange(size - HEAD_AND_TAIL_BYTES, size)
        # Of a name that torch files have, both ends are asked for at once.
        is_likely = path_of(info.name).endswith(TORCH_NAMES)
        file.ensure([ByteRange(0, HEAD_AND_TAIL_BYTES), *([at_end] if is_likely else [])], on_bytes)
        kind = sniff(file.read(0, HEAD_BYTES))
        if kind in ("torch-zip", "safetensors"):
            at_start = ByteRange(0, index_bytes(file.read(0, HEAD_BYTES), size))
            file.ensure([at_end if kind == "torch-zip" else at_start], on_bytes)
            index = read_index(file.path, name=described, open_file=file.opener(on_bytes), partial=True)
            with self._lock:
                self._files[file.path], self._indexes[file.path] = file, index
                if index.verifiable:
                    self._by_records.add(file.path)
                if kind == "safetensors":
                    self._index_spans[file.path] = at_start
            return InParts(file.path, "file", size, file.fetched_bytes, (), {"": _part_of(info, source)})
        if kind == "tar" and size > SMALL_ARCHIVE_BYTES:
            archive = open_archive(file, info.name, described, HEAD_AND_TAIL_BYTES, on_bytes)
            if archive is not None:
                with self._lock:
                    self._files |= {file.path: file, **archive.files}
                    self._indexes |= archive.indexes
                    self._archives[archive.path] = archive
                for name, n_bytes, why in archive.fetched_again:
                    self.note_again(f"{described}:{name}", n_bytes, why)
                parts = {
                    name: _part_of(info, archive.files[os.path.join(archive.path, name)].source)
                    for name in archive.parts
                }
                return InParts(archive.path, "archive", size, archive.fetched_bytes, archive.members, parts)
        return None

    def download(self, store: Store, info: ObjectInfo, path: str, on_bytes: OnBytes) -> bool:
        """Downloads a whole object in parallel ranges, into a new file at `path`.

        False, and nothing done, where the object is too small for that or its store does no ranges. Raises as
        `read_ranges` does, and leaves an incomplete file then.
        """
        if 0 <= (info.size_bytes or -1) < PARALLEL_FROM_BYTES:
            return False
        source = self._source(store, info, on_bytes)
        if source is None:
            return False
        try:
            target = FileDestination(path, source.size_bytes)
            try:
                read_ranges([ObjectRead(source, [ByteRange(0, source.size_bytes)], target)], on_bytes)
            finally:
                target.close()
            return True
        finally:
            source.close()

    def stop(self) -> None:
        """Ends the reads that are under way."""
        self.stopping.set()

    def serve(self, host: str, interface: str | None) -> PeerAddress:
        """Serves what has landed here to the leaders of other nodes, until the load ends; the address to ask.

        `interface` is as `LoadOptions` takes it. Raises `TopologyError` where this machine has none such.
        """
        if self._server is None:
            self._server = RangeServer(self._served, host, interface)
        return self._server.address

    def _served(self, name: str) -> Served | None:
        path = self.known.find(name)
        if path is None or path not in self._files:
            return None
        landed = Landed(path)
        return Served(path, landed.reach, lambda: sum(file.fetched_bytes for file in self._files.values()))

    def index(self, path: str, name: str) -> FileIndex:
        """The index of a local file, or of one that comes in parts, once it was begun. Messages call it `name`."""
        if path in self._indexes:
            return self._indexes.pop(path)
        return read_index(path, name=name, partial=path in self.known)

    def fetch(
        self,
        wanted: Mapping[str, Iterable[ByteRange]],
        on_bytes: OnBytes,
        peer: Callable[[str, int], RangeSource] | None = None,
    ) -> ReadReport:
        """Fetches the `wanted` ranges, by path, of all files in parallel. Raises as `read_ranges` does.

        They come from the store, or from the source that ``peer(name, size_bytes)`` opens. A file that is whole then is
        compared with its checksums.
        """
        object_reads = []
        for path, ranges in wanted.items():
            file = self._files[path]
            source = peer(self.known.name_of(path), file.source.size_bytes) if peer is not None else None
            object_reads.append(file.object_read(ranges, source))
        reads = [one for one in object_reads if one is not None]
        with self._asking_for_sums(wanted):
            report = read_ranges(reads, on_bytes, concurrency=Concurrency(self._connections_at_first()))
        for path in wanted:
            self._compare_if_whole(path, on_bytes)
        return report

    def _connections_at_first(self) -> int:
        """How many read at first: where answers are late, more wait for theirs at once."""
        stores = {id(store): store for store, _ in self._objects.values()}
        latency_s = max((ahead.latency_s(store) for store in stores.values()), default=0.0)
        return START if latency_s < LATE_S else LATE_START

    @contextlib.contextmanager
    def _asking_for_sums(self, wanted: Mapping[str, Iterable[ByteRange]]) -> Iterator[None]:
        """Asks the stores for the checksums of objects that will be whole once `wanted` has come, meanwhile."""
        objects = [
            self._objects[path]
            for path, ranges in wanted.items()
            if self._is_compared(path) and self._files[path].missing_beside(ranges) <= self._most_gaps
        ]
        stop = Stop()

        def ask(store: Store, info: ObjectInfo) -> None:
            # What fails is asked for again by whoever needs it, who raises it.
            with contextlib.suppress(RankloadError, TryAgainError), stopped_by(stop):
                store.stored_sums(info)

        with ThreadPoolExecutor(AT_ONCE) as threads:
            try:
                for one in objects:
                    threads.submit(ask, *one)
                yield
            except BaseException:
                stop.set()
                threads.shutdown(cancel_futures=True)
                raise

    @property
    def _most_gaps(self) -> int:
        """How much may be missing of an object that is fetched whole for its checksum's sake."""
        return GAPS_BYTES if self.checks.verify == "before" else 0

    def _is_compared(self, path: str) -> bool:
        """Whether the file at `path` is compared with the checksums of its object, once it is whole."""
        # An archive's member has none: checksums are known of whole objects only. And where records have their own,
        # what is read is compared anyway, as it is read: a second pass would only cost time.
        by_records = self.checks.verify != "before" and path in self._by_records
        return path in self._objects and self.checks.verify != "off" and not by_records

    def _compare_if_whole(self, path: str, on_bytes: OnBytes) -> None:
        file = self._files[path]
        if not self._is_compared(path):
            return
        if self.checks.verify == "before" and file.missing_bytes <= GAPS_BYTES:
            file.ensure([ByteRange(0, file.source.size_bytes)], on_bytes)
        if not file.missing_bytes and path not in self._compared:
            try:
                self._compared[path] = self.checks.compare(*self._objects[path], path, on_bytes)
            except CorruptError as error:
                self._compared[path] = self._compare_again(path, on_bytes, error)

    def _compare_again(self, path: str, on_bytes: OnBytes, error: CorruptError) -> Compared:
        """Fetches all of the file at `path` again, which `error` says to be damaged, and compares it once more."""
        file, span = self._files[path], self._index_spans.get(path, ByteRange(0, 0))
        whole = [ByteRange(0, file.source.size_bytes)]
        with fetching_again(path, self.known.load_id, lambda: on_bytes(0)) as done:
            if list(done.left(whole)) != whole:
                # A rank has put other bytes in the place of a damaged storage's meanwhile.
                with contextlib.suppress(CorruptError):
                    return self.checks.compare(*self._objects[path], path, on_bytes)
            done.note(whole)
            index = file.read(span.start, span.length)
            n_bytes = file.fetch_again(whole, on_bytes)
            self.known.add_fetched({path: n_bytes})
        described = self._objects[path][0].describe(self._objects[path][1].name)
        self.note_again(described, n_bytes, error.message.removeprefix(f"{described}: "))
        try:
            compared = self.checks.compare(*self._objects[path], path, on_bytes)
        except CorruptError as again:
            raise fetched_twice(again) from again.__cause__
        if file.read(span.start, span.length) != index:
            damaged = CorruptError(
                f"{described}: its index came damaged, and was used before its checksum could be compared; it was "
                "fetched again, and is right now",
                path=described,
            )
            damaged.details[UNPROVED] = True
            raise damaged
        self.renewed.add(path)
        return compared

    def compared(self, path: str) -> Compared | None:
        """What this rank compared all of the file at `path` with; None where this rank did not begin that file."""
        if path not in self._objects:
            return None
        return self._compared.get(path) or Compared((), self.checks.left_out_of_parts(*self._objects[path]))

    def missing_bytes(self, wanted: Mapping[str, Sequence[ByteRange]]) -> int:
        """How many bytes `fetch` would fetch."""
        return sum(self.missing_by_folder(wanted).values())

    def missing_by_folder(self, wanted: Mapping[str, Sequence[ByteRange]]) -> dict[str, int]:
        """How many bytes `fetch` would put into each cache folder."""
        needed: dict[str, int] = {}
        for path, ranges in wanted.items():
            object_read = self._files[path].object_read(ranges)
            folder = folder_of(path) or os.path.dirname(path)
            missing = sum(one.length for one in object_read.ranges) if object_read is not None else 0
            needed[folder] = needed.get(folder, 0) + missing
        return needed

    def fetched_by_path(self) -> dict[str, int]:
        """How many bytes this rank has fetched of each file and archive that it began, by the path on this node."""
        files = {path: file.fetched_bytes for path, file in self._files.items()}
        return files | {path: archive.fetched_bytes for path, archive in self._archives.items()}

    def held_by_path(self) -> dict[str, int]:
        """How many bytes of each of those are on this node now, whoever fetched them."""
        held = {path: file.source.size_bytes - file.missing_bytes for path, file in self._files.items()}
        for path, archive in self._archives.items():
            own = held[archive.tar.path] + sum(held.get(one.path, 0) for one in archive.files.values())
            held[path] = min(archive.tar.source.size_bytes, own)
        return held

    @property
    def streamed(self) -> list[str]:
        """The objects that came whole because their server does no ranges, as messages call them."""
        return list(self._servers.streamed)

    def _source(self, store: Store, info: ObjectInfo, on_bytes: OnBytes) -> RangeSource | None:
        """The object's range source; None where its store does no ranges."""
        return until_done(
            store.outages,
            store.describe(info.name),
            lambda: self._servers.open(
                store, info, lambda: open_range_source(store, info, self._shared_connections())
            ),
            lambda: on_bytes(0),
        )

    def _shared_connections(self) -> Connections:
        with self._lock:
            if self._connections is None:
                self._connections = Connections()
            return self._connections


class KnownParts:
    """Which files of this node come in parts, as every rank of the node knows it; and which came whole."""

    def __init__(self, connections: Callable[[], Connections]) -> None:
        """`connections` returns those that all range sources of this rank share."""
        self._connections = connections
        self._known: dict[str, tuple[str, ObjectPart]] = {}
        self._path_of: dict[str, str] = {}
        self._sources: dict[str, RangeSource] = {}
        self._lent: dict[str, RangeSource] = {}
        self._own_bytes: dict[str, int] = {}
        self._whole: dict[str, tuple[str, ObjectPart]] = {}
        self.load_id = ""
        """Of the load, the same on all ranks."""
        self._lock = threading.Lock()

    def note(self, path: str, name: str, part: ObjectPart) -> None:
        """Says that the node's file at `path` comes in parts; `name` is the same on all ranks of the job."""
        self._known[path] = (name, part)
        self._path_of[name] = path

    def note_whole(self, path: str, name: str, part: ObjectPart) -> None:
        """Says that the file, or the archive's folder, at `path` came whole from an object of a store."""
        self._whole[path] = (name, part)

    def whole_at(self, path: str) -> tuple[str, str, ObjectPart] | None:
        """The path, the name and the object of what came whole, where `path` is that, or lies in its folder."""
        while path not in self._whole:
            path, before = os.path.dirname(path), path
            if path == before:
                return None
        return (path, *self._whole[path])

    def __contains__(self, path: str) -> bool:
        return path in self._known

    @property
    def sizes(self) -> dict[str, int]:
        """How many bytes each of them has in the end, by its path on this node."""
        return {
            path: part.size_bytes if part.nbytes is None else part.nbytes
            for path, (_, part) in self._known.items()
        }

    def name_of(self, path: str) -> str:
        """The name, the same on all ranks, of the file at `path`."""
        return self._known[path][0]

    def path_of(self, name: str) -> str:
        """The path on this node of the file `name`. Raises `KeyError` where this node does not have it."""
        return self._path_of[name]

    def find(self, name: str) -> str | None:
        """As `path_of`; None where this node does not have the file."""
        return self._path_of.get(name)

    def lend(self, object_name: str, source: RangeSource) -> None:
        """Gives `open_source` the source of an object that is open already, and that its owner closes."""
        with self._lock:
            self._lent[object_name] = source

    def open_source(self, store: Store, path: str) -> RangeSource:
        """The bytes of the file at `path`, from the store, for this rank to read itself; closed with `KnownParts`.

        Raises as `open_range_source` does, and `CorruptError` where the object is another version by now.
        """
        name, part = self._known[path]
        with self._lock:
            source = self._lent.get(part.object_name) or self._sources.get(part.object_name)
            if source is None:
                source = self._sources[part.object_name] = self._open(store, name, part)
        if part.nbytes is None:
            return source
        return WindowSource(source, part.base, part.nbytes, object_name=part.object_name, described=name)

    def add_fetched(self, by_path: Mapping[str, int]) -> None:
        """Adds the bytes that this rank read directly, by the path of their file on this node."""
        for path, n_bytes in by_path.items():
            self._own_bytes[path] = self._own_bytes.get(path, 0) + n_bytes

    def own_bytes(self, path: str) -> int:
        """How many bytes this rank read directly of the file at `path`, or of the archive whose folder that is."""
        return sum(
            n_bytes
            for each, n_bytes in self._own_bytes.items()
            if path and (each == path or each.startswith(f"{path}/"))
        )

    def close(self) -> None:
        """Closes the sources that `open_source` opened."""
        for source in self._sources.values():
            source.close()

    def _open(self, store: Store, name: str, part: ObjectPart) -> RangeSource:
        info = ObjectInfo(part.object_name, part.size_bytes, part.store_version)
        source = until_done(
            store.outages,
            name,
            lambda: open_range_source(store, info, self._connections()),
            lambda: store.heard(0, name),
        )
        if source is None or (source.version, source.size_bytes) != (part.version, part.size_bytes):
            got = "nothing" if source is None else f"{source.size_bytes} bytes, version {source.version}"
            raise CorruptError(
                f"{name}: changed while it was loaded: expected {part.size_bytes} bytes, version "
                f"{part.version}, got {got}",
                path=name,
            )
        return source


def _smallest(info: ObjectInfo) -> int:
    """The size up to which an object of this name comes whole."""
    return SMALL_ARCHIVE_BYTES if path_of(info.name).endswith(".tar") else 2 * HEAD_AND_TAIL_BYTES


def _part_of(info: ObjectInfo, source: RangeSource) -> ObjectPart:
    """Where the bytes of `source` are, for other ranks to open."""
    if not isinstance(source, WindowSource):
        return ObjectPart(info.name, source.size_bytes, info.version, source.version)
    whole = source.whole
    return ObjectPart(
        info.name, whole.size_bytes, info.version, whole.version, source.base, source.size_bytes
    )
