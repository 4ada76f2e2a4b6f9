"""Opens a checkpoint in one process, whatever job it may be part of: for whoever looks at it, or makes another of it.

    path       opening.open_files     the path is located, and its first file fetched
    source     sources.kinds          the indexes of its files are read: `Saved`

It is the beginning of a load, without a target: nothing is restored. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..distributed.session import open_session_alone
from .cache.records import Purpose
from .collector import without_collector
from .errors import RankloadError
from .fetch.checkpoint_files import CheckpointFiles
from .opening import open_files
from .options import LoadOptions, Options, resolve_options
from .request import LoadRequest, as_path
from .saved.contents import Saved
from .saved.demand import Demand
from .saved.model_parallel import Position
from .sources.kinds import open_saved
from .stages import Stages

EVERYTHING = Demand(Position(0, 1))
"""All that it holds; of a model that was split by pipeline or tensor parallelism or experts, a `LayoutError`."""
OUTLINE = Demand(Position(0, 1), outline=True)
"""Names, shapes and settings, by as few files as tell them."""


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose indexes were read, while its store and this node's cache are open."""

    files: CheckpointFiles
    saved: Saved


@contextlib.contextmanager
def open_alone(
    path: str | os.PathLike[str],
    demand: Demand = OUTLINE,
    *,
    object_store: Any = None,
    options: Options | LoadOptions | Mapping[str, Any] | None = None,
    progress_bar: bool = False,
    purpose: Purpose = "look",
) -> Iterator[OpenCheckpoint]:
    """The checkpoint at `path`, for the length of the block. One process calls it; nothing else of a job must.

    Args:
        path: as `load` takes it. ``{rank}`` and its like stand for the files of every saved rank.
        demand: `OUTLINE` or `EVERYTHING`.
        object_store: as `load` takes it.
        options: `LoadOptions`, or a mapping of its fields.
        progress_bar: whether the bytes are shown that come from a remote store.
        purpose: what the files in the node's cache are used for: with ``look``, what a prefetch left stays for a load.

    Raises:
        RankloadError: as the beginning of a load: `NotFoundError`, `AccessError`, `FormatError`, `CorruptError`,
            `UnsafeError`, `LayoutError` or `OptionError`.
    """
    resolved = options if isinstance(options, Options) else resolve_options(options)
    request = LoadRequest(
        as_path(path), None, resolved, object_store=object_store, progress_bar=progress_bar, purpose=purpose
    )
    failure: BaseException | None = None
    try:
        with (
            without_collector(),
            open_session_alone(stall_timeout_s=resolved.stall_timeout_s) as session,
            contextlib.ExitStack() as leaving,
        ):
            files = open_files(request, session, Stages(session.channel), leaving)
            opened = OpenCheckpoint(files, open_saved(files, demand))
            try:
                yield opened
            except BaseException as error:
                failure = error  # what the block raises is its own, and no failure of the session
    except RankloadError as error:
        # There is no other rank or host that it could be of.
        error.rank = error.host = None
        raise
    if failure is not None:
        if isinstance(failure, RankloadError):
            failure.rank = failure.host = None
        raise failure
