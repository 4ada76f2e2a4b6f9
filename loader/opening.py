"""Finds the checkpoint that a load was asked for: opens its store and the node's cache, and fetches its first file."""

from __future__ import annotations

import contextlib

from ..distributed.session import Session
from .cache.node import NodeCache
from .context import LoadContext
from .fetch.checkpoint_files import CheckpointFiles, NamedPath
from .fetch.progress import JobProgress
from .fetch.remote_files import RemoteFiles
from .fetch.whole_checks import WholeChecks
from .request import LoadRequest
from .stages import Stages
from .stores.locate import Located, locate
from .stores.manifest import find_manifests, known_sums
from .stores.open import open_store
from .template import expand_for_rank_zero
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
