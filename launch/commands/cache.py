"""Show and empty this node's cache of fetched files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import Annotated, Any

import typer

from ...loader.cache.homes import CacheHome, homes_for
from ...loader.cache.upkeep import CachedFile, cached_files, clear, prune
from ...loader.plurals import counted, in_units
from .blocks import Block, Line, Table
from .calls import Call, sharing
from .endings import DONE, FOUND_WRONG, WrongArgumentsError

_shares = sharing("cache_dir", "cache_home")


@_shares
def list_cache(call: Call) -> None:
    """List the files in this node's cache: sizes, last use, and whether a running process uses them.

    Files of one checkpoint are listed together; it is removed as a whole. Without --cache-dir (or RANKLOAD_CACHE_DIR)
    these are the folders that loads use by themselves, in memory and on disk.
    """
    homes = _homes(call)
    found = _by_checkpoint(cached_files(homes))
    rows = [
        (
            one.checkpoint or one.group[:8],
            one.name,
            f"{one.size_bytes:,}",
            _when(one),
            "in use" if one.in_use else "awaits a load" if one.awaited else "idle",
            os.path.dirname(one.path),
        )
        for one in found
    ]
    checkpoints = len({one.group for one in found})
    blocks: list[Block] = [Line(f"nothing in {', '.join(home.folder for home in homes)}")]
    if rows:
        blocks = [
            Table(("checkpoint", "file", "bytes", "last use", "state", "folder"), rows, frozenset({2})),
            Line(
                f"{counted(len(rows), 'file')} of {counted(checkpoints, 'checkpoint')}, "
                f"{in_units(sum(one.size_bytes for one in found))}"
            ),
        ]
    call.show({"folders": [home.folder for home in homes], "files": _fields(found)}, blocks)


@sharing("cache_dir", "cache_home", "cache_size")
def prune_cache(call: Call) -> None:
    """Remove the least recently used checkpoints, until what is on disk fits in --cache-size.

    Without --cache-size, RANKLOAD_CACHE_SIZE counts. What a running process uses stays, and so does what was fetched
    for a load that is to come.
    """
    if call.load_options.cache_size is None and not os.environ.get("RANKLOAD_CACHE_SIZE"):
        raise WrongArgumentsError(
            "no size is known to prune to: pass --cache-size, or set RANKLOAD_CACHE_SIZE"
        )
    homes = _homes(call)
    gone = prune(homes, call.options.cache_size)
    _show_removed(call, homes, gone)


@_shares
def clear_cache(
    call: Call, yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False
) -> int:
    """Remove all that no running process uses. Exit code 1 where you say no."""
    homes = _homes(call)
    if not yes:
        if call.json or not sys.stdin.isatty():
            raise WrongArgumentsError("nobody can be asked here: pass --yes")
        idle = [one for one in cached_files(homes) if not one.in_use]
        size = in_units(sum(one.size_bytes for one in idle))
        if idle and not typer.confirm(f"Remove {counted(len(idle), 'file')}, {size}?"):
            return FOUND_WRONG
    _show_removed(call, homes, clear(homes))
    return DONE


cache = {"list": list_cache, "prune": prune_cache, "clear": clear_cache}


def _homes(call: Call) -> list[CacheHome]:
    return homes_for(call.options.cache_dir, call.options.cache_home, stays=False)


def _by_checkpoint(found: Iterable[CachedFile]) -> list[CachedFile]:
    """Files of one checkpoint together, the checkpoint that was used last first."""
    found = list(found)
    newest: dict[str, float] = {}
    for one in found:
        newest[one.group] = max(newest.get(one.group, 0.0), one.last_use_s)
    return sorted(found, key=lambda one: (-newest[one.group], one.group, one.name))


def _show_removed(call: Call, homes: Sequence[CacheHome], gone: Sequence[CachedFile]) -> None:
    left = cached_files(homes)
    used = sum(one.in_use for one in left)
    told = f"removed {counted(len(gone), 'file')}, {in_units(sum(one.size_bytes for one in gone))}"
    if left:
        told += f"; {counted(len(left), 'file')}, {in_units(sum(one.size_bytes for one in left))} left"
        told += f", {used:,} of them in use" if used else ""
    call.show({"removed": _fields(gone), "left": _fields(left)}, [Line(told)])


def _fields(found: Iterable[CachedFile]) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "checkpoint": one.checkpoint,
            "group": one.group,
            "size_bytes": one.size_bytes,
            "last_use": _when(one),
            "in_use": one.in_use,
            "awaited": one.awaited,
            "in_memory": one.in_memory,
            "path": one.path,
        }
        for one in found
    ]


def _when(one: CachedFile) -> str:
    return datetime.fromtimestamp(one.last_use_s, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
