"""Lists what lies in a node's cache folders, and removes what no process uses: for a person, between loads.

What a living process of any node uses is never removed. A folder that is no cache, or another user's, is left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..stores.transfer import bytes_on_disk
from .bounds import bound
from .folder import LOCK_NAME, locked, make_private_folder, remove_if_empty
from .homes import CacheHome
from .records import about, in_use, last_use, put_away, remove

_ENTRY = re.compile(r".+-[0-9a-f]{20}")
"""An entry's name, made by `NodeCache.entry`: the object's, and a digest."""


@dataclass(frozen=True, slots=True)
class CachedFile:
    """One object of a checkpoint, in one version, in one of the cache's folders."""

    path: str
    """The entry's folder."""
    name: str
    """The object's own name, shortened."""
    checkpoint: str
    """The checkpoint that it was last used for, as messages call it; "" where that is not known."""
    group: str
    """The same as a digest: files of one checkpoint, which are removed together, have the same."""
    size_bytes: int
    """What it takes: of a file that came in parts, what is there."""
    last_use_s: float
    """When a use of it last began or ended, in seconds of the epoch."""
    in_use: bool
    """Whether a living process uses it."""
    awaited: bool
    """Whether it was fetched for a load that is to come."""
    in_memory: bool
    """Whether it lies in memory, not on a disk."""


def cached_files(homes: Sequence[CacheHome]) -> tuple[CachedFile, ...]:
    """What lies in the folders `homes`, as `homes.homes_for` gives them; makes none that is not there.

    Raises `AccessError` where one of them is not private to this user, or cannot be locked.
    """
    return tuple(one for home in homes if _is_cache(home) for one in _listed(home))


def prune(homes: Sequence[CacheHome], size_bytes: int) -> tuple[CachedFile, ...]:
    """Removes what does not fit in `size_bytes` on each disk, the least recently used checkpoint first, and what nobody
    uses in memory; returns what was removed. What a prefetch has fetched for a load that is to come stays for a day, in
    memory for an hour.

    Raises as `cached_files`.
    """
    before = cached_files(homes)
    for home in homes:
        if _is_cache(home):
            if home.in_memory:
                home.sweep()
            else:
                bound(home.folder, size_bytes)
            remove_if_empty(home.folder, keep_folder=home.given)
    return tuple(one for one in before if not os.path.lexists(one.path))


def clear(homes: Sequence[CacheHome]) -> tuple[CachedFile, ...]:
    """Removes all that no living process uses; returns it. Raises as `cached_files`."""
    gone: list[CachedFile] = []
    for home in homes:
        if not _is_cache(home):
            continue
        moved: list[str] = []
        with locked(home.folder) as now:
            for path in _entries(home.folder):
                if not in_use(path, now):
                    one = _described(path, home, used=False)
                    away = put_away(path)
                    if away is not None:
                        moved.append(away)
                        gone.append(one)
        for away in moved:
            remove(away)
        remove_if_empty(home.folder, keep_folder=home.given)
    return tuple(gone)


def _is_cache(home: CacheHome) -> bool:
    """Whether the folder is there and a load has used it as a cache. Raises `AccessError` where it is not private."""
    if not os.path.lexists(os.path.join(home.folder, LOCK_NAME)):
        return False
    make_private_folder(home.folder)
    return True


def _listed(home: CacheHome) -> list[CachedFile]:
    with locked(home.folder) as now:
        return [_described(path, home, used=in_use(path, now)) for path in _entries(home.folder)]


def _entries(folder: str) -> list[str]:
    """The path of each entry of `folder`. A user's own folder that happens to lie there is none."""
    found = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if _ENTRY.fullmatch(name) and os.path.isdir(os.path.join(path, "users")) and not os.path.islink(path):
            found.append(path)
    return found


def _described(path: str, home: CacheHome, *, used: bool) -> CachedFile:
    use = about(path)
    return CachedFile(
        path,
        os.path.basename(path).rpartition("-")[0],
        use.checkpoint,
        use.group or path,
        bytes_on_disk(path),
        last_use(path),
        used,
        use.awaited,
        home.in_memory,
    )
