"""Stores that do wrong what a real one may do wrong: wrappers around any other store, which compose.

    Slow(Cut(Flip(store, times=1), times=2), pause_s=0.1)

Each is a `Store` itself. `times` is how many transfers a fault spoils; after those the inner store's answers are right.
`spoiled` counts them, so that a test can see that its fault was met.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from rankload.loader.errors import AccessError, NotFoundError
from rankload.loader.retries import Outages
from rankload.loader.stores.base import Entry, Heard, ObjectInfo, OnBytes, Store
from rankload.loader.stores.sums import StoredSum
from rankload.loader.stores.transfer import check_size, receive

ALWAYS = 1 << 30


class Faulty:
    """Answers as the inner store does; a fault overrides what it spoils."""

    is_local = False

    def __init__(self, inner: Store, *, times: int = ALWAYS, names: tuple[str, ...] = ()) -> None:
        """Spoils only objects whose names end with one of `names`, where any are given."""
        self.inner = inner
        self.spoiled = 0
        self._times = times
        self._names = names
        self._lock = threading.Lock()

    @property
    def identity(self) -> str:
        return self.inner.identity

    @property
    def outages(self) -> Outages:
        return self.inner.outages

    @property
    def heard(self) -> Heard:
        return self.inner.heard

    def origin(self, name: str) -> Hashable:
        return self.inner.origin(name)

    def spoils(self, name: str) -> bool:
        """Whether this transfer is one of those that go wrong; counts it."""
        with self._lock:
            if self.spoiled >= self._times or (self._names and not name.endswith(self._names)):
                return False
            self.spoiled += 1
            return True

    def describe(self, name: str) -> str:
        return self.inner.describe(name)

    def join(self, name: str, child: str) -> str:
        return self.inner.join(name, child)

    def stat(self, name: str) -> ObjectInfo | None:
        return self.inner.stat(name)

    def peek(self, name: str, n_bytes: int) -> bytes | None:
        return self.inner.peek(name, n_bytes)

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        self.inner.download(name, target_path, on_bytes, expected)

    def read_small(self, name: str, limit: int) -> bytes:
        return self.inner.read_small(name, limit)

    def local_path(self, name: str) -> str:
        return self.inner.local_path(name)

    def link_targets(self, link_name: str, text: str) -> list[str]:
        return self.inner.link_targets(link_name, text)

    def stored_sums(self, info: ObjectInfo) -> tuple[StoredSum, ...]:
        return self.inner.stored_sums(info)

    def entries(self, name: str) -> list[Entry] | None:
        return self.inner.entries(name)

    def nearby(self, name: str) -> str:
        return self.inner.nearby(name)

    def close(self) -> None:
        self.inner.close()


class Slow(Faulty):
    """Every answer takes `pause_s` longer; a download goes on telling that nothing comes."""

    def __init__(self, inner: Store, *, pause_s: float = 0.02, **more: Any) -> None:
        super().__init__(inner, **more)
        self._pause_s = pause_s

    def stat(self, name: str) -> ObjectInfo | None:
        if self.spoils(name):
            time.sleep(self._pause_s)
        return self.inner.stat(name)

    def peek(self, name: str, n_bytes: int) -> bytes | None:
        if self.spoils(name):
            time.sleep(self._pause_s)
        return self.inner.peek(name, n_bytes)

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        if self.spoils(name):
            for _ in range(5):
                on_bytes(0)
                time.sleep(self._pause_s / 5)
        self.inner.download(name, target_path, on_bytes, expected)

    def read_small(self, name: str, limit: int) -> bytes:
        if self.spoils(name):
            time.sleep(self._pause_s)
        return self.inner.read_small(name, limit)


class Cut(Faulty):
    """Downloads end halfway; what is left of them is no file, as each store sees to."""

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        if not self.spoils(name):
            return self.inner.download(name, target_path, on_bytes, expected)
        described, whole = self.describe(name), f"{target_path}.whole"
        self.inner.download(name, whole, on_bytes, expected)
        size = os.path.getsize(whole)

        def write(part: str) -> None:
            Path(part).write_bytes(Path(whole).read_bytes()[: size // 2])
            check_size(part, described, size)

        try:
            return receive(target_path, described, size, write)
        finally:
            os.unlink(whole)


class Flip(Faulty):
    """One bit in the middle of what is downloaded is another."""

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        self.inner.download(name, target_path, on_bytes, expected)
        if self.spoils(name):
            with open(target_path, "r+b") as file:
                file.seek(os.path.getsize(target_path) // 2)
                byte = file.read(1)
                if byte:
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([byte[0] ^ 1]))


class Refuse(Faulty):
    """Says that this user may not."""

    def _refusal(self, name: str) -> AccessError:
        described = self.describe(name)
        return AccessError(f"{described}: refused (HTTP 403)", path=described)

    def peek(self, name: str, n_bytes: int) -> bytes | None:
        if self.spoils(name):
            raise self._refusal(name)
        return self.inner.peek(name, n_bytes)

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        if self.spoils(name):
            raise self._refusal(name)
        self.inner.download(name, target_path, on_bytes, expected)

    def read_small(self, name: str, limit: int) -> bytes:
        if self.spoils(name):
            raise self._refusal(name)
        return self.inner.read_small(name, limit)


class Forget(Faulty):
    """Has it no more, though it said that it had: as after a clean-up between two requests."""

    def _missing(self, name: str) -> NotFoundError:
        described = self.describe(name)
        return NotFoundError(f"{described}: not there (HTTP 404)", path=described)

    def peek(self, name: str, n_bytes: int) -> bytes | None:
        if self.spoils(name):
            raise self._missing(name)
        return self.inner.peek(name, n_bytes)

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        if self.spoils(name):
            raise self._missing(name)
        self.inner.download(name, target_path, on_bytes, expected)

    def read_small(self, name: str, limit: int) -> bytes:
        if self.spoils(name):
            raise self._missing(name)
        return self.inner.read_small(name, limit)
