"""Opening a checkpoint: found, fetched once per node, its indexes read; nothing of its tensors yet.

The first file tells the kind by its content. A set of per-rank files then has its second fetch: what else this
rank needs, which that first file told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..distributed.session import Session
from .arguments import LoadRequest
from .cache import NodeCache
from .errors import FormatError, LayoutError, NotFoundError
from .fetch import Fetched, FetchedFile, fetch_files
from .locate import Located, locate
from .monolithic import Contents, read_layout
from .progress import JobProgress
from .receipt import FileRecord
from .restore import optimizer_classes, scaler_class, scheduler_classes
from .stopwatch import Stopwatch
from .store import Store, open_store
from .template import expand_for_rank_zero, expand_path, template_variables
from .torch_file import FileIndex, read_index
from .tree_walk import tensors
from .values import StorageRef
from .zero_contents import ZeroContents
from .zero_open import ZeroFiles, read_zero

COMPOSER_STATES = "composer_states.pt"
"""What Composer's archives keep everything but ZeRO's files in."""
ZERO_FOLDER = "deepspeed"
"""The folder of ZeRO's files in Composer's archives."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are on this node and whose indexes were read; its tensors are lazy."""

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
    """Where fetched files were put; None where all were used in place."""
    zero: ZeroContents | None = None
    states_file: str = ""
    """What messages call the file that everything but ZeRO's tensors is in; `name` where it is empty."""
    rng_per_rank: bool = False
    """Whether each rank's own file has its random state, rather than one file all ranks'."""

    def storages(self, wanted: Mapping[str, Any]) -> list[StorageRef]:
        """What will be read of this rank's files to restore the parts `wanted`."""
        if self.zero is not None:
            return [storage for index in self.indexes for storage in index.storages]
        return list({tensor.storage for tree in wanted.values() for _, tensor in tensors(tree)})


@dataclass(frozen=True)
class _Opening:
    """What the steps of opening share."""

    request: LoadRequest
    session: Session
    watch: Stopwatch
    store: Store
    cache: NodeCache
    own_name: str
    """This rank's own expansion of the path."""

    def fetch(self, names: list[str], stage: str) -> Fetched:
        with self.watch.lap(stage) as lap:
            fetched = fetch_files(
                self.session.channel, self.session.topology, self.store, names, self.cache, stage=stage
            )
            if self.session.topology.local_rank == 0:
                lap.bytes += fetched.fetched_bytes
        return fetched


def open_checkpoint(
    request: LoadRequest, session: Session, watch: Stopwatch, leaving: contextlib.ExitStack
) -> Checkpoint:
    """Finds, fetches and indexes the checkpoint that `request` names. Every rank must call.

    The store and the node's cache stay open until `leaving` ends: the indexes refer to files in the cache.
    """
    topology, channel = session.topology, session.channel
    with watch.stage("open"):
        options = (request.object_store, request.options.storage_options)
        first_path = expand_for_rank_zero(request.path, run_name=request.run_name)
        own_path = expand_path(
            request.path,
            rank=topology.rank,
            local_rank=topology.local_rank,
            node_rank=topology.node_rank,
            run_name=request.run_name,
        )
        store, first_name = open_store(first_path, *options)
        leaving.callback(store.close)
        own_name = open_store(own_path, *options)[1]
        cache = leaving.enter_context(NodeCache(request.options.cache_dir))
    with watch.lap("locate"):
        located = Located(**channel.decide("locate", None, lambda _: asdict(locate(store, first_name))))
    leaving.enter_context(
        JobProgress(channel.counters, rank=topology.rank, enabled=request.progress_bar and not store.is_local)
    )
    opening = _Opening(request, session, watch, store, cache, own_name)
    first = opening.fetch([located.first], "fetch first")
    file = first.files[located.first]
    if located.form == "folder":
        return _open_folder(opening, located, file)
    if file.kind == "archive" and any(name.startswith(f"{ZERO_FOLDER}/") for name in file.members):
        return _open_archives(opening, located, file)
    return _open_single(opening, file)


def _open_single(opening: _Opening, file: FetchedFile) -> Checkpoint:
    """One file for all ranks, alone or in an archive."""
    request = opening.request
    with opening.watch.stage("read"):
        path = f"{file.path}/{_single_member(file)}" if file.kind == "archive" else file.path
        index = read_index(path, name=file.source)
        contents = read_layout(
            index.tree,
            file=file.source,
            layout=request.options.layout,
            optimizer_classes=optimizer_classes(request.state),
            scheduler_classes=scheduler_classes(request.state),
            scaler_class=scaler_class(request.state),
        )
    return _checkpoint(opening, file.source, "monolithic", contents, None, [index], [file])


def _single_member(file: FetchedFile) -> str:
    if COMPOSER_STATES in file.members:
        return COMPOSER_STATES
    if len(file.members) == 1:
        return file.members[0]
    shown = ", ".join(file.members[:12]) or "nothing"
    raise FormatError(
        f"{file.source}: expected {COMPOSER_STATES}, or one torch file, in the archive; it holds {shown}",
        path=file.source,
    )


