"""How much stays in a cache folder: whole checkpoints go, the least recently used first, never one that is in use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..stores.transfer import bytes_on_disk
from .folder import locked
from .records import about, in_use, last_use, put_away, remove


@dataclass(frozen=True, slots=True)
class Held:
    """One entry of a cache folder."""

    path: str
    group: str
    """The checkpoint that it is part of."""
    content: str
    """The object that it is a version of."""
    used_at: float
    nbytes: int
    """What it takes on the disk: a file that came in parts has holes."""
    busy: bool = False
    stays: bool = True
    """Whether it stays once nobody uses it."""


def victims(entries: Sequence[Held], surplus_bytes: int) -> list[Held]:
    """What is to go so that `surplus_bytes` less are held, or as many as can be.

    Older versions of what is there in a newer one go first; then whole checkpoints, by their last use. A checkpoint of
    which anything is busy stays.
    """
    gone: list[Held] = []
    for unit in _units(entries):
        if surplus_bytes <= 0:
            break
        gone += unit
        surplus_bytes -= sum(one.nbytes for one in unit)
    return gone


def _units(entries: Sequence[Held]) -> Iterable[list[Held]]:
    """What goes together, in the order of going."""
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


def bound(folder: str, size_bytes: int) -> None:
    """Evicts until what stays in `folder` fits in `size_bytes`."""
    with locked(folder) as now:
        entries = _held(folder, now)
        staying = sum(one.nbytes for one in entries if one.stays or not one.busy)
        gone = [put_away(one.path) for one in victims(entries, staying - size_bytes)]
    _remove(gone)


def make_room(folder: str, nbytes: int) -> None:
    """Evicts `nbytes` from `folder`, or what can be."""
    with locked(folder) as now:
        gone = [put_away(one.path) for one in victims(_held(folder, now), nbytes)]
    _remove(gone)


def evictable_bytes(folder: str) -> int:
    """What `make_room` could give at most."""
    with locked(folder) as now:
        entries = _held(folder, now)
    return sum(one.nbytes for unit in _units(entries) for one in unit)


def _held(folder: str, now: float) -> list[Held]:
    found = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isdir(os.path.join(path, "users")) and not name.startswith("."):
            told = about(path)
            busy = in_use(path, now)
            found.append(
                Held(
                    path,
                    told.group or name,
                    told.content,
                    last_use(path),
                    bytes_on_disk(path),
                    busy,
                    told.stays,
                )
            )
    return found


def _remove(gone: Iterable[str | None]) -> None:
    for path in gone:
        if path is not None:
            remove(path)
