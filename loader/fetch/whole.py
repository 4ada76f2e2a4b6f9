"""Obtains one object on this node: a file, or of an archive a folder of files. Runs on the node's leader only.

`obtain` uses a local file where it lies. Of a remote object it begins to fetch parts (`remote_files`) or downloads the
whole into the cache. Tars and compressed files, local ones too, are unpacked into the cache. A `Tally` counts bytes
meanwhile.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ..cache.folder import folder_of
from ..cache.node import CacheEntry, NodeCache
from ..cache.records import remove
from ..errors import AccessError, CorruptError, NotFoundError, fetched_twice
from ..formats.sniff import sniff
from ..store_errors import disk_full, is_disk_full, refusals_in
from ..stores.base import ObjectInfo, OnBytes, Store
from ..stores.names import path_of
from ..stores.symlinks import resolve_link
from .ahead import OF_ITEMS
from .archive import is_tar, unpack
from .decompress import COMPRESSED, Expanded
from .object_cache import ObjectCache
from .remote_files import ObjectPart
from .tally import OnProgress
from .whole_checks import NOTHING, Compared, WholeChecks, from_details

if TYPE_CHECKING:
    from .remote_files import RemoteFiles

_COPY = 1 << 20
_EXPANDS = {".tar": 2, ".tgz": 4, ".gz": 4, ".bz2": 4, ".xz": 4, ".lzma": 4, ".zst": 4}
"""How many times its size an object needs in the cache, by its name: for itself, and for what is likely in it."""


@dataclass(frozen=True, slots=True)
class Obtained:
    """An object, or its index, on this node; fields without a comment are those of `files.FetchedFile`."""

    object_name: str = field(repr=False)
    """After links were followed."""
    path: str
    kind: Literal["file", "archive"]
    size_bytes: int
    fetched_bytes: int
    members: tuple[str, ...]
    partial: bool = False
    """Whether it comes in parts."""
    parts: Mapping[str, ObjectPart] = field(default_factory=dict)
    compared: Compared = NOTHING
    whole: ObjectPart | None = None


def obtain(objects: ObjectCache, info: ObjectInfo, remote: RemoteFiles | None, on: OnProgress) -> Obtained:
    """The object `info` on this node, or its index where it comes in parts.

    Without `remote` every object comes whole and is compared with nothing. Raises the errors that `files.fetch_files`
    names for the store, the cache and the archives.
    """
    checks = WholeChecks("off") if remote is None else remote.checks
    store = objects.store
    if store.is_local:
        return _obtain_local(objects, info, checks, on)
    try:
        return _obtain_remote(objects, info, remote, on)
    except (NotFoundError, AccessError) as error:
        # Of what is not there, some stores say that it is refused.
        may_be_missing = isinstance(error, NotFoundError) or refusals_in(error)
        link = resolve_link(store, info.name) if may_be_missing and not info.certain else None
        if link is None:
            raise
        return _obtain_remote(objects, link.info, remote, on)


def _obtain_local(objects: ObjectCache, info: ObjectInfo, checks: WholeChecks, on: OnProgress) -> Obtained:
    store, cache = objects.store, objects.cache
    path = store.local_path(info.name)
    size = info.size_bytes or 0
    identity = ("local", os.path.realpath(path), str(size), str(info.version))
    try:
        kind = sniff(path)
    except OSError as error:
        raise AccessError(f"{path}: can't be read: {error.strerror}", path=path) from error
    if (kind != "tar" and kind not in COMPRESSED) or path.endswith(OF_ITEMS):
        compared = checks.compare_in_place(store, info, path, on.unpacked)
        return Obtained(info.name, path, "file", size, 0, (), compared=compared)

    def produce(target: str) -> dict[str, Any]:
        compared = checks.compare(store, info, path, on.unpacked)
        return {**_prepare(path, target, path, cache, on.unpacked), "compared": compared.as_details()}

    entry = cache.entry(path, *identity, nbytes=size * _expands(path))
    filled = entry.fill("object", path, on_disk(produce), on.unpacked, on_compared=on.unpacked)
    return _obtained(info.name, filled.path, filled.details, size, 0)


def _obtain_remote(
    objects: ObjectCache, info: ObjectInfo, remote: RemoteFiles | None, on: OnProgress
) -> Obtained:
    store, cache = objects.store, objects.cache
    described = store.describe(info.name)
    in_parts = None
    if remote is not None:
        with _disk_errors(cache.folder):
            in_parts = remote.begin(objects, info, on.arrived)
    if in_parts is not None:
        return Obtained(
            info.name,
            in_parts.path,
            in_parts.kind,
            in_parts.size_bytes,
            in_parts.fetched_bytes,
            in_parts.members,
            partial=True,
            parts=in_parts.parts,
        )
    on.comes_whole(info.size_bytes or 0)
    download = _Download(objects, info, remote, on)
    entry, name, produce = _whole_entry(objects, info), described, on_disk(download.produce)
    filled = entry.fill("object", name, produce, on.arrived, on_compared=on.unpacked)
    if filled.damaged and remote is not None:
        remote.note_again(described, download.fetched, "what the cache held was damaged")
    cached = not filled.damaged and not download.fetched
    if (
        remote is not None
        and remote.renew_indexes
        and cached
        and not from_details(filled.details.get("compared")).by
    ):
        entry.make_again("object", name, produce, on.arrived)
        filled = entry.fill("object", name, produce, on.arrived)
    if remote is not None and _lacks_sums(remote.checks, store, info, filled.details):
        # An earlier load fetched it, and had fewer checksums to compare it with.
        try:
            compared = remote.checks.compare(store, info, filled.path, on.unpacked)
        except CorruptError as error:
            entry.make_again("object", name, produce, on.arrived)
            filled = entry.fill("object", name, produce, on.arrived)
            remote.note_again(described, download.fetched, _without(error.message, described))
        else:
            filled = replace(filled, details={**filled.details, "compared": compared.as_details()})
    size = int(filled.details.get("size", -1))
    obtained = _obtained(info.name, filled.path, filled.details, size, download.fetched)
    return replace(obtained, whole=ObjectPart(info.name, info.size_bytes or 0, info.version, None))


def obtain_again(objects: ObjectCache, info: ObjectInfo, remote: RemoteFiles, on: OnProgress) -> int:
    """Brings a remote object that came whole to this node again, in the place of what is there; returns its bytes.

    Any rank of the node may, while the others read what is there. Raises as `obtain`.
    """
    described, entry = objects.store.describe(info.name), _whole_entry(objects, info)
    download = _Download(objects, info, remote, on)
    entry.make_again("object", described, on_disk(download.produce), on.arrived)
    return download.fetched


def _lacks_sums(checks: WholeChecks, store: Store, info: ObjectInfo, details: Mapping[str, Any]) -> bool:
    """Whether there are checksums that the product with these `details` was not compared with, and could be."""
    as_stored = "members" not in details and "decompressed" not in details
    return as_stored and not checks.is_done(store, info, from_details(details.get("compared")))


def _without(message: str, described: str) -> str:
    """`message` without the object's name before it."""
    return message.removeprefix(f"{described}: ")


