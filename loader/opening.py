"""Finds what a call was asked for: opens its store and the node's cache, and fetches the first file.

`open_files` does it for a load, which reads a checkpoint of one file or many; `open_own_file` for one file, of which
each rank may have another.
"""

from __future__ import annotations

import contextlib

from ..distributed.session import Session
from .cache.node import NodeCache
from .context import LoadContext
from .errors import FormatError, NotFoundError, RankloadError
from .fetch.checkpoint_files import CheckpointFiles, NamedPath
from .fetch.progress import JobProgress
from .fetch.remote_files import RemoteFiles
from .fetch.whole_checks import WholeChecks
from .request import LoadRequest
from .retries import Outages
from .saved.contents import Saved
from .stages import Stages
from .stores.base import Store
from .stores.locate import RANK_FILE, Located, locate
from .stores.manifest import find_manifests, known_sums
from .stores.names import file_name
from .stores.open import open_store
from .stores.probes import Probes
from .template import expand_for_rank_zero, expand_for_second_rank, expand_path, template_variables
from .wire import decode, encode


def open_files(
    request: LoadRequest, session: Session, stages: Stages, leaving: contextlib.ExitStack
) -> CheckpointFiles:
    """Finds the checkpoint that `request` names, and fetches its first file; a source asks for the others.

    Every rank must call. Raises, on all ranks alike, `TemplateError`, `NotFoundError`, `AccessError` or `CorruptError`,
    as the path or the store gives cause. The store and the node's cache stay open until `leaving` ends: indexes refer
    to files in the cache.
    """
    context, path, first_name = _open(request, session, stages, leaving)
    with stages.timed("locate"):
        found = session.channel.decide("locate", None, lambda _: encode(locate(context.store, first_name)))
    return _files(request, context, path, decode(Located, found), leaving)


def open_own_file(
    request: LoadRequest, session: Session, stages: Stages, leaving: contextlib.ExitStack
) -> CheckpointFiles:
    """Fetches the one file that `request` names on this rank; ranks of a node that name the same share it.

    Every rank must call. Raises, on all ranks alike, as `open_files`, and `FormatError` where the path names a
    checkpoint's folder.
    """
    context, path, first_name = _open(request, session, stages, leaving)
    with stages.timed("locate"):
        found = session.channel.decide("locate", None, lambda _: encode(_one_file(context.store, first_name)))
        located = decode(Located, found)
    if not _differs_by_rank(request):
        return _files(request, context, path, located, leaving)
    with stages.announced("names"):
        ranks = session.topology
        name = path.name_of(
            expand_path(
                request.path,
                rank=ranks.rank,
                local_rank=ranks.local_rank,
                node_rank=ranks.node_rank,
                run_name=request.run_name,
            )
        )
    try:
        return _files(request, context, path, located, leaving, own=Located("file", name, name))
    except NotFoundError as error:
        # All ranks have agreed on this very error, so that another one in its place would not be raised.
        error.message += (
            ". Where fewer ranks have saved than run now, read each saved rank's file on all ranks, by a path without "
            "{rank}"
        )
        raise


def outages_of(session: Session, stall_timeout_s: float) -> Outages:
    """What decides for how long a call of `session` waits for stores, on this rank."""
    ranks = session.topology
    return Outages(stall_timeout_s, who=f"rank {ranks.rank}" if ranks.world_size > 1 else "this process")


def _one_file(store: Store, name: str) -> Located:
    """The file that `name` names. Raises as `locate`, and `FormatError` where it names a checkpoint's folder."""
    located = locate(store, name)
    if RANK_FILE.fullmatch(file_name(name)) and located.first == name:
        return Located("file", name, name)
    if located.form != "file":
        raise FormatError(
            f"{store.describe(name)} is a checkpoint's folder, expected one file of it, such as "
            f"{store.describe(located.first)}: load() restores the folder, and read() returns what one file holds",
            path=store.describe(name),
        )
    return located


def _differs_by_rank(request: LoadRequest) -> bool:
    """Whether the path names a file for each rank, or for each of a node's."""
    return bool(template_variables(request.path) & {"rank", "local_rank", "node_rank"})


