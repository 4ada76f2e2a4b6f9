"""A node's cache of fetched objects: each is made once, by whoever comes first, and used by all.

    <home>/.lock                     held for moments, for decisions
    <home>/<entry>/about             whose checkpoint it is part of, and whether it stays; touched by each use
    <home>/<entry>/users/*           who uses the entry; touched while they live
    <home>/<entry>/<slot>/claim      who is making the slot's product, and in which ``work-*`` folder
    <home>/<entry>/<slot>/done       the product is whole, and so long
    <home>/<entry>/<slot>/<product>  a file, or a folder of files

That a product is there proves nothing; ``done`` and its sizes do. Several processes, on several nodes too,
may share one folder. An entry goes when its last user goes, or stays until it is evicted (`cache_bounds`). Who died is
told by its process where that can be seen from here, else by a file that was not touched for `cache_records.STALE_S`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ...distributed.liveness import this_process
from ..errors import AccessError
from ..stores.base import OnBytes
from ..stores.transfer import POLL_S, bytes_on_disk
from .bounds import bound, make_room
from .folder import locked, remove_if_empty
from .homes import CacheHome, Room, homes_for
from .records import (
    WORK,
    About,
    claim,
    claimed_for,
    end_use,
    in_use,
    note_use,
    product_name,
    remove,
    sizes,
    whole,
    write_json,
)

HEARTBEAT_S = 5.0


_logger = logging.getLogger("rankload")


class NodeCache:
    """Context manager around one load; gives back every entry when it ends. Threads may share it."""

    def __init__(self, cache_dir: str | None = None, *, size_bytes: int = 0, home: str = "disk") -> None:
        """Touches nothing: a folder is made, or checked, when it is first needed.

        `size_bytes` of what is on disk may stay there once this load has ended; `home` is ``auto``, ``memory`` or
        ``disk``. Raises `AccessError` where there is no such home.
        """
        self._size_bytes = size_bytes
        self._homes = homes_for(cache_dir, home, stays=size_bytes > 0)
        self.load_id = uuid.uuid4().hex
        """Tells this load from every other."""
        self._group = ""
        self._entries: dict[str, CacheEntry] = {}
        self._lock = threading.Lock()
        self._touched: set[str] = set()
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

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
        for home in self._homes:
            if not home.ready:
                continue
            if home.in_memory:
                home.sweep()
            elif self._size_bytes:
                bound(home.folder, self._size_bytes)
            remove_if_empty(home.folder, keep_folder=home.given)

    @property
    def folder(self) -> str:
        """Where files go that have no better place: the folder that was given, or the one on disk."""
        return self._homes[-1].folder

    def of_checkpoint(self, *identity: object) -> None:
        """What is fetched from here on is part of the checkpoint that `identity` tells from all others."""
        self._group = _digest(identity)

    def entry(
        self, label: str, *identity: object, nbytes: int | None = None, lasting: bool = True
    ) -> CacheEntry:
        """The entry for what `identity` tells from everything else; in use until it is closed.

        `label` tells the object from others of its store, whatever its version, and makes the folder's name readable.
        The same entry comes back for the same identity. What takes `nbytes` at most may go to memory; what no other
        load can ask for is not `lasting`. Raises `AccessError` where the cache folder is not private to this user.
        """
        stem = (
            re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.basename(label.rstrip("/")))[:60].lstrip(".") or "object"
        )
        name = f"{stem}-{_digest(identity)}"
        with self._lock:
            if name not in self._entries:
                home = self._home(name, nbytes)
                stays = lasting and self._size_bytes > 0 and not home.in_memory
                about = About(self._group or name, _digest([label]), stays)
                self._entries[name] = CacheEntry(self, home.folder, name, about)
            return self._entries[name]

    def free_bytes(self, path: str = "") -> int:
        """What this user has left where `path` is, or in `folder`."""
        with self._lock:
            home = self._home_at(path)
            home.prepare(self._group)
        return home.free_bytes()

    def room(self, needed: Mapping[str, int]) -> list[Room]:
        """Whether the bytes that are `needed`, by folder, can be had there; changes nothing."""
        return [self._home_at(os.path.join(folder, "")).room(nbytes) for folder, nbytes in needed.items()]

    def make_room(self, needed: Mapping[str, int]) -> None:
        """Evicts what nobody uses where that is the way to the bytes that are `needed`, by folder."""
        for folder, nbytes in needed.items():
            home = self._home_at(os.path.join(folder, ""))
            if not home.in_memory and nbytes > home.free_bytes():
                make_room(home.folder, nbytes - home.free_bytes())

    def touch(self, path: str) -> None:
        """Keeps `path` young until `untouch`."""
        with contextlib.suppress(OSError):
            os.utime(path)
        self._touched.add(path)
        if self._heart is None:
            self._heart = threading.Thread(target=self._beat, name="rankload-cache", daemon=True)
            self._heart.start()

    def untouch(self, path: str) -> None:
        self._touched.discard(path)

    def forget(self, entry: CacheEntry) -> None:
        with self._lock:
            self._entries.pop(os.path.basename(entry.folder), None)

    def _home(self, name: str, nbytes: int | None) -> CacheHome:
        """Where the entry `name` is already, else where there is room for it. Makes the folder ready."""
        for home in list(self._homes[:-1]):
            try:
                if home.ready or os.path.lexists(home.folder):
                    home.prepare(self._group)
                    if os.path.isdir(os.path.join(home.folder, name)):
                        return home
                last = self._homes[-1]
                known = os.path.isdir(os.path.join(last.folder, name))
                if nbytes is not None and not known and home.takes(nbytes):
                    home.prepare(self._group)
                    return home
            except AccessError as error:
                # Somebody else's, or without locks: there is another home.
                _logger.info("%s", error.message)
                self._homes.remove(home)
        self._homes[-1].prepare(self._group)
        return self._homes[-1]

    def _home_at(self, path: str) -> CacheHome:
        for home in self._homes:
            if path.startswith(os.path.join(home.folder, "")):
                return home
        return self._homes[-1]

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            for path in list(self._touched):
                with contextlib.suppress(OSError):
                    os.utime(path)


def _digest(identity: object) -> str:
    parts = [str(each) for each in identity] if isinstance(identity, list | tuple) else [str(identity)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


@dataclass(frozen=True, slots=True)
class Filled:
    """A product that is whole."""

    path: str
    details: dict[str, Any] = field(default_factory=dict)
    """What its maker said of it."""
    made_here: bool = False
    """False where it was there, or somebody else made it meanwhile."""


class CacheEntry:
    """One object and what is made of it; a context manager, in use until closed (twice is harmless)."""

    def __init__(self, cache: NodeCache, home: str, name: str, about: About) -> None:
        """In the folder `home`, which is ready."""
        self.home = home
        self.folder = os.path.join(home, name)
        self._cache = cache
        self._closed = False
        self._user = os.path.join(self.folder, "users", uuid.uuid4().hex)
        with locked(home):
            os.makedirs(os.path.dirname(self._user), mode=0o700, exist_ok=True)
            write_json(self._user, this_process().as_dict())
            note_use(self.folder, about)
        cache.touch(self._user)

    def __enter__(self) -> CacheEntry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the use; the last user's close removes the entry, unless it is to stay."""
        if self._closed:
            return
        self._closed = True
        self._cache.untouch(self._user)
        self._cache.forget(self)
        with locked(self.home) as now:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._user)
            gone = None if in_use(self.folder, now) else end_use(self.folder)
        if gone is not None:
            remove(gone)

    def has(self, slot: str, product: str) -> bool:
        """Whether `slot`'s product is whole by now."""
        folder = os.path.join(self.folder, slot)
        return whole(folder, os.path.join(folder, product_name(product))) is not None

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
            with locked(self.home) as now:
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
        self._cache.touch(claimed)
        made = os.path.join(work, os.path.basename(path))
        try:
            details = produce(made) or {}
            done = {"sizes": sizes(made), "details": details}
            with locked(self.home):
                if not claimed_for(claimed, work):
                    # Taken for dead, and somebody else is at it now.
                    return False
                remove(path)
                os.replace(made, path)
                write_json(os.path.join(folder, "done"), done)
            return True
        finally:
            self._cache.untouch(claimed)
            with locked(self.home):
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
