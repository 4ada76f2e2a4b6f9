"""Reads and writes the small files of a cache entry: which processes use it, which one fills it, and what is whole.

All functions but the reading ones and `remove` must be called with the cache folder's lock held (`folder.locked`);
``now`` is the time that the lock yields. The files are listed in `node`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ...distributed.liveness import ProcessIdentity, how_ended, is_watchable, this_process
from ..checksums import crc32
from .folder import make_private, open_private

STALE_S = 180.0
"""A process that cannot be watched from here counts as dead where its file was not touched for so long. Network file
systems show a new modification time up to a minute late."""
ORPHAN_S = 86400.0
"""Entries that a crash or a prefetch left behind may serve a load; after a day without a user they are removed."""
AWAITED_IN_MEMORY_S = 3600.0
"""The same of what a prefetch left in memory, which other programs lack meanwhile."""
WORK = "work-"
"""Begins the name of a folder in which a product is being made."""
PARTS = "parts"
"""The slot of an object that comes in parts; a process that finds it held makes another one, whose name begins so."""
_READ_BYTES = 1 << 20
_GONE = ".gone-"
"""Begins the name of an entry that is being removed."""
_ABOUT = "about"
_PURPOSE = "purpose"
"""A key in the record of a user."""

Purpose = Literal["load", "look", "prefetch"]
"""What entries are used for. A prefetch leaves them behind for the next load, and a load takes them over: they go with
it as if it had fetched them. Whoever only looks at a checkpoint leaves that as it is."""


@dataclass(frozen=True, slots=True)
class About:
    """What an entry's ``about`` file says."""

    group: str = ""
    """The checkpoint of its last use, as a digest."""
    content: str = ""
    """The object that it is a version of, as a digest."""
    stays: bool = False
    """Whether it stays once no process uses it."""
    awaited: bool = False
    """Whether a prefetch made it, and no load has used it yet: until one does, it stays too, for a day at most."""
    checkpoint: str = ""
    """What messages call the checkpoint; without secrets."""


def begin_use(entry: str, user: str, use: About, purpose: Purpose, now: float) -> None:
    """Registers this process as a user of `entry`, by a record at `user`.

    The entry stays where this load or an earlier one wants it to. A prefetch makes it awaited, unless a load uses it at
    the moment or `use` says that no load could; a load takes it over.
    """
    before = about(entry)
    awaited = before.awaited and purpose != "load"
    if purpose == "prefetch" and use.awaited:
        awaited = before.awaited or not is_used_for("load", entry, now)
    make_private(entry)
    make_private(os.path.dirname(user))
    write_json(user, {**this_process().as_dict(), _PURPOSE: purpose})
    _write_about(entry, replace(use, stays=use.stays or before.stays, awaited=awaited))


def join_use(entry: str, user: str, purpose: Purpose) -> bool:
    """Registers this process as one more user of `entry`, whose first user said what becomes of it; False where it is
    gone, or is no entry."""
    if not (os.path.isdir(os.path.dirname(user)) and os.path.isfile(os.path.join(entry, _ABOUT))):
        return False
    write_json(user, {**this_process().as_dict(), _PURPOSE: purpose})
    return True


