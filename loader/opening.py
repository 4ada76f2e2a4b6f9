"""Opens a checkpoint: finds it, fetches what its index needs once per node, and reads that index; no tensor yet.

The content of the first file decides the kind: one file for all ranks, Composer's archives of a ZeRO job, or a
DeepSpeed folder. Of the last two, the first file also says which other files this rank needs, and those are fetched
next. What is handed on is a `Checkpoint`: its parts as lazy values, and where each file's bytes are.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict

from ..distributed.session import Session
from .cache.node import NodeCache
from .checkpoint import Checkpoint, Opening, make_checkpoint
from .errors import FormatError
from .fetch.files import FetchedFile
from .fetch.progress import JobProgress
from .fetch.remote_files import RemoteFiles
from .fetch.whole_checks import WholeChecks
from .request import LoadRequest
from .saved.contents import Contents
from .sources.single_file import read_layout
from .sources.zero.files import ZERO_FOLDER, ArchiveSource, FolderSource
from .sources.zero.open import ZeroFiles, gather_files, zero_parts
from .stages import Stages
from .stores.base import Store
from .stores.locate import Located, locate
from .stores.manifest import find_manifests, known_sums
from .stores.open import open_store
from .targets.state import optimizer_classes, scaler_class, scheduler_classes
from .template import expand_for_rank_zero

COMPOSER_STATES = "composer_states.pt"
"""The member of Composer's archives that holds everything but ZeRO's files."""


def open_checkpoint(
    request: LoadRequest, session: Session, stages: Stages, leaving: contextlib.ExitStack
) -> Checkpoint:
    """Finds, fetches and indexes the checkpoint that `request` names; every rank gets its own `Checkpoint`.

    Every rank must call. Raises, on all ranks alike, `TemplateError`, `NotFoundError`, `AccessError`, `FormatError`,
    `UnsafeError`, `CorruptError` or `LayoutError`, as the path, the store or a file gives cause. The store and the
    node's cache stay open until `leaving` ends: the indexes refer to files in the cache.
    """
    topology, channel = session.topology, session.channel
    with stages.stage("open"):
        options = (request.object_store, request.options.storage_options)
        first_path = expand_for_rank_zero(request.path, run_name=request.run_name)
        store, first_name = open_store(first_path, *options)
        leaving.callback(store.close)
        cache = leaving.enter_context(_cache(request))
    with stages.timed("locate"):
        located = Located(**channel.decide("locate", None, lambda _: asdict(locate(store, first_name))))
    cache.of_checkpoint(store.identity, store.describe(located.name))
    leaving.enter_context(
        JobProgress(channel.counters, rank=topology.rank, enabled=request.progress_bar and not store.is_local)
    )
    checks = _whole_checks(request, session, stages, store, located)
    remote = leaving.enter_context(RemoteFiles(checks))
    opening = Opening(
        request, session, stages, store, cache, lambda path: open_store(path, *options)[1], remote
    )
    first = opening.fetch([located.first], "fetch first")
    file = first.files[located.first]
    if located.form == "folder":
        return _open_folder(opening, located, file)
    if file.kind == "archive" and any(name.startswith(f"{ZERO_FOLDER}/") for name in file.members):
        return _open_archives(opening, file)
    return _open_single(opening, file)


def _cache(request: LoadRequest) -> NodeCache:
    options = request.options
    return NodeCache(options.cache_dir, size_bytes=options.cache_size or 0, home=options.cache_home or "auto")


def _whole_checks(
    request: LoadRequest, session: Session, stages: Stages, store: Store, located: Located
) -> WholeChecks:
    """The checksums that objects fetched whole are compared with; manifests next to the checkpoint are read for them.

    Every rank must call.
    """
    verify = request.options.verify or "during"
    if verify == "off":
        return WholeChecks(verify)
    with stages.timed("manifest"):
        found = session.channel.decide("manifest", None, lambda _: find_manifests(store, located))
    return WholeChecks(verify, known_sums(found), tuple(found["notes"]))


def _open_folder(opening: Opening, located: Located, file: FetchedFile) -> Checkpoint:
    """A DeepSpeed folder. It is not listed: names of files are derived from rank and stage."""
    shown = opening.store.describe(located.name)
    source = FolderSource(opening, located.name, file)
    with opening.stages.stage("read first"):
        zero = ZeroFiles.open(source, name=shown, opening=opening)
    gather_files(opening, zero)
    with opening.stages.stage("read states"):
        contents, whole = zero_parts(opening, zero)
    return make_checkpoint(
        opening, shown, "deepspeed", contents, zero.ranks, zero.indexes, source.files, whole, zero.position,
        rng_per_rank=zero.stage == 3 or zero.position.layout.split,
    )  # fmt: skip


def _open_archives(opening: Opening, file: FetchedFile) -> Checkpoint:
    """Composer's archives of a ZeRO job: one for each saved rank; the first also has what all ranks need."""
    source = ArchiveSource(opening, file)
    with opening.stages.stage("read first"):
        zero = ZeroFiles.open(source, name=file.source, opening=opening)
    gather_files(opening, zero)
    with opening.stages.stage("read states"):
        contents, whole = zero_parts(opening, zero)
        indexes = list(zero.indexes)
        if COMPOSER_STATES in file.members and not opening.request.weights_only:
            states = opening.index(f"{file.path}/{COMPOSER_STATES}", f"{file.source}:{COMPOSER_STATES}")
            indexes.append(states)
            contents = _with_composers(contents, read_layout(states.tree, file=states.name))
    return make_checkpoint(
        opening, file.source, "composer-zero", contents, zero.ranks, indexes, source.files, whole, zero.position,
    )  # fmt: skip


def _with_composers(contents: Contents, composer: Contents) -> Contents:
    """DeepSpeed's parts and Composer's own; of a part that both have, DeepSpeed's, and Composer's random states."""
    schedulers = {**composer.state.get("schedulers", {}), **contents.state.get("schedulers", {})}
    return Contents(
        "composer",
        {**composer.state, **contents.state, "schedulers": schedulers},
        composer.rng if composer.rng is not None else contents.rng,
        {**contents.extra, **composer.extra},
    )


def _open_single(opening: Opening, file: FetchedFile) -> Checkpoint:
    """One torch file for all ranks, as it is or in an archive."""
    request = opening.request
    with opening.stages.stage("read"):
        if file.kind == "archive":
            member = _single_member(file)
            index = opening.index(f"{file.path}/{member}", f"{file.source}:{member}")
        else:
            index = opening.index(file.path, file.source)
        contents = read_layout(
            index.tree,
            file=file.source,
            layout=request.options.layout,
            optimizer_classes=optimizer_classes(request.state),
            scheduler_classes=scheduler_classes(request.state),
            scaler_class=scaler_class(request.state),
        )
    return make_checkpoint(opening, file.source, "monolithic", contents, None, [index], [file])


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