@dataclass
class _Download:
    """Makes the product of a remote object that comes whole: the file, what a compressed one holds, or a tar's files.

    What does not match its checksum, or cannot be unpacked, is downloaded once more.
    """

    objects: ObjectCache
    info: ObjectInfo
    remote: RemoteFiles | None
    on: OnProgress
    fetched: int = 0
    """How many bytes came, over all downloads."""

    def produce(self, target: str) -> dict[str, Any]:
        """For `CacheEntry.fill`; the product is made at `target`."""
        cache, info = self.objects.cache, self.info
        described = self.objects.store.describe(info.name)
        free = cache.free_bytes(target)
        if info.size_bytes is not None and info.size_bytes > free:
            raise AccessError(
                f"{described}: needs {info.size_bytes} bytes, but {os.path.dirname(target)} has {free} left; set "
                "cache_dir to a folder with more",
                path=described,
            )
        try:
            return self._attempt(target, described)
        except _DamagedError as error:
            before = self.fetched
            remove(target)
            why = _without(error.error.message, described)
        try:
            details = self._attempt(target, described)
        except _DamagedError as error:
            raise fetched_twice(error.error) from error.error
        if self.remote is not None:
            self.remote.note_again(described, self.fetched - before, why)
        return details

    def _attempt(self, target: str, described: str) -> dict[str, Any]:
        store, info, remote = self.objects.store, self.info, self.remote
        raw = f"{target}.download"
        if remote is None or not remote.download(store, info, raw, self.on.arrived):
            store.download(info.name, raw, self.on.arrived, info)
        size = os.path.getsize(raw)
        self.fetched += size
        try:
            compared = NOTHING
            if remote is not None:
                compared = remote.checks.compare(store, info, raw, self.on.unpacked)
            details = _prepare(raw, target, described, self.objects.cache, self.on.unpacked)
        except CorruptError as error:
            os.unlink(raw)
            raise _DamagedError(error) from error
        if not details:
            os.replace(raw, target)
        else:
            os.unlink(raw)
        return {**details, "size": size, "compared": compared.as_details()}