def _open_archives(opening: _Opening, located: Located, file: FetchedFile) -> Checkpoint:
    """Composer's archives of a ZeRO job: one a rank, the first with what all ranks need."""
    request, topology = opening.request, opening.session.topology
    prefix = f"{ZERO_FOLDER}/"

    def path_in(archive: FetchedFile, name: str) -> str | None:
        return f"{archive.path}/{prefix}{name}" if prefix + name in archive.members else None

    def of_first(name: str) -> tuple[str, str] | None:
        path = path_in(file, name)
        return None if path is None else (path, f"{file.source}:{prefix}{name}")

    with opening.watch.stage("read first"):
        zero = ZeroFiles.open(of_first, name=file.source)
        zero.check(topology.world_size, weights_only=request.weights_only)
        needs_own = zero.needs_own_files(weights_only=request.weights_only) and zero.world_size > 1
        if needs_own and not {"rank", "local_rank", "node_rank"} & template_variables(request.path):
            raise LayoutError(
                f"{file.source} is the first of {zero.world_size} ranks' archives, but the path has no "
                "{rank}: pass a template such as ep1-rank{rank}.tar",
                path=file.source,
            )
    archives = {0: file}
    if needs_own:
        own = opening.fetch([located.first if topology.rank == 0 else opening.own_name], "fetch")
        # The first archive is here already, and what it cost was told when it came.
        archives.setdefault(topology.rank, next(iter(own.files.values())))

    def find(name: str) -> tuple[str, str] | None:
        for archive in archives.values():
            path = path_in(archive, name)
            if path is not None:
                return path, f"{archive.source}:{prefix}{name}"
        return None

    with opening.watch.stage("read"):
        indexes, contents, whole = read_zero(zero, find, request, topology, list(archives.values()))
        states_file = ""
        if COMPOSER_STATES in file.members and not request.weights_only:
            states_file = f"{file.source}:{COMPOSER_STATES}"
            states = read_index(f"{file.path}/{COMPOSER_STATES}", name=states_file)
            indexes.append(states)
            composer = read_layout(states.tree, file=states.name)
            contents = Contents(
                "composer",
                {
                    **composer.state,
                    **contents.state,
                    "schedulers": {
                        **composer.state.get("schedulers", {}),
                        **contents.state.get("schedulers", {}),
                    },
                },
                composer.rng if composer.rng is not None else contents.rng,
                {**contents.extra, **composer.extra},
            )
    return _checkpoint(
        opening,
        file.source,
        "composer-zero",
        contents,
        zero.world_size,
        indexes,
        list(archives.values()),
        whole,
        states_file=states_file,
    )


def _open_folder(opening: _Opening, located: Located, file: FetchedFile) -> Checkpoint:
    """A DeepSpeed folder: names are derived from rank and stage."""
    request, topology, store = opening.request, opening.session.topology, opening.store
    shown = store.describe(located.name)
    model_name = located.first.rsplit("/", 1)[-1]

    with opening.watch.stage("read first"):
        zero = ZeroFiles.open(
            lambda name: (file.path, file.source) if name == model_name else None, name=shown
        )
        zero.check(topology.world_size, weights_only=request.weights_only)

    def probe(_: Any) -> str | None:
        if not zero.has_optimizer_files(weights_only=request.weights_only):
            return None
        for spelling in zero.optimizer_spellings():
            if store.stat(store.join(located.name, spelling)) is not None:
                return spelling
        tried = ", ".join(zero.optimizer_spellings())
        raise NotFoundError(f"{shown} has no optimizer file of rank 0; looked for {tried}", path=shown)

    with opening.watch.lap("locate"):
        spelling = opening.session.channel.decide("optimizer files", None, probe)
    names = zero.files_for(topology.rank, topology.world_size, spelling, weights_only=request.weights_only)
    objects = {name: store.join(located.name, name) for name in names}
    fetched = opening.fetch(list(objects.values()), "fetch")

    def find(name: str) -> tuple[str, str] | None:
        if name == model_name:
            return file.path, file.source
        found = fetched.files.get(objects.get(name, ""))
        return None if found is None else (found.path, found.source)

    with opening.watch.stage("read"):
        used = list({one.name: one for one in (file, *fetched.files.values())}.values())
        indexes, contents, whole = read_zero(zero, find, request, topology, used)
    return _checkpoint(
        opening, shown, "deepspeed", contents, zero.world_size, indexes, used, whole,
        rng_per_rank=zero.stage == 3,
    )  # fmt: skip


def _checkpoint(
    opening: _Opening,
    name: str,
    kind: str,
    contents: Contents,
    saved_world_size: int | None,
    indexes: list[FileIndex],
    files: list[FetchedFile],
    zero: ZeroContents | None = None,
    *,
    states_file: str = "",
    rng_per_rank: bool = False,
) -> Checkpoint:
    records = tuple(
        FileRecord(
            file.source,
            max(0, file.size_bytes),
            file.fetched_bytes,
            all(index.verifiable for index in indexes if index.name.startswith(file.source)),
        )
        for file in files
    )
    in_place = opening.store.is_local and all(file.kind == "file" for file in files)
    return Checkpoint(
        name,
        kind,
        contents,
        saved_world_size,
        tuple(indexes),
        records,
        None if in_place else opening.cache.folder,
        zero,
        states_file,
        rng_per_rank,
    )
