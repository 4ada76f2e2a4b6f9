"""Keeps a node's fetched objects: each is made once, by the first process that asks, and used by all.

    <home>/.lock                     held for moments, for decisions
    <home>/<entry>/about             the checkpoint it is part of, whether it stays or is awaited; touched by each use
    <home>/<entry>/users/*           the processes that use the entry: those that fetch it for a node, and those that
                                     read it there; touched while they live
    <home>/<entry>/<slot>/claim      the process that makes the slot's product, and its ``work-*`` folder
    <home>/<entry>/<slot>/done       the product is whole; the sizes of its files
    <home>/<entry>/<slot>/<product>  a file, or a folder of files

A product counts as whole only where ``done`` and its sizes say so. Several processes, on several nodes too, may share
one folder. An entry is removed with its last user, or stays until it is evicted (`bounds`); one that a prefetch made
stays until the first load that used it has ended, or for `records.ORPHAN_S`. A user counts as dead where its process
has ended, as far as that can be seen from this node, or else where its file was not touched for `records.STALE_S`.
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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ...distributed.printable import package_logger
from ..errors import AccessError
from ..stores.base import OnBytes
from ..stores.transfer import bytes_on_disk
from ..workers import POLL_S
from .bounds import bound, make_room
from .folder import folder_of, locked, make_all_private, remove_if_empty
from .homes import CacheHome, Room, homes_for
from .records import (
    PARTS,
    WORK,
    About,
    Purpose,
    about,
    begin_use,
    claim,
    claimed_for,
    is_used_for,
    join_use,
    leave_use,
    product_name,
    put_in_place,
    remove,
    sizes,
    still_right,
    sums,
    take_over,
    whole,
    write_json,
)

TOUCH_S = 5.0
"""How often the files of this process are touched."""
GIVE_WAY_S = 30.0
"""How long a load waits for a prefetch to leave an object to it; it fetches that anew then."""

_logger = package_logger()


@dataclass(frozen=True, slots=True)
class Filled:
    """A product that is whole."""

    path: str
    details: dict[str, Any] = field(default_factory=dict)
    """What the `produce` that made it returned."""
    made_here: bool = False
    """False where it was there already, or another process made it meanwhile."""
    damaged: bool = False
    """Whether it was there already, with other bytes than were put there, and was made anew."""


class NodeCache:
    """One process's use of the node's cache: a context manager around one load, whose end closes all entries.

    Threads may share it.
    """

    def __init__(
        self,
        cache_dir: str | None = None,
        *,
        size_bytes: int = 0,
        home: str = "disk",
        purpose: Purpose = "load",
    ) -> None:
        """Makes no folder yet: that happens when one is first needed.

        `size_bytes` of what is on disk may stay there once this load has ended; `cache_dir` and `home` are as for
        `homes.homes_for`, which may raise `AccessError`. `purpose` says what happens to what a prefetch left.
        """
        self.purpose = purpose
        self._size_bytes = size_bytes
        self._homes = homes_for(cache_dir, home, stays=size_bytes > 0)
        self.load_id = uuid.uuid4().hex
        """Differs between any two loads."""
        self._group = self._checkpoint = ""
        self._entries: dict[str, CacheEntry] = {}
        self._joined: dict[str, list[tuple[str, str]]] = {}
        """By home: entries that another process of this load made, each with this process's record there."""
        self._used = False
        self._lock = threading.Lock()
        self._touched: set[str] = set()
        self._ended = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def __enter__(self) -> NodeCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for entry in list(self._entries.values()):
            entry.close()
        joined = list(self._joined)
        for folder in joined:
            self._leave(folder)
        self._ended.set()
        if self._heartbeat is not None:
            self._heartbeat.join()
        others = [folder for folder in joined if folder not in [home.folder for home in self._homes]]
        for home in [*self._homes, *(CacheHome(folder, given=True) for folder in others)]:
            if not home.ready and home.folder not in joined:
                continue
            if self._used and self._group and self.purpose == "load":
                with locked(home.folder) as now:
                    gone = list(take_over(home.folder, self._group, now))
                for path in gone:
                    remove(path)
            if home.in_memory:
                home.sweep()
            elif self._size_bytes:
                bound(home.folder, self._size_bytes)
            remove_if_empty(home.folder, keep_folder=home.given)

    @property
    def folder(self) -> str:
        """The folder for files that do not fit elsewhere: the one that was given, or the one on disk."""
        return self._homes[-1].folder

    @property
    def notes(self) -> tuple[str, ...]:
        """What the receipt is to say of the folders that were used."""
        return tuple(note for home in self._homes for note in home.notes)

    def of_checkpoint(self, *identity: object) -> None:
        """Says that entries from now on are part of the checkpoint `identity`: a checkpoint is evicted as a whole.

        The last of `identity` is what messages call it.
        """
        self._group = _digest(identity)
        self._checkpoint = str(identity[-1]) if identity else ""

    def entry(
        self, label: str, *identity: object, nbytes: int | None = None, lasting: bool = True
    ) -> CacheEntry:
        """The entry of the object version `identity`, the same one for the same identity; in use until it is closed.

        `label` names the object whatever its version, so that older versions are evicted first, and makes the folder's
        name readable. `nbytes` is how much the entry takes at most, where that is known: only then may it go to memory.
        It is not `lasting` where no other load could ask for it. Raises `AccessError` where the cache folder is not
        private to this user.
        """
        name = f"{_stem(label)}-{_digest(identity)}"
        with self._lock:
            if name not in self._entries:
                home = self._home(name, nbytes)
                stays = lasting and self._size_bytes > 0 and not home.in_memory
                group = self._group or name
                use = About(group, _digest([label]), stays, awaited=lasting, checkpoint=self._checkpoint)
                self._entries[name] = CacheEntry(self, home.folder, name, use)
                self._used = True
            return self._entries[name]

    def may_hold(self, label: str) -> bool:
        """Whether there is an entry of some object, at some version, that `label` names as in `entry`."""
        for home in self._homes:
            with contextlib.suppress(OSError):
                if any(name.startswith(f"{_stem(label)}-") for name in os.listdir(home.folder)):
                    return True
        return False

    def join(self, paths: Iterable[str]) -> None:
        """Becomes a user of the entries that `paths` lie in, until this context ends.

        For a process that reads what another one of this load has fetched: the entries stay then, however that one
        ends. Entries that are gone, and paths that lie in none, are passed over.
        """
        wanted: dict[str, set[str]] = {}
        known = {entry for joined in self._joined.values() for entry, _ in joined}
        known |= {entry.folder for entry in list(self._entries.values())}
        for path in paths:
            folder = folder_of(path)
            if folder is not None:
                name = os.path.relpath(path, folder).split(os.sep)[0]
                wanted.setdefault(folder, set()).add(os.path.join(folder, name))
        for folder, entries in wanted.items():
            if entries <= known:
                continue
            with locked(folder):
                for entry in sorted(entries - known):
                    user = os.path.join(entry, "users", uuid.uuid4().hex)
                    if join_use(entry, user, self.purpose):
                        self._joined.setdefault(folder, []).append((entry, user))
                        self.touch(user)

    def _leave(self, folder: str) -> None:
        """Ends the uses that `join` began in the home `folder`; the last user of an entry removes it."""
        joined = self._joined.pop(folder)
        for _, user in joined:
            self.untouch(user)
        with locked(folder) as now:
            gone = [leave_use(entry, user, now) for entry, user in joined]
        for path in filter(None, gone):
            remove(path)

    def free_bytes(self, path: str = "") -> int:
        """How many bytes this user has left in the home that `path` lies in, or in `folder`."""
        with self._lock:
            home = self._home_at(path)
            home.prepare(self._group)
        return home.free_bytes()

    def room(self, needed: Mapping[str, int]) -> list[Room]:
        """What there is for the bytes that are `needed`, by folder, what can be evicted included; changes nothing."""
        return [self._home_at(os.path.join(folder, "")).room(nbytes) for folder, nbytes in needed.items()]

    def make_room(self, needed: Mapping[str, int]) -> None:
        """Evicts what no process uses where the bytes that are `needed`, by folder, are not free; not in memory."""
        for folder, nbytes in needed.items():
            home = self._home_at(os.path.join(folder, ""))
            if not home.in_memory and nbytes > home.free_bytes():
                make_room(home.folder, nbytes - home.free_bytes())

    def touch(self, path: str) -> None:
        """Touches `path` now and every `TOUCH_S`, until `untouch`: its process counts as alive."""
        with contextlib.suppress(OSError):
            os.utime(path)
        self._touched.add(path)
        if self._heartbeat is None:
            self._heartbeat = threading.Thread(target=self._touch_all, name="rankload-cache", daemon=True)
            self._heartbeat.start()

    def untouch(self, path: str) -> None:
        """Ends what `touch` began."""
        self._touched.discard(path)

    @property
    def given_over(self) -> bool:
        """Whether a load has come to use what this prefetch fetches: it takes that over, and waits for the end of the
        prefetch."""
        with self._lock:
            entries = list(self._entries.values())
        return any(entry.lasting and not about(entry.folder).awaited for entry in entries)

    def is_left(self, path: str) -> bool:
        """Whether another load will find the file at `path`: one that it could ask for, and that no other process had
        in use when it was opened here."""
        name, slot = [*os.path.relpath(path, self._home_at(path).folder).split(os.sep), ""][:2]
        with self._lock:
            entry = self._entries.get(name)
        return entry is not None and entry.lasting and not slot.startswith(f"{PARTS}-")

    def forget(self, entry: CacheEntry) -> None:
        """Drops `entry`, which is being closed: the method `entry` makes another one then."""
        with self._lock:
            self._entries.pop(os.path.basename(entry.folder), None)

    def _home(self, name: str, nbytes: int | None) -> CacheHome:
        """The home that has the entry `name` already, else the first with room for it. Makes its folder ready."""
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
                # Another user's folder, or without locks: there is another home.
                _logger.info("passed over: %s", error.message)
                self._homes.remove(home)
        self._homes[-1].prepare(self._group)
        return self._homes[-1]

    def _home_at(self, path: str) -> CacheHome:
        for home in self._homes:
            if path.startswith(os.path.join(home.folder, "")):
                return home
        return self._homes[-1]

    def _touch_all(self) -> None:
        while not self._ended.wait(TOUCH_S):
            for path in list(self._touched):
                with contextlib.suppress(OSError):
                    os.utime(path)


