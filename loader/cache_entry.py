"""One object in a node's cache, and what is made of it: by one process, once, for all that use it."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..distributed.liveness import this_process
from .cache_folder import locked
from .cache_records import (
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
from .store import OnBytes
from .transfer import POLL_S, bytes_on_disk

if TYPE_CHECKING:
    from .cache import NodeCache


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