class _DamagedError(Exception):
    """What came is damaged, as `error` says; what the store itself raises is not this."""

    def __init__(self, error: CorruptError) -> None:
        super().__init__(error.message)
        self.error = error


def _whole_entry(objects: ObjectCache, info: ObjectInfo) -> CacheEntry:
    """The cache entry of a remote object that comes whole."""
    nbytes = None if info.size_bytes is None else info.size_bytes * _expands(info.name)
    return objects.entry(info.name, info.size_bytes, info.version, nbytes=nbytes)


def whole_bytes(
    objects: ObjectCache, infos: Iterable[ObjectInfo | None], remote: RemoteFiles | None
) -> dict[str, int]:
    """The bytes that each cache folder needs for those of `infos` that surely come whole and are not in it."""
    needed: dict[str, int] = {}
    for info in infos:
        if info is None or not info.certain or info.size_bytes is None:
            continue
        if remote is None or not remote.may_come_in_parts(info):
            entry = _whole_entry(objects, info)
            if not entry.has("object", objects.store.describe(info.name)):
                room = info.size_bytes * min(2, _expands(info.name))
                needed[entry.home] = needed.get(entry.home, 0) + room
    return needed


def _expands(name: str) -> int:
    return next((times for suffix, times in _EXPANDS.items() if path_of(name).endswith(suffix)), 1)


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
    """Unpacks or expands `raw` to `target`; {} where `raw` is no archive and not compressed, and is used itself."""
    kind = sniff(raw)
    limit = cache.free_bytes(target)
    with _named(raw, described):
        if is_tar(raw):
            os.mkdir(target, 0o700)
            return {
                "members": unpack(raw, target, described=described, limit=limit, on_bytes=on_bytes),
            }
        if kind not in COMPRESSED or path_of(described).endswith(OF_ITEMS):
            return {}
        with Expanded(raw, kind, described, limit) as source, open(target, "xb") as file:
            while data := source.read(_COPY):
                file.write(data)
                on_bytes(len(data))
        return {"decompressed": kind}


@contextlib.contextmanager
def _named(raw: str, described: str) -> Any:
    """Puts the object's name into errors that name the temporary file `raw`."""
    try:
        yield
    except CorruptError as error:
        if error.path != raw or raw == described:
            raise
        raise CorruptError(error.message.replace(raw, described), path=described) from error


def on_disk(produce: Any) -> Any:
    """`produce`, whose OSErrors name the cache folder of its target."""

    def run(target: str) -> dict[str, Any]:
        with _disk_errors(folder_of(target) or target):
            made: dict[str, Any] = produce(target)
            return made

    return run


@contextlib.contextmanager
def _disk_errors(folder: str) -> Iterator[None]:
    """Turns an OSError into an `AccessError` that names the cache folder of its file, or `folder`."""
    try:
        yield
    except OSError as error:
        named = folder_of(error.filename) if isinstance(error.filename, str) else None
        if is_disk_full(error):
            raise disk_full(named or folder) from error
        raise AccessError(f"{named or folder}: {error.strerror or error}", path=named or folder) from error
