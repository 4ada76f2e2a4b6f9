"""Chooses where a node's cache lies: in the folder that was given, else in memory or on disk, as there is room."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from ...distributed.printable import package_logger
from ..errors import AccessError
from .bounds import evictable_bytes
from .folder import default_cache_folder, free_bytes_of, locked, make_private_folder
from .memory import available_bytes
from .records import remove, sweep

_logger = package_logger()
MEMORY_FOLDER = "/dev/shm"  # noqa: S108 -- what goes there goes into a private folder
"""Linux's file system in memory."""
SHARE = 2
"""A load puts files into memory as long as all of them fit in the free bytes divided by this."""


@dataclass(frozen=True, slots=True)
class Room:
    """The bytes that one folder is to take, and those that it has."""

    folder: str
    needed_bytes: int
    free_bytes: int
    """What can be evicted there counts as free."""
    in_memory: bool

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.free_bytes


@dataclass(slots=True)
class CacheHome:
    """One folder of a cache, as one load sees it."""

    folder: str
    given: bool = False
    """Whether it is the folder that the user gave."""
    in_memory: bool = False
    takes_new: bool = True
    """False where the load only looks for what one that was killed left behind."""
    ready: bool = False
    """Whether `prepare` was called."""
    placed_bytes: int = 0
    """How many bytes `takes` has promised a place."""
    notes: list[str] = field(default_factory=list)
    """What the receipt is to say of it."""

    def prepare(self, group: str) -> None:
        """Makes the folder, or checks it, and calls `sweep`, once.

        Raises `AccessError` where it is not private to this user.
        """
        if self.ready:
            return
        listed = make_private_folder(self.folder)
        if listed is not None:
            self.notes.append(listed)
            _logger.warning("%s", listed)
        self.sweep(group)
        self.ready = True

    def sweep(self, group: str | None = None) -> None:
        """Removes what no living process uses: on disk after a day, in memory at once, unless it is of `group`."""
        with locked(self.folder) as now:
            gone = list(sweep(self.folder, now, spared=group, at_once=self.in_memory))
        for path in gone:
            remove(path)

    def takes(self, nbytes: int) -> bool:
        """Whether a new file of `nbytes` goes here; where it does, its bytes count as placed."""
        if not self.takes_new or (self.placed_bytes + nbytes) * SHARE > self.free_bytes():
            return False
        self.placed_bytes += nbytes
        return True

    def free_bytes(self) -> int:
        """How many bytes the file system has left for this user; in memory, no more than `available_bytes`."""
        if not self.in_memory:
            return free_bytes_of(self.folder)
        return min(free_bytes_of(os.path.dirname(self.folder)), available_bytes())

    def room(self, needed_bytes: int) -> Room:
        """What there is here for `needed_bytes`; evicts nothing."""
        free = self.free_bytes()
        if needed_bytes > free and not self.in_memory:
            free += evictable_bytes(self.folder)
        return Room(self.folder, needed_bytes, free, self.in_memory)


def homes_for(cache_dir: str | None, home: str, *, stays: bool) -> list[CacheHome]:
    """The folders that a load's files may go to, in the order of trying; the last one takes all that others do not.

    A folder that was given (`cache_dir`) is the only one. Otherwise `home` is ``disk``, ``memory``, or ``auto``: memory
    before the disk, unless what is fetched `stays`. Raises `AccessError` where it is ``memory`` and there is no such
    folder that can be written.
    """
    if cache_dir is not None:
        return [CacheHome(os.path.abspath(cache_dir), given=True)]
    disk = CacheHome(os.path.abspath(default_cache_folder()))
    has_memory = os.path.isdir(MEMORY_FOLDER) and os.access(MEMORY_FOLDER, os.W_OK)
    memory = CacheHome(
        os.path.join(MEMORY_FOLDER, f"rankload-{os.getuid()}"), in_memory=True, takes_new=not stays
    )
    if home == "memory":
        if not has_memory:
            raise AccessError(
                f"{MEMORY_FOLDER}: cache_home is 'memory', but there is no folder there that can be written; set "
                "cache_home to 'disk'",
                path=MEMORY_FOLDER,
            )
        return [memory]
    return [memory, disk] if home == "auto" and has_memory else [disk]
