"""Holds what a load passes on: `Opening` while files are found, fetched and indexed, and then `Checkpoint`.

`opening.open_checkpoint` makes the `Opening`, through which files are fetched and indexed. `make_checkpoint` puts what
came of it into the `Checkpoint` that `check`, `verify`, `targets` and `fetch` take: the saved parts, their tensors not
read yet, and where each file is on this node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..distributed.session import Session
from .cache.folder import folder_of
from .cache.node import NodeCache
from .fetch.files import Fetched, FetchedFile, fetch_files
from .fetch.remote_files import RemoteFiles
from .formats.torch_file import FileIndex
from .receipt import FileRecord
from .request import LoadRequest
from .saved.contents import Contents
from .saved.tree import find_unknown, tensors
from .saved.values import StorageRef
from .sources.zero.contents import ZeroContents
from .sources.zero.model_parallel import Position
from .stages import Stages
from .stores.base import Store


@dataclass(frozen=True)
class Opening:
    """One load's store, cache and request, as the steps of opening use them; it stays part of the `Checkpoint`."""

    request: LoadRequest
    session: Session
    stages: Stages
    store: Store
    cache: NodeCache
    name_of: Callable[[str], str]
    """Gives the name in the store of the object that a path, without variables, means."""
    remote: RemoteFiles
    """The files that come in parts: at first their index alone."""

    @property
    def direct(self) -> bool:
        """Whether bytes may be fetched from the store directly into a rank's tensors, past the node's cache."""
        options = self.request.options
        return not self.store.is_local and options.mode in ("direct", "auto") and options.verify != "before"

    def fetch(self, names: list[str], stage: str) -> Fetched:
        """Fetches to this node the files that its ranks name; each rank gets those in `names` (see `fetch_files`).

        Every rank must call, whatever it names. The stage's bytes are counted on the node's first rank.
        """
        with self.stages.timed(stage) as timing:
            fetched = fetch_files(
                self.session.channel,
                self.session.topology,
                self.store,
                names,
                self.cache,
                self.remote,
                stage=stage,
            )
            if self.session.topology.local_rank == 0:
                timing.bytes += fetched.fetched_bytes
        return fetched

    def index(self, path: str, name: str) -> FileIndex:
        """The index of the torch file at `path`, fetched whole or its index alone; messages call it `name`."""
        return self.remote.index(path, name)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files, or their indexes, are on this node; no storage was read, so its tensors are lazy."""

    opening: Opening
    name: str
    """What messages and the receipt call it; without secrets."""
    kind: str
    """``monolithic``, ``composer-zero`` or ``deepspeed``."""
    contents: Contents
    saved_world_size: int | None
    indexes: tuple[FileIndex, ...]
    """Of the torch files that this rank reads."""
    files: tuple[FileRecord, ...]
    cache_dir: str | None
    """The folder that fetched files were put into, or two with a comma between them where one had too little room; None
    where all were used in place."""
    zero: ZeroContents | None = None
    rng_per_rank: bool = False
    """Whether each saved rank's random state is in its own file; otherwise one file has those of all ranks."""
    own_rng: bool = True
    """With `rng_per_rank`: whether this rank's counterpart among the saved ranks had its random state kept."""
    notes: tuple[str, ...] = ()
    """Sentences for the receipt's notes."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Where each of `files` is on this node, by its name."""

    def file_of(self, tree: Any) -> str:
        """The name of the file that an unknown type in `tree` came from, for messages; `name` where there is none."""
        unknown = {name for _, name in find_unknown(tree)}
        for index in self.indexes:
            if unknown and not unknown.isdisjoint(name for _, name in find_unknown(index.tree)):
                return index.name
        return self.name

    def storages(self, wanted: Mapping[str, Any]) -> list[StorageRef]:
        """The storages to read for the parts `wanted`; of a ZeRO checkpoint, all in the files that this rank reads."""
        if self.zero is not None:
            return [storage for index in self.indexes for storage in index.storages]
        return list({tensor.storage for tree in wanted.values() for _, tensor in tensors(tree)})


def make_checkpoint(
    opening: Opening,
    name: str,
    kind: str,
    contents: Contents,
    saved_world_size: int | None,
    indexes: list[FileIndex],
    files: list[FetchedFile],
    zero: ZeroContents | None = None,
    position: Position | None = None,
    *,
    rng_per_rank: bool = False,
) -> Checkpoint:
    """The opened checkpoint, with a record for the receipt of each of the `files` that this rank uses."""
    records = []
    for file in files:
        read = [index.verifiable for index in indexes if index.name.startswith(file.source)]
        by_records = bool(read) and all(read)
        by = ("zip CRC-32",) * by_records + file.compared_by
        verified = by_records or bool(file.compared_by)
        records.append(
            FileRecord(file.source, max(0, file.size_bytes), file.fetched_bytes, verified, by, file.left_out)
        )
    in_place = opening.store.is_local and all(file.kind == "file" for file in files)
    folders = dict.fromkeys(filter(None, (folder_of(file.path) for file in files)))
    return Checkpoint(
        opening,
        name,
        kind,
        contents,
        saved_world_size,
        tuple(indexes),
        tuple(records),
        None if in_place else ", ".join(folders) or opening.cache.folder,
        zero,
        rng_per_rank,
        _own_rng(zero, position),
        _notes(opening, zero, position),
        {file.source: file.path for file in files},
    )


def _own_rng(zero: ZeroContents | None, position: Position | None) -> bool:
    """Below stage 3, DeepSpeed kept only the first data-parallel rank's, for each part of the model."""
    if zero is None or position is None:
        return True
    return position.rank < (zero.checkpoint.world_size if zero.checkpoint.partitioned else 1)


def _notes(opening: Opening, zero: ZeroContents | None, position: Position | None) -> tuple[str, ...]:
    of_files = opening.remote.checks.notes
    if zero is None or position is None:
        return of_files
    split = (f"each rank restores its own part of the model: {position.layout}",) * position.layout.split
    return (*of_files, *split, *_resharded(opening, zero, position.world_size))


def _resharded(opening: Opening, zero: ZeroContents, world_size: int) -> tuple[str, ...]:
    if not zero.optims or zero.checkpoint.world_size == world_size or not zero.checkpoint.stage:
        return ()
    return (f"resharded from {zero.checkpoint.world_size} ranks to {world_size} ranks",)
