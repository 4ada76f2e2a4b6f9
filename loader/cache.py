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
import uuid
from collections.abc import Mapping
from types import TracebackType

from .cache_bounds import bound, make_room
from .cache_entry import CacheEntry, Filled
from .cache_folder import remove_if_empty
from .cache_homes import CacheHome, Room, homes_for
from .cache_records import About
from .errors import AccessError

HEARTBEAT_S = 5.0

__all__ = ["CacheEntry", "Filled", "NodeCache"]

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
