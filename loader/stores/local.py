"""The store of files on this node, which are used where they lie."""

from __future__ import annotations

import os
import shutil
import stat

from ..errors import CorruptError
from ..store_errors import store_error
from .base import ObjectInfo, OnBytes
from .sums import StoredSum
from .transfer import receive


class LocalStore:
    """Names are paths, as given; ``#`` and ``?`` are plain characters."""

    is_local = True
    identity = "local"

    def describe(self, name: str) -> str:
        return name

    def join(self, name: str, child: str) -> str:
        return os.path.join(name, child)

    def stat(self, name: str) -> ObjectInfo | None:
        try:
            found = os.stat(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise store_error(error, name) from error
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
            receive(target_path, name, size, lambda part: _copy(name, part))
        except OSError as error:
            raise store_error(error, name) from error
        on_bytes(size)

    def read_small(self, name: str, limit: int) -> bytes:
        try:
            with open(name, "rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise store_error(error, name) from error
        return within_limit(data, limit, name)

    def local_path(self, name: str) -> str:
        return name

    def link_targets(self, link_name: str, text: str) -> list[str]:
        if os.path.isabs(text):
            return [text]
        return list(dict.fromkeys([os.path.join(os.path.dirname(link_name), text), text]))

    def stored_sums(self, info: ObjectInfo) -> tuple[StoredSum, ...]:
        return ()

    def close(self) -> None:
        """Does nothing: no connection is kept."""


def within_limit(data: bytes, limit: int, described: str) -> bytes:
    """`data`. Raises `CorruptError` where it is longer than `limit` bytes."""
    if len(data) > limit:
        raise CorruptError(f"{described}: expected a small text of at most {limit} bytes", path=described)
    return data


def _copy(source: str, target: str) -> None:
    shutil.copyfile(source, target)
