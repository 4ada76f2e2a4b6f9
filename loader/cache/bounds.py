"""Evicts from a cache folder down to a size: whole checkpoints, the least recently used first, never one in use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..stores.transfer import bytes_on_disk
from .folder import locked
from .records import ORPHAN_S, about, in_use, last_use, put_away, remove


@dataclass(frozen=True, slots=True)
class Held:
    """One entry of a cache folder."""

    path: str
    group: str
    """The checkpoint that it is part of."""
    content: str
    """The object that it is a version of."""
    used_at: float
    """When it was last used, in seconds by the clock of the folder's file system."""
    nbytes: int
    """What it takes on the disk: a file that came in parts has holes."""
    busy: bool = False
    """Whether a living process uses it, or a prefetch left it for a load less than `records.ORPHAN_S` ago."""
    stays: bool = True
    """Whether it stays once no process uses it."""


def bound(folder: str, size_bytes: int) -> None:
    """Evicts from `folder` until what stays there fits in `size_bytes`; takes the folder's lock."""
    with locked(folder) as now:
        entries = _held(folder, now)
        staying = sum(one.nbytes for one in entries if one.stays or not one.busy)
        gone = [put_away(one.path) for one in victims(entries, staying - size_bytes)]
    _remove(gone)


def make_room(folder: str, nbytes: int) -> None:
    """Evicts `nbytes` from `folder`, or as many as can be; takes the folder's lock."""
    with locked(folder) as now:
        gone = [put_away(one.path) for one in victims(_held(folder, now), nbytes)]
    _remove(gone)


def evictable_bytes(folder: str) -> int:
    """How many bytes `make_room` could evict from `folder` now; takes the folder's lock."""
    with locked(folder) as now:
        entries = _held(folder, now)
    return sum(one.nbytes for unit in _units(entries) for one in unit)


def victims(entries: Sequence[Held], surplus_bytes: int) -> list[Held]:
    """The entries to evict so that `surplus_bytes` fewer are held, or as many fewer as can be.

    First go older versions of objects that are there in a newer one; then whole checkpoints, by their last use. A
    checkpoint with a busy entry stays.
    """
    gone: list[Held] = []
    for unit in _units(entries):
        if surplus_bytes <= 0:
            break
        gone += unit
        surplus_bytes -= sum(one.nbytes for one in unit)
    return gone


def _units(entries: Sequence[Held]) -> Iterable[list[Held]]:
    """The idle entries in the order of eviction, those that go together in one list."""
    newest: dict[tuple[str, str], float] = {}
    for one in entries:
        key = (one.group, one.content)
        newest[key] = max(newest.get(key, one.used_at), one.used_at)
    old = [one for one in entries if not one.busy and one.used_at < newest[one.group, one.content]]
    groups: dict[str, list[Held]] = {}
    for one in entries:
        if one not in old:
            groups.setdefault(one.group, []).append(one)
    idle = [group for group in groups.values() if not any(one.busy for one in group)]
    return [
        *([one] for one in sorted(old, key=lambda one: one.used_at)),
        *sorted(idle, key=lambda group: max(one.used_at for one in group)),
    ]


def _held(folder: str, now: float) -> list[Held]:
    found = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isdir(os.path.join(path, "users")) and not name.startswith("."):
            description = about(path)
            used_at = last_use(path)
            busy = in_use(path, now) or (description.awaited and now - used_at <= ORPHAN_S)
            found.append(
                Held(
                    path,
                    description.group or name,
                    description.content,
                    used_at,
                    bytes_on_disk(path),
                    busy,
                    description.stays,
                )
            )
    return found


def _remove(gone: Iterable[str | None]) -> None:
    for path in gone:
        if path is not None:
            remove(path)
