"""Finds the checkpoint that a load was asked for: opens its store and the node's cache, and fetches its first file."""

from __future__ import annotations

import contextlib

from ..distributed.session import Session
from .cache.node import NodeCache
from .context import LoadContext
from .errors import RankloadError
from .fetch.checkpoint_files import CheckpointFiles, NamedPath
from .fetch.progress import JobProgress
from .fetch.remote_files import RemoteFiles
from .fetch.whole_checks import WholeChecks
from .request import LoadRequest
from .saved.contents import Saved
from .stages import Stages
from .stores.base import Store
from .stores.locate import Located, locate
from .stores.manifest import find_manifests, known_sums
from .stores.open import open_store
from .stores.probes import Probes
from .template import expand_for_rank_zero, expand_for_second_rank, template_variables
from .wire import decode, encode


def open_files(
    request: LoadRequest, session: Session, stages: Stages, leaving: contextlib.ExitStack
) -> CheckpointFiles:
    """Finds the checkpoint that `request` names, and fetches its first file; a source asks for the others.

    Every rank must call. Raises, on all ranks alike, `TemplateError`, `NotFoundError`, `AccessError` or `CorruptError`,
    as the path or the store gives cause. The store and the node's cache stay open until `leaving` ends: indexes refer
    to files in the cache.
    """
    options = request.options
    with stages.stage("open"):
        opening = (request.object_store, options.storage_options)
        first_path = expand_for_rank_zero(request.path, run_name=request.run_name)
        store, first_name = open_store(first_path, *opening)
        leaving.callback(store.close)
        cache = leaving.enter_context(
            NodeCache(options.cache_dir, size_bytes=options.cache_size, home=options.cache_home)
        )
    context = LoadContext(session, options, stages, store, cache)
    with stages.timed("locate"):
        found = session.channel.decide("locate", None, lambda _: encode(locate(store, first_name)))
        located = decode(Located, found)
    cache.of_checkpoint(store.identity, store.describe(located.name))
    leaving.enter_context(
        JobProgress(
            session.channel.counters,
            rank=session.topology.rank,
            enabled=request.progress_bar and not store.is_local,
        )
    )
    remote = leaving.enter_context(RemoteFiles(_whole_checks(context, located)))
    path = NamedPath(request.path, request.run_name, lambda path: open_store(path, *opening)[1])
    return CheckpointFiles(context, remote, located, path)


def other_ranks_files(request: LoadRequest, files: CheckpointFiles, saved: Saved) -> str | None:
    """A sentence for where the path names a file for each rank, and one of another rank is there that nobody reads.

    So it is where `saved`, the first rank's file, is no part of a set. Every rank must call; rank 0 sends one probe.
    """
    by_rank = template_variables(request.path) & {"rank", "local_rank", "node_rank"}
    if saved.kind != "monolithic" or not by_rank:
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
        f"that is meant, pass {found} as the path; if each rank's file is its own, read it on each rank with "
        "torch.load(path, weights_only=True) and hand its parts to their load_state_dict"
    )


def _is_there(store: Store, name: str) -> bool:
    """Whether there certainly is such an object, and no page; what the store refuses to say is not."""
    try:
        info = Probes(store).look(name)
    except RankloadError:
        return False
    return info is not None and info.certain and not info.is_folder


def _whole_checks(context: LoadContext, located: Located) -> WholeChecks:
    """The checksums that objects fetched whole are compared with; manifests next to the checkpoint are read for them.

    Every rank must call.
    """
    verify = context.options.verify
    if verify == "off":
        return WholeChecks(verify)
    with context.stages.timed("manifest"):
        found = context.session.channel.decide(
            "manifest", None, lambda _: find_manifests(context.store, located)
        )
    return WholeChecks(verify, known_sums(found), tuple(found["notes"]))