class CacheEntry:
    """One object and what is made of it; a context manager, in use until closed (twice is harmless)."""

    def __init__(self, cache: NodeCache, home: str, name: str, use: About) -> None:
        """Begins the use: `home` is a folder that was made ready, `name` the entry's own in it."""
        self.home = home
        self.lasting = use.awaited
        """Whether another load could ask for it."""
        self.folder = os.path.join(home, name)
        self._keeps = use.stays or (use.awaited and cache.purpose == "prefetch")
        """Whether another load will find what is made here."""
        self._cache = cache
        self._closed = False
        self._user = os.path.join(self.folder, "users", uuid.uuid4().hex)
        with locked(home) as now:
            begin_use(self.folder, self._user, use, cache.purpose, now)
        self._until = time.monotonic() + GIVE_WAY_S
        cache.touch(self._user)

    def __enter__(self) -> CacheEntry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the use; the last one removes the entry, unless it is to stay."""
        if self._closed:
            return
        self._closed = True
        self._cache.untouch(self._user)
        self._cache.forget(self)
        with locked(self.home) as now:
            gone = leave_use(self.folder, self._user, now)
        if gone is not None:
            remove(gone)

    def await_prefetch(self, on_bytes: OnBytes) -> bool:
        """Waits a moment for the prefetch that holds one of the entry's files to leave it to this load.

        False where there is none, or it has not done so in `GIVE_WAY_S`. `on_bytes` is called with 0, and may raise.
        """
        if self._cache.purpose != "load" or time.monotonic() > self._until:
            return False
        with locked(self.home) as now:
            if not is_used_for("prefetch", self.folder, now):
                return False
        on_bytes(0)
        time.sleep(POLL_S)
        return True

    def has(self, slot: str, product: str) -> bool:
        """Whether the product of `slot` is whole by now."""
        folder = os.path.join(self.folder, slot)
        return whole(folder, os.path.join(folder, product_name(product))) is not None

    def fill(
        self,
        slot: str,
        product: str,
        produce: Callable[[str], dict[str, Any] | None],
        on_bytes: OnBytes,
        *,
        on_compared: OnBytes | None = None,
    ) -> Filled:
        """The product of `slot`, made by `produce` unless it is there, or another process is making it.

        `produce` gets the path of a file or folder to make, and returns what ``details`` shall hold (JSON). While
        another process makes it, `on_bytes` is called with the bytes that arrive, and may raise. What `produce` raises
        is raised here, and a process that waits then makes the product itself.

        With `on_compared`, a product that an earlier load left is compared with the CRC-32s that it had then, and made
        anew where one differs; `on_compared` is called with 0 meanwhile.
        """
        folder = os.path.join(self.folder, slot)
        path = os.path.join(folder, product_name(product))
        waited, waits = 0, False
        damaged = on_compared is not None and self._drop_if_damaged(folder, path, on_compared)
        while True:
            work = os.path.join(folder, WORK + uuid.uuid4().hex)
            with locked(self.home) as now:
                details = whole(folder, path)
                if details is not None:
                    _logger.info("in the cache already: %s", path)
                    return Filled(path, details, damaged=damaged)
                claimed = claim(folder, work, now)
            if not claimed:
                if not waits:
                    _logger.info("waiting for another process, which makes %s", path)
                waits = True
                waited = _wait(folder, waited, on_bytes)
                continue
            on_bytes(-waited)
            waited = 0
            if self._produce(path, work, produce, on_compared or _unheard):
                return Filled(path, whole(folder, path) or {}, made_here=True, damaged=damaged)

    def _drop_if_damaged(self, folder: str, path: str, on_compared: OnBytes) -> bool:
        """Whether the product at `path` was whole by its sizes and not by its sums: it does not count as whole then."""
        if whole(folder, path) is None or still_right(folder, path, on_compared):
            return False
        with locked(self.home), contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, "done"))
        return True

    def make_again(
        self, slot: str, product: str, produce: Callable[[str], dict[str, Any] | None], on_bytes: OnBytes
    ) -> None:
        """Makes the product of `slot` anew, into its place: each file is put there in one step, so that processes that
        have it open, or open it meanwhile, read the old one or the new one. Arguments and errors as of `fill`."""
        folder = os.path.join(self.folder, slot)
        while True:
            work = os.path.join(folder, WORK + uuid.uuid4().hex)
            with locked(self.home) as now:
                claimed = claim(folder, work, now)
            if claimed and self._produce(
                os.path.join(folder, product_name(product)), work, produce, on_bytes
            ):
                return
            if not claimed:
                on_bytes(0)
                time.sleep(POLL_S)

    def _produce(
        self, path: str, work: str, produce: Callable[[str], dict[str, Any] | None], on_summed: OnBytes
    ) -> bool:
        folder = os.path.dirname(path)
        claimed = os.path.join(folder, "claim")
        self._cache.touch(claimed)
        made = os.path.join(work, os.path.basename(path))
        try:
            details = produce(made) or {}
            # Stores' clients make files as the umask says; the work folder is private meanwhile.
            make_all_private(made)
            done = {"sizes": sizes(made), "details": details}
            if self._keeps:
                done["sums"] = sums(made, on_summed)
            with locked(self.home):
                if not claimed_for(claimed, work):
                    # This process was taken for dead, and another one makes the product now.
                    return False
                put_in_place(made, path)
                write_json(os.path.join(folder, "done"), done)
            return True
        finally:
            self._cache.untouch(claimed)
            with locked(self.home):
                if claimed_for(claimed, work):
                    os.unlink(claimed)
            remove(work)


def _unheard(_: int) -> None:
    """For who need not hear of progress."""


def _wait(folder: str, seen: int, on_bytes: OnBytes) -> int:
    """Reports for a second, or until its claim ends, the bytes that another process makes in `folder`; returns all
    that were seen."""
    for _ in range(round(1 / POLL_S)):
        arrived = max(seen, bytes_on_disk(folder))
        on_bytes(arrived - seen)
        seen = arrived
        if not os.path.exists(os.path.join(folder, "claim")):
            break
        time.sleep(POLL_S)
    return seen


def _stem(label: str) -> str:
    """What the folder's name of an entry begins with."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.basename(label.rstrip("/")))[:60].lstrip(".") or "object"


def _digest(identity: object) -> str:
    parts = [str(each) for each in identity] if isinstance(identity, list | tuple) else [str(identity)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