def _open(
    request: LoadRequest, session: Session, stages: Stages, leaving: contextlib.ExitStack
) -> tuple[LoadContext, NamedPath, str]:
    """What the call works with, its path, and the name of the object that the path means for rank 0."""
    options = request.options
    with stages.announced("open"):
        opening = (request.object_store, options.storage_options)
        first_path = expand_for_rank_zero(request.path, run_name=request.run_name)
        outages = outages_of(session, options.stall_timeout_s)
        store, first_name = open_store(first_path, *opening, stages.heard, outages)
        leaving.callback(store.close)
        cache = leaving.enter_context(
            NodeCache(
                options.cache_dir,
                size_bytes=options.cache_size,
                home=options.cache_home,
                purpose=request.purpose,
            )
        )
    path = NamedPath(request.path, request.run_name, lambda path: open_store(path, *opening)[1])
    return LoadContext(session, options, stages, store, cache), path, first_name


def _files(
    request: LoadRequest,
    context: LoadContext,
    path: NamedPath,
    located: Located,
    leaving: contextlib.ExitStack,
    *,
    own: Located | None = None,
) -> CheckpointFiles:
    """Fetches the first file, which is `located` for all ranks, or for each its `own`. Every rank must call."""
    session, store = context.session, context.store
    # Rank 0 found it there: to no rank is its server one that never answered.
    store.outages.answered(store.origin(located.first))
    context.cache.of_checkpoint(store.identity, store.describe(located.name))
    leaving.enter_context(
        JobProgress(
            session.channel.counters,
            rank=session.topology.rank,
            enabled=request.progress_bar and not store.is_local,
        )
    )
    remote = leaving.enter_context(RemoteFiles(_whole_checks(context, located, own)))
    return CheckpointFiles(context, remote, own or located, path)


def other_ranks_files(request: LoadRequest, files: CheckpointFiles, saved: Saved) -> str | None:
    """A sentence for where the path names a file for each rank, and one of another rank is there that nobody reads.

    So it is where `saved`, the first rank's file, is no part of a set. Every rank must call; rank 0 sends one probe.
    """
    if saved.kind != "monolithic" or not _differs_by_rank(request):
        return None
    context, found = files.context, files.name

    def probe(_: object) -> str | None:
        path = expand_for_second_rank(request.path, run_name=request.run_name)
        name = open_store(path, request.object_store, request.options.storage_options)[1]
        return context.store.describe(name) if _is_there(context.store, name) else None

    with context.stages.timed("locate"):
        other = context.session.channel.decide("other ranks' files", None, probe)
    if other is None:
        return None
    return (
        f"every rank is restored from {found}, which is no part of a set; {other} is there too, and is not read. If "
        f"that is meant, pass {found} as the path; if each rank's file is its own, read it with rankload.read, which "
        "returns each rank's dict for the same path, and hand its parts to their load_state_dict"
    )


def _is_there(store: Store, name: str) -> bool:
    """Whether there certainly is such an object, and no page; what the store refuses to say is not."""
    try:
        info = Probes(store).look(name)
    except RankloadError:
        return False
    return info is not None and info.certain and not info.is_folder


def _whole_checks(context: LoadContext, located: Located, own: Located | None) -> WholeChecks:
    """The checksums that objects fetched whole are compared with; manifests next to the checkpoint are read for them.

    Where each rank has a file of its `own`, each looks for that file's manifest too. Every rank must call.
    """
    verify, channel = context.options.verify, context.session.channel
    if verify == "off":
        return WholeChecks(verify)
    required = context.options.asks_for_checksums
    with context.stages.timed("manifest"):
        found = channel.decide(
            "manifest", None, lambda _: find_manifests(context.store, located, required=required)
        )
    known, notes = known_sums(found), list(found["notes"])
    if own is not None:
        with context.stages.announced("manifests"):
            beside = find_manifests(context.store, own, only_beside=True, required=required)
        for each in channel.gather("manifests", beside):
            known.update(known_sums(each))
            notes.extend(each["notes"])
    return WholeChecks(verify, known, tuple(dict.fromkeys(notes)))
