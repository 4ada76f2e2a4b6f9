"""The store of files on this node, which are used where they lie."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Hashable
from urllib.parse import unquote

from ..errors import AccessError, CorruptError, OptionError, RankloadError
from ..retries import Outages
from ..store_errors import is_not_there, store_error
from .base import Entry, ObjectInfo, OnBytes, unheard
from .sums import StoredSum
from .transfer import receive

_FILE_URI = re.compile(
    r"(?:file|local)://(?P<host>[^/]*)(?P<path>/.*|)|file:(?P<single>/(?!/).*)", re.IGNORECASE | re.DOTALL
)


class LocalStore:
    """Names are paths, as given; ``#`` and ``?`` are plain characters."""

    is_local = True
    identity = "local"
    heard = staticmethod(unheard)

    def __init__(self) -> None:
        self.outages = Outages()
        """Never waits: no failure of a disk is tried again."""

    def origin(self, name: str) -> Hashable:
        return self.identity

    def describe(self, name: str) -> str:
        return name

    def join(self, name: str, child: str) -> str:
        return os.path.join(name, child)

    def stat(self, name: str) -> ObjectInfo | None:
        try:
            found = os.stat(name)
        except ValueError:
            return None  # no file has a name that the system's encoding cannot express
        except OSError as error:
            if is_not_there(error):
                return None
            raise _local_error(error, name) from error
        is_folder = stat.S_ISDIR(found.st_mode)
        return ObjectInfo(
            name=name,
            size_bytes=None if is_folder else found.st_size,
            version=f"{found.st_mtime_ns}-{found.st_ino}",
            is_folder=is_folder,
        )

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        try:
            size = os.stat(name).st_size
            told = size if expected is None or expected.size_bytes is None else expected.size_bytes
            receive(target_path, name, told, lambda part: _copy(name, part))
        except OSError as error:
            raise _local_error(error, name) from error
        on_bytes(size)

    def peek(self, name: str, n_bytes: int) -> bytes | None:
        try:
            with open(name, "rb") as file:
                return file.read(n_bytes)
        except OSError as error:
            raise _local_error(error, name) from error

    def read_small(self, name: str, limit: int) -> bytes:
        return within_limit(self.peek(name, limit + 1) or b"", limit, name)

    def local_path(self, name: str) -> str:
        return name

    def link_targets(self, link_name: str, text: str) -> list[str]:
        if os.path.isabs(text):
            return [text]
        return list(dict.fromkeys([os.path.join(os.path.dirname(link_name), text), text]))

    def stored_sums(self, info: ObjectInfo) -> tuple[StoredSum, ...]:
        return ()

    def entries(self, name: str) -> list[Entry] | None:
        try:
            with os.scandir(name or os.curdir) as found:
                return [entry for each in found if (entry := _entry(each)) is not None]
        except OSError as error:
            if is_not_there(error):
                return []
            raise _local_error(error, name) from error

    def nearby(self, name: str) -> str:
        from .nearby import local_nearby

        return local_nearby(name)

    def close(self) -> None:
        """Does nothing: no connection is kept."""


def file_uri_path(text: str) -> str | None:
    """The local path of a ``file:`` URI (RFC 8089); None where `text` is none.

    It is percent-decoded, as ``Path.as_uri`` encodes it, unless there is a file whose name has the percent signs.
    Raises `OptionError` for a URI of another host.
    """
    match = _FILE_URI.fullmatch(text)
    if match is None:
        return None
    host, path = match["host"] or "", match["path"] or match["single"] or ""
    if not path or host.lower() not in ("", "localhost"):
        raise OptionError(
            f"{text!r}: expected file:///absolute/path or a plain path, got the host {host!r}", path=text
        )
    return path if "%" not in path or os.path.lexists(path) else unquote(path)


def within_limit(data: bytes, limit: int, described: str) -> bytes:
    """`data`. Raises `CorruptError` where it is longer than `limit` bytes."""
    if len(data) > limit:
        raise CorruptError(f"{described}: expected a small text of at most {limit} bytes", path=described)
    return data


def _local_error(error: OSError, name: str) -> RankloadError:
    if isinstance(error, PermissionError):
        return AccessError(
            f"{name}: this user may not read it ({error.strerror}); check the permissions of the file and of the "
            "folders above it",
            path=name,
        )
    return store_error(error, name)


def _entry(found: os.DirEntry[str]) -> Entry | None:
    """None for what was removed meanwhile, and for a link to nothing."""
    try:
        known = found.stat()
        link = os.readlink(found.path) if found.is_symlink() else None
    except OSError:
        return None
    is_folder = stat.S_ISDIR(known.st_mode)
    return Entry(found.name, is_folder, None if is_folder else known.st_size, known.st_mtime, link)


def _copy(source: str, target: str) -> None:
    shutil.copyfile(source, target)