def leave_use(entry: str, user: str, now: float) -> str | None:
    """Ends the use that `user` records; the path to `remove` where that was the last one, and the entry is to go."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(user)
    if in_use(entry, now) or not os.path.isdir(entry):
        return None
    return end_use(entry)


def about(entry: str) -> About:
    """What the ``about`` file of `entry` says; nothing where there is none."""
    record = read_json(os.path.join(entry, _ABOUT))
    return About(
        str(record.get("group", "")),
        str(record.get("content", "")),
        record.get("stays") is True,
        record.get("awaited") is True,
        str(record.get("checkpoint", "")),
    )


def _write_about(entry: str, use: About) -> None:
    write_json(os.path.join(entry, _ABOUT), asdict(use))


def last_use(entry: str) -> float:
    """When a use of `entry` last began or ended."""
    for path in (os.path.join(entry, _ABOUT), entry):
        with contextlib.suppress(FileNotFoundError):
            return os.stat(path).st_mtime
    return 0.0


def end_use(entry: str) -> str | None:
    """Ends the last use of `entry`: None where it is to stay, else the path it was moved to, for `remove`."""
    description = about(entry)
    if not (description.stays or description.awaited):
        return put_away(entry)
    for slot in os.listdir(entry):
        if slot.startswith(f"{PARTS}-"):
            remove(os.path.join(entry, slot))
    os.utime(os.path.join(entry, _ABOUT))
    return None


def in_use(entry: str, now: float) -> bool:
    """Whether a living process uses or fills `entry`; removes what dead ones left half done."""
    users = os.path.join(entry, "users")
    used = False
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(users):
            used |= _lives(os.path.join(users, name), now)
        for slot in os.listdir(entry):
            if slot not in ("users", _ABOUT) and not slot.endswith(".new"):
                used |= _clear_slot(os.path.join(entry, slot), now)
    return used


def is_used_for(purpose: Purpose, entry: str, now: float) -> bool:
    """Whether a living process uses `entry` for `purpose`."""
    users = os.path.join(entry, "users")
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(users):
            user = os.path.join(users, name)
            if read_json(user).get(_PURPOSE) == purpose and _lives(user, now):
                return True
    return False


def take_over(root: str, group: str, now: float) -> Iterator[str]:
    """Ends the waiting of all entries of the checkpoint `group` in `root`, which a load has used by now.

    Those that no process uses go, unless they are to stay: yields paths to `remove` once the lock is released.
    """
    for name in os.listdir(root):
        path = os.path.join(root, name)
        if not os.path.isdir(os.path.join(path, "users")):
            continue
        description = about(path)
        if description.awaited and description.group == group:
            _write_about(path, replace(description, awaited=False))
            gone = None if in_use(path, now) else end_use(path)
            if gone is not None:
                yield gone


def sweep(root: str, now: float, *, spared: str | None = None, at_once: bool = False) -> Iterator[str]:
    """Moves away the entries of `root` that no living process uses; yields paths to `remove` once the lock is released.

    Entries go after `ORPHAN_S` without a user, unless they are to stay. With `at_once` all do, but those of the
    checkpoint `spared`, and for `AWAITED_IN_MEMORY_S` what a prefetch left.
    """
    for name in os.listdir(root):
        path = os.path.join(root, name)
        if name.startswith(_GONE):
            yield path
        elif os.path.isdir(os.path.join(path, "users")) and not in_use(path, now):
            description = about(path)
            if at_once:
                kept = description.awaited and now - last_use(path) <= AWAITED_IN_MEMORY_S
                orphan = (spared is None or description.group != spared) and not kept
            else:
                orphan = not description.stays and now - os.stat(path).st_mtime > ORPHAN_S
            gone = put_away(path) if orphan else None
            if gone is not None:
                yield gone


def claim(folder: str, work: str, now: float) -> bool:
    """Claims the slot `folder` for this process and makes the folder `work`; False where a living one has the claim."""
    make_private(folder)
    if _clear_slot(folder, now):
        return False
    make_private(work)
    record = {**this_process().as_dict(), "work": os.path.basename(work)}
    write_json(os.path.join(folder, "claim"), record)
    return True


def claimed_for(path: str, work: str) -> bool:
    """Whether the claim at `path` is still the one of the folder `work`."""
    return read_json(path).get("work") == os.path.basename(work)


def whole(folder: str, path: str) -> dict[str, Any] | None:
    """What `CacheEntry.fill` noted of the product at `path` in the slot `folder`; None where it is not whole."""
    done = read_json(os.path.join(folder, "done"))
    try:
        if not done or sizes(path) != done.get("sizes"):
            return None
    except OSError:
        return None
    details = done.get("details")
    return details if isinstance(details, dict) else {}


def still_right(folder: str, path: str, on_compared: Callable[[int], None]) -> bool:
    """Whether the product at `path` has the sums that were noted in the slot `folder`; True where none were."""
    noted = read_json(os.path.join(folder, "done")).get("sums")
    return noted is None or sums(path, on_compared) == noted


def sums(path: str, on_summed: Callable[[int], None]) -> dict[str, int]:
    """The CRC-32 of each file at `path`, by its name as in `sizes`; `on_summed` is called with 0 meanwhile."""
    found = {}
    for name in sizes(path):
        value = 0
        with open(os.path.join(path, name) if name else path, "rb", buffering=0) as file:
            while data := file.read(_READ_BYTES):
                value = crc32(data, value)
                on_summed(0)
        found[name] = value
    return found


def sizes(path: str) -> dict[str, int]:
    """The bytes of each file at `path`, by its name relative to it; by ``""`` where `path` is a file."""
    if not os.path.isdir(path):
        return {"": os.stat(path).st_size}
    return {
        os.path.relpath(os.path.join(folder, name), path): os.stat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(path)
        for name in names
    }


def put_in_place(made: str, path: str) -> None:
    """Moves the file or folder `made` to `path`, in place of what is there; of two folders, file by file."""
    if not os.path.isdir(made) or not os.path.isdir(path):
        if os.path.isdir(made) or os.path.isdir(path):
            remove(path)
        os.replace(made, path)
        return
    names = set(os.listdir(made))
    for name in names:
        put_in_place(os.path.join(made, name), os.path.join(path, name))
    for name in set(os.listdir(path)) - names:
        remove(os.path.join(path, name))


def product_name(name: str) -> str:
    """The file name for a product of the object `name`: its own, shortened to 200 bytes, never one of a record."""
    plain = os.path.basename(name.rstrip("/")).replace("\0", "_")
    shortened = plain.encode("utf-8", "surrogateescape")[-200:].decode("utf-8", "replace")
    return "object" if shortened in ("", ".", "..", "claim", "done") else shortened


def put_away(entry: str) -> str | None:
    """Moves `entry` away in one step; returns the path to `remove`, or None where there is no such entry."""
    gone = os.path.join(os.path.dirname(entry), _GONE + uuid.uuid4().hex)
    try:
        os.rename(entry, gone)
    except FileNotFoundError:
        return None
    return gone


def remove(path: str) -> None:
    """Removes the file or folder at `path`, if there is one."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def write_json(path: str, record: dict[str, Any]) -> None:
    """Writes `record` to `path` in one step: no reader sees half of it."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.new"
    try:
        fd = open_private(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(record, file)
        os.replace(temporary, path)
    except BaseException:
        # On a full disk it is there, and empty.
        remove(temporary)
        raise


def read_json(path: str) -> dict[str, Any]:
    """The record at `path`; empty where there is none, or it is no JSON object."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _clear_slot(folder: str, now: float) -> bool:
    """Whether a living process holds the claim of the slot `folder`; removes the work folders of dead ones."""
    record = os.path.join(folder, "claim")
    claimed = _lives(record, now)
    work = os.path.basename(str(read_json(record).get("work", ""))) if claimed else ""
    for name in os.listdir(folder):
        if name.startswith(WORK) and name != work:
            remove(os.path.join(folder, name))
    return claimed


def _lives(path: str, now: float) -> bool:
    """Whether the process that wrote the record at `path` lives; removes the record of a dead one."""
    try:
        touched = os.stat(path).st_mtime
    except FileNotFoundError:
        return False
    record = read_json(path)
    try:
        process = ProcessIdentity(
            str(record["host"]), int(record["pid"]), int(record["started"]), str(record["machine"])
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        process = ProcessIdentity("", 0, 0, "")
    ended = how_ended(process) is not None if is_watchable(process) else now - touched > STALE_S
    if ended:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return not ended
