"""A node's cache of fetched objects: each is made once, by whoever comes first, and used by all.

    <cache_dir>/.lock                     held for moments, for decisions
    <cache_dir>/<entry>/users/*           who uses the entry; touched while they live
    <cache_dir>/<entry>/<slot>/claim      who is making the slot's product, and in which ``work-*`` folder
    <cache_dir>/<entry>/<slot>/done       the product is whole, and so long
    <cache_dir>/<entry>/<slot>/<product>  a file, or a folder of files

That a product is there proves nothing; ``done`` and its sizes do. Several processes, on several nodes too,
may share one folder. An entry goes when its last user goes. Who died is told by its process where that can be
seen from here, else by a file that was not touched for `cache_records.STALE_S`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ..distributed.liveness import this_process
from .cache_folder import default_cache_folder, free_bytes_of, locked, make_private_folder, remove_if_empty
from .cache_records import (
    WORK,
    claim,
    claimed_for,
    in_use,
    product_name,
    put_away,
    remove,
    sizes,
    sweep,
    whole,
    write_json,
)
from .store import OnBytes
from .transfer import POLL_S, bytes_on_disk

HEARTBEAT_S = 5.0


@dataclass(frozen=True, slots=True)
class Filled:
    """A product that is whole."""

    path: str
    details: dict[str, Any] = field(default_factory=dict)
    """What its maker said of it."""
    made_here: bool = False
    """False where it was there, or somebody else made it meanwhile."""


class NodeCache:
    """Context manager around one load; gives back every entry when it ends. Threads may share it."""

    def __init__(self, cache_dir: str | None = None) -> None:
        """Touches nothing: the folder is made, or checked, when it is first needed."""
        self.folder = os.path.abspath(cache_dir or default_cache_folder())
        self.load_id = uuid.uuid4().hex
        """Tells this load from every other."""
        self._given = cache_dir is not None
        self._entries: dict[str, CacheEntry] = {}
        self._lock = threading.Lock()
        self._touched: set[str] = set()
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None
        self._ready = False

    def __enter__(self) -> NodeCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for entry in list(self._entries.values()):
            entry.close()
        self._ended.set()
        if self._heart is not None:
            self._heart.join()
        if self._ready:
            remove_if_empty(self.folder, keep_folder=self._given)

    def entry(self, label: str, *identity: object) -> CacheEntry:
        """The entry for what `identity` tells from everything else; in use until it is closed.

        `label` makes its folder's name readable. The same object comes back for the same identity. Raises
        `AccessError` where the cache folder is not private to this user.
        """
        digest = hashlib.sha256(json.dumps([str(each) for each in identity]).encode()).hexdigest()[:20]
        stem = (
            re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.basename(label.rstrip("/")))[:60].lstrip(".") or "object"
        )
        name = f"{stem}-{digest}"
        with self._lock:
            self._prepare()
            if name not in self._entries:
                self._entries[name] = CacheEntry(self, os.path.join(self.folder, name))
            return self._entries[name]

    def free_bytes(self) -> int:
        """What the folder's file system has left for this user."""
        with self._lock:
            self._prepare()
        return free_bytes_of(self.folder)

    def _prepare(self) -> None:
        if self._ready:
            return
        make_private_folder(self.folder)
        with locked(self.folder) as now:
            gone = list(sweep(self.folder, now))
        for path in gone:
            remove(path)
        self._ready = True

    def _forget(self, entry: CacheEntry) -> None:
        with self._lock:
            self._entries.pop(os.path.basename(entry.folder), None)

    def _touch(self, path: str) -> None:
        with contextlib.suppress(OSError):
            os.utime(path)
        self._touched.add(path)
        if self._heart is None:
            self._heart = threading.Thread(target=self._beat, name="rankload-cache", daemon=True)
            self._heart.start()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            for path in list(self._touched):
                with contextlib.suppress(OSError):
                    os.utime(path)


class CacheEntry:
    """One object and what is made of it; a context manager, in use until closed (twice is harmless)."""

    def __init__(self, cache: NodeCache, folder: str) -> None:
        self.folder = folder
        self._cache = cache
        self._closed = False
        self._user = os.path.join(folder, "users", uuid.uuid4().hex)
        with locked(cache.folder):
            os.makedirs(os.path.dirname(self._user), mode=0o700, exist_ok=True)
            write_json(self._user, this_process().as_dict())
        cache._touch(self._user)

    def __enter__(self) -> CacheEntry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the use; the last user's close removes the entry."""
        if self._closed:
            return
        self._closed = True
        self._cache._touched.discard(self._user)
        self._cache._forget(self)
        with locked(self._cache.folder) as now:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._user)
            gone = None if in_use(self.folder, now) else put_away(self.folder)
        if gone is not None:
            remove(gone)

    def fill(
        self, slot: str, product: str, produce: Callable[[str], dict[str, Any] | None], on_bytes: OnBytes
    ) -> Filled:
        """The path of `slot`'s product, made by `produce` unless it is there, or somebody is making it.

        `produce` is given the path of a file or folder to make, and returns what ``details`` shall hold
        (JSON). While somebody else makes it, `on_bytes` is told what arrives (and may raise). What `produce`
        raises is raised here; others that wait then try for themselves.
        """
        folder = os.path.join(self.folder, slot)
        path = os.path.join(folder, product_name(product))
        waited = 0
        while True:
            work = os.path.join(folder, WORK + uuid.uuid4().hex)
            with locked(self._cache.folder) as now:
                details = whole(folder, path)
                if details is not None:
                    return Filled(path, details)
                claimed = claim(folder, work, now)
            if not claimed:
                waited = _wait(folder, waited, on_bytes)
                continue
            on_bytes(-waited)
            waited = 0
            if self._produce(path, work, produce):
                return Filled(path, whole(folder, path) or {}, made_here=True)

    def _produce(self, path: str, work: str, produce: Callable[[str], dict[str, Any] | None]) -> bool:
        folder = os.path.dirname(path)
        claimed = os.path.join(folder, "claim")
        self._cache._touch(claimed)
        made = os.path.join(work, os.path.basename(path))
        try:
            details = produce(made) or {}
            done = {"sizes": sizes(made), "details": details}
            with locked(self._cache.folder):
                if not claimed_for(claimed, work):
                    # Taken for dead, and somebody else is at it now.
                    return False
                remove(path)
                os.replace(made, path)
                write_json(os.path.join(folder, "done"), done)
            return True
        finally:
            self._cache._touched.discard(claimed)
            with locked(self._cache.folder):
                if claimed_for(claimed, work):
                    os.unlink(claimed)
            remove(work)


def _wait(folder: str, seen: int, on_bytes: OnBytes) -> int:
    """Follows for a second, or until it ends, who is at work in `folder`; how many bytes have been seen."""
    for _ in range(round(1 / POLL_S)):
        arrived = max(seen, bytes_on_disk(folder))
        on_bytes(arrived - seen)
        seen = arrived
        if not os.path.exists(os.path.join(folder, "claim")):
            break
        time.sleep(POLL_S)
    return seen
