"""What the files of a node cache say: who lives, who makes what, what is whole.

Every function here is called with the cache folder's lock held (`cache_folder.locked`), reading ones apart.
``now`` is the time that the lock gave.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ...distributed.liveness import ProcessIdentity, how_ended, is_watchable, this_process

STALE_S = 180.0
"""Network file systems show a new modification time up to a minute late."""
ORPHAN_S = 86400.0
"""Entries that a crash left behind may serve the restart; after a day without a user they go."""
WORK = "work-"

PARTS = "parts"
"""Slot of what comes in parts; a process that finds it held makes another one, whose name begins so."""

_GONE = ".gone-"
_ABOUT = "about"


@dataclass(frozen=True, slots=True)
class About:
    """What an entry tells of itself."""

    group: str = ""
    """The checkpoint of its last use, as a digest."""
    content: str = ""
    """The object that it is a version of, as a digest."""
    stays: bool = False
    """Whether it stays once nobody uses it."""


def note_use(entry: str, told: About) -> None:
    """Notes that `entry` is used now; what one load wants to stay does."""
    stays = told.stays or about(entry).stays
    write_json(os.path.join(entry, _ABOUT), asdict(About(told.group, told.content, stays)))


def about(entry: str) -> About:
    record = read_json(os.path.join(entry, _ABOUT))
    return About(str(record.get("group", "")), str(record.get("content", "")), record.get("stays") is True)


def last_use(entry: str) -> float:
    """When a use of `entry` last began or ended."""
    for path in (os.path.join(entry, _ABOUT), entry):
        with contextlib.suppress(FileNotFoundError):
            return os.stat(path).st_mtime
    return 0.0


def end_use(entry: str) -> str | None:
    """Leaves `entry`, which nobody uses any more, as it is to stay, or takes it out of sight; where to, if it did."""
    if not about(entry).stays:
        return put_away(entry)
    for slot in os.listdir(entry):
        if slot.startswith(f"{PARTS}-"):
            remove(os.path.join(entry, slot))
    os.utime(os.path.join(entry, _ABOUT))
    return None


def sweep(root: str, now: float, *, spared: str | None = None, at_once: bool = False) -> Iterator[str]:
    """Clears up after the dead; yields what is to be removed once the lock is open.

    What nobody uses goes after `ORPHAN_S`, or `at_once` unless it is the checkpoint `spared`'s; not what is to stay.
    """
    for name in os.listdir(root):
        path = os.path.join(root, name)
        if name.startswith(_GONE):
            yield path
        elif os.path.isdir(os.path.join(path, "users")) and not in_use(path, now):
            told = about(path)
            if at_once:
                orphan = spared is None or told.group != spared
            else:
                orphan = not told.stays and now - os.stat(path).st_mtime > ORPHAN_S
            gone = put_away(path) if orphan else None
            if gone is not None:
                yield gone


def in_use(entry: str, now: float) -> bool:
    """Whether anybody lives who uses or fills `entry`; what the dead left half done is removed."""
    users = os.path.join(entry, "users")
    used = False
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(users):
            used |= _lives(os.path.join(users, name), now)
        for slot in os.listdir(entry):
            if slot not in ("users", _ABOUT) and not slot.endswith(".new"):
                used |= _clear_slot(os.path.join(entry, slot), now)
    return used


def _clear_slot(folder: str, now: float) -> bool:
    claim = os.path.join(folder, "claim")
    claimed = _lives(claim, now)
    work = os.path.basename(str(read_json(claim).get("work", ""))) if claimed else ""
    for name in os.listdir(folder):
        if name.startswith(WORK) and name != work:
            remove(os.path.join(folder, name))
    return claimed


def claim(folder: str, work: str, now: float) -> bool:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if _clear_slot(folder, now):
        return False
    os.mkdir(work, 0o700)
    record = {**this_process().as_dict(), "work": os.path.basename(work)}
    write_json(os.path.join(folder, "claim"), record)
    return True


def claimed_for(claim: str, work: str) -> bool:
    return read_json(claim).get("work") == os.path.basename(work)


def _lives(path: str, now: float) -> bool:
    """Whether the process that wrote the record at `path` lives; the record of a dead one is removed."""
    try:
        touched = os.stat(path).st_mtime
    except FileNotFoundError:
        return False
    record = read_json(path)
    try:
        process = ProcessIdentity(
            str(record["host"]), int(record["pid"]), int(record["started"]), str(record["machine"])
        )
    except (KeyError, TypeError, ValueError):
        process = ProcessIdentity("", 0, 0, "")
    ended = how_ended(process) is not None if is_watchable(process) else now - touched > STALE_S
    if ended:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return not ended


def whole(folder: str, path: str) -> dict[str, Any] | None:
    """What the maker said of the product at `path`, if it is whole."""
    done = read_json(os.path.join(folder, "done"))
    try:
        if not done or sizes(path) != done.get("sizes"):
            return None
    except OSError:
        return None
    details = done.get("details")
    return details if isinstance(details, dict) else {}


def sizes(path: str) -> dict[str, int]:
    """Length of each file at `path`, by its name relative to it."""
    if not os.path.isdir(path):
        return {"": os.stat(path).st_size}
    return {
        os.path.relpath(os.path.join(folder, name), path): os.stat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(path)
        for name in names
    }


def put_away(entry: str) -> str | None:
    """Takes `entry` out of everybody's sight in one step; where to, for `_remove_all`."""
    gone = os.path.join(os.path.dirname(entry), _GONE + uuid.uuid4().hex)
    try:
        os.rename(entry, gone)
    except FileNotFoundError:
        return None
    return gone


def remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def product_name(name: str) -> str:
    plain = os.path.basename(name.rstrip("/")).replace("\0", "_")
    shortened = plain.encode("utf-8", "surrogateescape")[-200:].decode("utf-8", "replace")
    return "object" if shortened in ("", ".", "..", "claim", "done") else shortened


def write_json(path: str, record: dict[str, Any]) -> None:
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.new"
    with open(temporary, "x", encoding="utf-8") as file:
        json.dump(record, file)
    os.replace(temporary, path)


def read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
