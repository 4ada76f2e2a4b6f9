"""Finds what a call was asked for: opens its store and the node's cache, and fetches the first file.

`open_files` does it for a load, which reads a checkpoint of one file or many; `open_own_file` for one file, of which
each rank may have another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..distributed.session import Session
from .cache.node import NodeCache
from .context import LoadContext
from .errors import FormatError, NotFoundError, RankloadError
from .fetch.ahead import ask_all_ahead
from .fetch.checkpoint_files import CheckpointFiles, NamedPath
from .fetch.progress import JobProgress
from .fetch.remote_files import RemoteFiles
from .fetch.whole_checks import WholeChecks
from .request import LoadRequest
from .retries import Outages
from .saved.contents import Saved
from .sources.dcp.open import META
from .sources.zero.file_names import optim_namings
from .stages import Stages
from .stores.base import Store
from .stores.http import HttpStore
from .stores.locate import (
    DCP_METADATA,
    DCP_PLACES,
    LATEST,
    MODEL_STATES,
    RANK_FILE,
    AskAhead,
    Located,
    locate,
    looks_like_file,
)
from .stores.manifest import NAMES, Looked, find_manifests, known_sums, look_for_manifests
from .stores.names import file_name, folder_of, without_slash
from .stores.open import open_store
from .stores.probes import AT_ONCE, Probes, ask_each
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
    needed_with = partial(_needed_with, weights_only=request.weights_only)

    def search(_: object) -> dict[str, Any]:
        found: dict[str, Any] = encode(_search(context, first_name, locate, needed_with))
        return found

    with stages.timed("locate"):
        found = session.channel.decide("locate", None, search)
    return _files(request, context, path, decode(_Found, found), leaving)


def open_own_file(
    request: LoadRequest, session: Session, stages: Stages, leaving: contextlib.ExitStack
) -> CheckpointFiles:
    """Fetches the one file that `request` names on this rank; ranks of a node that name the same share it.

    Every rank must call. Raises, on all ranks alike, as `open_files`, and `FormatError` where the path names a
    checkpoint's folder.
    """
    context, path, first_name = _open(request, session, stages, leaving)
    with stages.timed("locate"):
        told = session.channel.decide(
            "locate", None, lambda _: encode(_search(context, first_name, _one_file))
        )
        found = decode(_Found, told)
    if not _differs_by_rank(request):
        return _files(request, context, path, found, leaving)
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
        return _files(request, context, path, found, leaving, own=Located("file", name, name))
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


@dataclass(frozen=True)
class _Found:
    """What rank 0 found, for all ranks."""

    located: Located
    sums: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Those that `find_manifests` found next to it; none where nothing is compared."""
    notes: tuple[str, ...] = ()
    """Its notes."""


def _needed_with(store: Store, names: Sequence[str], *, weights_only: bool) -> list[str]:
    """Objects in the folder of `names` that are read next, where those are there."""
    folder, own = folder_of(names[0]), {file_name(name) for name in names}
    if own & set(MODEL_STATES):
        return [store.join(folder, naming.name(0)) for naming in optim_namings()]
    return [store.join(folder, META)] if DCP_METADATA in own and not weights_only else []


def _search(
    context: LoadContext,
    name: str,
    find: Callable[[Store, str, AskAhead], Located],
    needed_with: Callable[[Store, Sequence[str]], list[str]] = lambda store, names: [],
) -> _Found:
    """What `find` finds, such as `locate`, and the manifests next to it, which are looked for at the same time.

    Once the store has answered, what is `needed_with` the names that `find` asks for is asked for with them. One rank
    calls it, for all. Raises as `find`, and as `find_manifests`.
    """
    store = context.store
    required = context.options.asks_for_checksums
    looked: list[Looked] = []
    located: list[Located] = []

    compares = context.options.verify != "off"

    has_answered = False

    def ahead(names: Sequence[str]) -> None:
        """With what lies in a tag's folder, its manifests are looked for."""
        nonlocal has_answered
        folder = folder_of(names[0])
        works: list[Callable[[], None]] = []
        if has_answered:
            # By now there are connections, so that all of them can be asked for at once.
            more = needed_with(store, names)
            works.append(partial(ask_all_ahead, context, names, at_once=len(names)))
            works.append(partial(ask_all_ahead, context, more, beginning_only=True, at_once=len(more)))
        else:
            works.append(partial(ask_all_ahead, context, names))
            if not isinstance(store, HttpStore) and LATEST in map(file_name, names):
                # Of servers that may have a small backlog, no more is asked at first.
                works.append(partial(ask_all_ahead, context, [store.join(folder, one) for one in DCP_PLACES]))
        has_answered = True
        if compares and not store.is_local and folder not in (without_slash(name), folder_of(name)):
            works.append(partial(look, folder, is_file=False, at_once=len(NAMES)))
        _at_once(store, works)

    def find_it() -> None:
        located.append(find(store, name, ahead))

    def look(name: str, *, is_file: bool, at_once: int = AT_ONCE) -> None:
        looked.append(look_for_manifests(store, name, is_file=is_file, required=required, at_once=at_once))

    if not compares:
        find_it()
        return _Found(located[0])
    if store.is_local:
        find_it()
    else:
        _at_once(store, [find_it, partial(look, name, is_file=looks_like_file(name))])
    manifests = find_manifests(store, located[0], required=required, looked=looked)
    return _Found(located[0], manifests["sums"], tuple(manifests["notes"]))


def _at_once(store: Store, works: Sequence[Callable[[], None]]) -> None:
    ask_each(store, lambda work: work(), works)


def _one_file(store: Store, name: str, ahead: AskAhead) -> Located:
    """The file that `name` names. Raises as `locate`, and `FormatError` where it names a checkpoint's folder."""
    located = locate(store, name, ahead)
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
    found: _Found,
    leaving: contextlib.ExitStack,
    *,
    own: Located | None = None,
) -> CheckpointFiles:
    """Fetches the first file, which was `found` for all ranks, or for each its `own`. Every rank must call."""
    session, store, located = context.session, context.store, found.located
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
    remote = leaving.enter_context(
        RemoteFiles(_whole_checks(context, found, own), renew_indexes=request.renew_indexes)
    )
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


def _whole_checks(context: LoadContext, found: _Found, own: Located | None) -> WholeChecks:
    """The checksums that objects fetched whole are compared with: those of the manifests that were `found`.

    Where each rank has a file of its `own`, each looks for that file's manifest too. Every rank must call.
    """
    verify, channel = context.options.verify, context.session.channel
    if verify == "off":
        return WholeChecks(verify)
    known, notes = known_sums({"sums": found.sums}), list(found.notes)
    if own is not None:
        required = context.options.asks_for_checksums
        with context.stages.announced("manifests"):
            beside = find_manifests(context.store, own, only_beside=True, required=required)
        for each in channel.gather("manifests", beside):
            known.update(known_sums(each))
            notes.extend(each["notes"])
    return WholeChecks(verify, known, tuple(dict.fromkeys(notes)))
