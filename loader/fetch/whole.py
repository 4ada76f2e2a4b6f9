"""One object becomes one file, or one folder of files, on this node."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ..cache.folder import folder_of
from ..cache.node import CacheEntry, NodeCache
from ..errors import AccessError, CorruptError, NotFoundError
from ..formats.sniff import sniff
from ..ranges.workers import Stop
from ..store_errors import disk_full, is_disk_full
from ..stores.base import ObjectInfo, OnBytes, Store
from ..stores.symlinks import resolve_link
from .archive import is_tar, unpack
from .decompress import COMPRESSED, Expanded
from .remote_files import ObjectPart
from .whole_checks import NOTHING, Compared, WholeChecks, from_details

if TYPE_CHECKING:
    from .remote_files import RemoteFiles

_COPY = 1 << 20
_EXPANDS = {".tar": 2, ".tgz": 4, ".gz": 4, ".bz2": 4, ".xz": 4, ".lzma": 4, ".zst": 4}
"""How much room a name asks for, in times its size: for itself, and for what is most likely in it."""
Told = tuple[OnBytes, OnBytes, OnBytes]
"""Called as bytes arrive, as they are unpacked, and with the size of what turns out to come whole."""


@dataclass(frozen=True, slots=True)
class Obtained:
    object_name: str
    path: str
    kind: Literal["file", "archive"]
    size_bytes: int
    fetched_bytes: int
    members: tuple[str, ...]
    partial: bool = False
    """Whether it was not fetched whole (`remote_files`)."""
    parts: Mapping[str, ObjectPart] = field(default_factory=dict)
    """Where those files come from of which the index alone was fetched so far; see `fetch.FetchedFile`."""
    compared: Compared = NOTHING


class Tally:
    """Bytes per file, added to by workers and read by whoever watches; continues an earlier fetch's sums."""

    def __init__(self, before: Mapping[str, float]) -> None:
        self._before_done = int(before.get("bytes_done", 0))
        self._before_total = int(before.get("bytes_total", 0))
        self._done: dict[str, int] = {}
        self._total: dict[str, int] = {}
        self.moved = 0
        """Grows whenever anything moves, unpacking included."""

    def expect(self, name: str, size: int | None) -> None:
        self._done[name], self._total[name] = 0, size or 0

    def of(self, name: str, stop: Stop) -> Told:
        """What to call as bytes of `name` arrive, as it is unpacked, both of which raise once work is given up, and
        once it is known to come whole."""

        def arrived(n_bytes: int) -> None:
            stop.check()
            if n_bytes:
                self._done[name] = self._done.get(name, 0) + n_bytes
                self.moved += 1

        def unpacked(n_bytes: int) -> None:
            stop.check()
            self.moved += 1

        def whole(n_bytes: int) -> None:
            self._total[name] = n_bytes

        return arrived, unpacked, whole

    def settle(self, name: str, size: int, fetched: int) -> None:
        """`name` is here; where nothing moved for it, it is not counted at all."""
        self.moved += 1
        if self._done.get(name) or fetched:
            self._done[name] = self._total[name] = max(size, fetched)
        elif name in self._total:
            self._total[name] = 0

    def counters(self) -> dict[str, float]:
        """For the channel; absent while nothing has to be downloaded."""
        done = self._before_done + sum(self._done.values())
        total = self._before_total + sum(self._total.values())
        return {"bytes_done": done, "bytes_total": max(done, total)} if total or done else {}

    def unfinished(self) -> str:
        """The files under way, with how far they are, for messages."""
        names = [name for name, total in self._total.items() if self._done[name] < total or not total]
        shown = [f"{os.path.basename(name)} at byte {self._done[name]}" for name in names[:4]]
        return ", ".join(shown) or "waiting for the store"


def obtain(
    store: Store,
    info: ObjectInfo,
    cache: NodeCache,
    remote: RemoteFiles | None,
    load_id: str,
    told: Told,
) -> Obtained:
    """The object `info` on this node, or its index; see `fetch.fetch_files` for what is raised."""
    checks = WholeChecks("off") if remote is None else remote.checks
    if store.is_local:
        return _obtain_local(store, info, cache, checks, told)
    try:
        return _obtain_remote(store, info, cache, remote, load_id, told)
    except NotFoundError:
        link = None if info.certain else resolve_link(store, info.name)
        if link is None:
            raise
        return _obtain_remote(store, link.info, cache, remote, load_id, told)


def _obtain_local(
    store: Store, info: ObjectInfo, cache: NodeCache, checks: WholeChecks, told: Told
) -> Obtained:
    path = store.local_path(info.name)
    size = info.size_bytes or 0
    identity = ("local", os.path.realpath(path), str(size), str(info.version))
    try:
        kind = sniff(path)
    except OSError as error:
        raise AccessError(f"{path}: can't be read: {error.strerror}", path=path) from error
    if kind != "tar" and kind not in COMPRESSED:
        compared = checks.compare_in_place(store, info, path, told[1])
        return Obtained(info.name, path, "file", size, 0, (), compared=compared)

    def produce(target: str) -> dict[str, Any]:
        compared = checks.compare(store, info, path, told[1])
        return {**_prepare(path, target, path, cache, told[1]), "compared": compared.as_details()}

    entry = cache.entry(path, *identity, nbytes=size * _expands(path))
    filled = entry.fill("object", path, _on_disk(produce), told[1])
    return _obtained(info.name, filled.path, filled.details, size, 0)


