"""Fetches a remote checkpoint into this node's cache before a load needs it: `prefetch`. Imports no torch.

    names       alone.open_alone        the checkpoint is located, and names all its files
    indexes     CheckpointFiles.fetch   what comes whole comes now, of all else the index
    ranges      fetch.rounds            the rest: all of it, or what the node's ranks will read (`planning`)

What was fetched stays until the first load on this node that uses it has ended, as if that load had fetched it
(`cache.records`). A load that begins before the end takes over: the prefetch stops within a moment, and the load goes
on with what has landed. One that was killed goes on where it was when it is called again.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .alone import OUTLINE, OpenCheckpoint, open_alone
from .byte_ranges import ByteRange
from .cache.node import NodeCache
from .fetch.checkpoint_files import CheckpointFiles
from .fetch.rounds import Parts, WantedRanges, plan_round
from .options import LoadOptions, Options
from .planning.jobs import TargetName
from .planning.loads import node_ranges

_LOOK_S = 0.2
"""How often it is checked whether a load has come."""
_AT_ONCE = 32
"""Files whose indexes are fetched between two such checks."""


@dataclass(frozen=True)
class Prefetched:
    """What a prefetch did."""

    name: str
    """What messages call the checkpoint."""
    bytes: int
    """Fetched by this call."""
    held_bytes: int
    """Of the checkpoint on this node now, for the next load to use; with what earlier calls had fetched."""
    files: int
    """Those of the checkpoint that were looked at."""
    folder: str | None
    """Where they are, two with a comma between them where one had too little room; None where files are used in place,
    so that there is nothing to fetch."""
    taken_over: bool = False
    """Whether a load on this node uses the checkpoint already, and fetches the rest itself."""
    missing: tuple[str, ...] = ()
    """Files of the checkpoint that are not there."""
    not_kept: tuple[str, ...] = ()
    """Files that cannot be fetched ahead: their store states no version of them, so that no load could tell whether
    they are still the same; or another process on this node is fetching them."""


def prefetch(
    path: str | os.PathLike[str],
    *,
    target: TargetName | None = None,
    world_size: int = 1,
    n_nodes: int = 1,
    node_rank: int = 0,
    object_store: Any = None,
    options: Options | LoadOptions | Mapping[str, Any] | None = None,
    progress_bar: bool = False,
) -> Prefetched:
    """Fetches the checkpoint at `path` into this node's cache, for the next load. One process of a node calls.

    Args:
        path: as `load` takes it. ``{rank}`` and its like stand for the files of every saved rank.
        target: what the job restores into (`planning.jobs`): then what its ranks on this node restore is fetched, and
            all of the checkpoint otherwise.
        world_size: ranks of the job, as many on each node; with `target`.
        n_nodes: nodes that they are on; with `target`.
        node_rank: this node; with `target`.
        object_store: as `load` takes it.
        options: `LoadOptions`, or a mapping of its fields; those of the cache as the load will have them.
        progress_bar: whether the bytes are shown as they come.

    Raises:
        RankloadError: as the beginning of a load, and `AccessError` where there is too little room on this node. With
            `target` also as `plan_load`.
    """
    with open_alone(
        path,
        OUTLINE,
        object_store=object_store,
        options=options,
        progress_bar=progress_bar,
        purpose="prefetch",
    ) as opened:
        files = opened.files
        cache = files.context.cache
        missing: tuple[str, ...] = ()
        if target is None:
            missing = _fetch_files(opened, cache)
            wanted = {file: [ByteRange(0, size)] for file, size in files.remote.known.sizes.items()}
        else:
            wanted = node_ranges(
                opened, world_size=world_size, n_nodes=n_nodes, node=node_rank, target=target
            )
        if not cache.given_over:
            _fetch_ranges(files, {file: ranges for file, ranges in wanted.items() if cache.is_left(file)})
        return _result(files, missing)


def _fetch_files(opened: OpenCheckpoint, cache: NodeCache) -> tuple[str, ...]:
    """Fetches the checkpoint's files, of those that come in parts the index; returns the names of those missing."""
    files = opened.files
    names = [one.name for one in opened.saved.files if not one.beside]
    found: set[str] = set()
    for first in range(0, len(names), _AT_ONCE):
        if cache.given_over:
            return ()
        found |= files.fetch(names[first : first + _AT_ONCE], "prefetch", optional=True).keys()
    describe = files.context.store.describe
    lost = (one for one in opened.saved.files if not one.beside and one.name not in found)
    return tuple(describe(files.object_of(one)) for one in lost)


def _fetch_ranges(files: CheckpointFiles, wanted: WantedRanges) -> None:
    """Fetches ranges of files by their paths, until a load takes over."""
    if files.context.store.is_local:
        return
    work = plan_round(files.context, files.remote, Parts(wanted), "prefetch")
    if work:
        with _watching(files), files.context.stages.timed("prefetch parts"):
            work.run()


@contextlib.contextmanager
def _watching(files: CheckpointFiles) -> Iterator[None]:
    """A block whose reads end once a load takes over."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK_S):
            if files.context.cache.given_over:
                files.remote.stop()
                return

    thread = threading.Thread(target=watch, name="rankload-prefetch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _result(files: CheckpointFiles, missing: tuple[str, ...]) -> Prefetched:
    context, remote = files.context, files.remote
    fetched, held = remote.fetched_by_path(), remote.held_by_path()
    remote_files = [file for file in files.fetched if not context.store.is_local]
    return Prefetched(
        name=files.name,
        bytes=sum(fetched.get(file.path, file.fetched_bytes) for file in remote_files),
        held_bytes=sum(held.get(file.path, max(0, file.size_bytes)) for file in remote_files),
        files=len(files.fetched),
        folder=files.cache_dir,
        taken_over=context.cache.given_over,
        missing=missing,
        not_kept=tuple(file.source for file in remote_files if not context.cache.is_left(file.path)),
    )