def _obtain_remote(
    store: Store,
    info: ObjectInfo,
    cache: NodeCache,
    remote: RemoteFiles | None,
    load_id: str,
    told: Told,
) -> Obtained:
    described = store.describe(info.name)
    begun = None
    if remote is not None:
        with _disk_errors(cache.folder):
            begun = remote.begin(store, info, cache, load_id, told[0])
    if begun is not None:
        size, fetched = begun.size_bytes, begun.fetched_bytes
        return Obtained(info.name, begun.path, begun.kind, size, fetched, begun.members, True, begun.parts)
    told[2](info.size_bytes or 0)
    entry = whole_entry(store, info, cache, load_id)
    fetched = 0

    def produce(target: str) -> dict[str, Any]:
        nonlocal fetched
        free = cache.free_bytes(target)
        if info.size_bytes is not None and info.size_bytes > free:
            raise AccessError(
                f"{described}: needs {info.size_bytes} bytes, but {entry.home} has {free} left; set "
                "cache_dir to a folder with more",
                path=described,
            )
        raw = f"{target}.download"
        if remote is None or not remote.download(store, info, raw, told[0]):
            store.download(info.name, raw, told[0], info)
        fetched = os.path.getsize(raw)
        compared = remote.checks.compare(store, info, raw, told[1]) if remote is not None else NOTHING
        details = _prepare(raw, target, described, cache, told[1])
        if not details:
            os.replace(raw, target)
        else:
            os.unlink(raw)
        return {**details, "size": fetched, "compared": compared.as_details()}

    filled = entry.fill("object", described, _on_disk(produce), told[0])
    size = int(filled.details.get("size", -1))
    obtained = _obtained(info.name, filled.path, filled.details, size, fetched)
    as_stored = obtained.kind == "file" and "decompressed" not in filled.details
    if remote is not None and as_stored and not remote.checks.is_done(store, info, obtained.compared):
        # An earlier load brought it here, and had less to compare it with.
        compared = remote.checks.compare(store, info, obtained.path, told[1])
        return replace(obtained, compared=compared)
    return obtained


def whole_entry(store: Store, info: ObjectInfo, cache: NodeCache, load_id: str) -> CacheEntry:
    """The entry of a remote object that comes whole."""
    # What has no version, or no size, can't be told from what it was yesterday.
    lasting = info.version is not None and info.size_bytes is not None
    return cache.entry(
        store.describe(info.name),
        store.identity,
        info.name,
        str(info.size_bytes),
        info.version if lasting else f"load {load_id}",
        nbytes=None if info.size_bytes is None else info.size_bytes * _expands(info.name),
        lasting=lasting,
    )


def whole_bytes(
    store: Store,
    infos: Iterable[ObjectInfo | None],
    cache: NodeCache,
    remote: RemoteFiles | None,
    load_id: str,
) -> dict[str, int]:
    """What those of `infos` need in each cache folder that come whole for sure, and are not there."""
    needed: dict[str, int] = {}
    for info in infos:
        if info is None or not info.certain or info.size_bytes is None:
            continue
        if remote is None or not remote.may_come_in_parts(info):
            entry = whole_entry(store, info, cache, load_id)
            if not entry.has("object", store.describe(info.name)):
                room = info.size_bytes * min(2, _expands(info.name))
                needed[entry.home] = needed.get(entry.home, 0) + room
    return needed


def _expands(name: str) -> int:
    return next((times for suffix, times in _EXPANDS.items() if name.endswith(suffix)), 1)


def _obtained(name: str, path: str, details: Mapping[str, Any], size: int, fetched: int) -> Obtained:
    members = details.get("members")
    return Obtained(
        object_name=name,
        path=path,
        kind="file" if members is None else "archive",
        size_bytes=size,
        fetched_bytes=fetched,
        members=tuple(members or ()),
        compared=from_details(details.get("compared")),
    )


def _prepare(raw: str, target: str, described: str, cache: NodeCache, on_bytes: OnBytes) -> dict[str, Any]:
    """Unpacks or decompresses `raw` to `target`; empty where it is neither and `raw` itself will do."""
    kind = sniff(raw)
    limit = cache.free_bytes(target)
    with _named(raw, described):
        if is_tar(raw):
            os.mkdir(target, 0o700)
            return {
                "members": unpack(raw, target, described=described, limit=limit, on_bytes=on_bytes),
            }
        if kind not in COMPRESSED:
            return {}
        with Expanded(raw, kind, described, limit) as source, open(target, "xb") as file:
            while data := source.read(_COPY):
                file.write(data)
                on_bytes(len(data))
        return {"decompressed": kind}


@contextlib.contextmanager
def _named(raw: str, described: str) -> Any:
    """Errors name the object rather than where its bytes lie for the moment."""
    try:
        yield
    except CorruptError as error:
        if error.path != raw or raw == described:
            raise
        raise CorruptError(error.message.replace(raw, described), path=described) from error


def _on_disk(produce: Any) -> Any:
    def run(target: str) -> dict[str, Any]:
        with _disk_errors(folder_of(target) or target):
            made: dict[str, Any] = produce(target)
            return made

    return run


@contextlib.contextmanager
def _disk_errors(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        named = folder_of(error.filename) if isinstance(error.filename, str) else None
        if is_disk_full(error):
            raise disk_full(named or folder) from error
        raise AccessError(f"{named or folder}: {error.strerror or error}", path=named or folder) from error
