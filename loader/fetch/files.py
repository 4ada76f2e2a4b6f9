"""Makes the objects that ranks need files on every node, each fetched once, and gives all ranks their paths.

The leader of each node, its lowest rank, fetches for it in a few threads; the other ranks wait in the channel, which
follows the leader's progress. Plain local files are used where they lie; archives and compressed files are unpacked
into the node's cache, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..byte_ranges import ByteRange
from ..context import LoadContext
from ..errors import FormatError, NotFoundError
from ..plurals import ranks_text
from ..saved.node_file import NodeFile
from ..stores.base import ObjectInfo, Store
from ..stores.symlinks import resolve
from ..wire import decode, encode
from ..workers import Stop, run_jobs
from .ahead import ask_ahead
from .needs import FileNeed, NeedTable, find_lacking, gather_needs, raise_lacking, same_needs
from .object_cache import ObjectCache
from .remote_files import ObjectPart
from .space_check import agree_on_room
from .tally import FetchWatch, Tally
from .whole import obtain, whole_bytes

if TYPE_CHECKING:
    from ...distributed.channel import Channel
    from .remote_files import RemoteFiles

_FIND_AT_ONCE = 32
"""How many files are asked for at once, all of which should be there."""

__all__ = ["Fetched", "FetchedFile", "FileNeed", "fetch_files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedFile(NodeFile):
    """One file on this node, and how it came there."""

    size_bytes: int
    """As stored; -1 where the store did not state it and the file was there already."""
    fetched_bytes: int
    """Fetched by this node for it: 0 for local files, and where the cache had it."""
    parts: Mapping[str, ObjectPart] = field(default_factory=dict)
    """The object that the rest is fetched from, where only the index is there: under ``""``, or of an archive under
    the names of those members. `fetch.parts` fetches the rest."""
    compared_by: tuple[str, ...] = ()
    """The checksums that all its bytes, as stored, were compared with (`whole_checks`)."""
    left_out: tuple[str, ...] = ()
    """The checksums that they could not be compared with."""
    whole: ObjectPart | None = None
    """The remote object that it is, or was made of, where it came whole."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """The files that one rank asked for, on its node."""

    files: Mapping[str, FetchedFile]
    """By the name asked for; an optional file that does not exist is absent."""
    table: NeedTable
    """What all ranks asked for."""

    @property
    def paths(self) -> dict[str, str]:
        """Each file's local path, by name."""
        return {name: file.path for name, file in self.files.items()}

    @property
    def fetched_bytes(self) -> int:
        """The bytes that this node fetched for all of them."""
        return sum(file.fetched_bytes for file in self.files.values())


def fetch_files(
    context: LoadContext,
    needs: Sequence[str | FileNeed],
    remote: RemoteFiles | None = None,
    *,
    stage: str = "fetch",
    same_as: NeedTable | None = None,
    parts: Mapping[str, Sequence[ByteRange]] | None = None,
    soon: Sequence[str] = (),
) -> Fetched:
    """Makes the objects that this rank needs files on its node. Every rank must call, whatever it needs.

    With `same_as`, the table of an earlier call, all ranks need the same files, and do not ask each other. What is
    wanted of them next, `parts`, comes along where that saves an answer; and the store is asked at the same time for
    what this rank will ask it for `soon`.

    With `remote`, only the index is fetched of torch files and safetensors files in stores that do ranges, and of large
    torch files in tars there; `remote` knows them afterwards. Without it they come whole. Files in the node's cache
    last until its context ends: end it only when all ranks have read them. What an earlier call with the same cache
    fetched is not fetched again.

    Raises, on every rank alike: `NotFoundError` that names each file that is missing on any node, the ranks that need
    it, and for local paths the nodes that have it; `AccessError` also where a node lacks room; `CorruptError`,
    `UnsafeError` and `FormatError` as the store, the cache and the archives do; `StalledError` where nothing arrives
    for the channel's ``stall_timeout_s``.
    """
    topology, channel = context.session.topology, context.session.channel
    if same_as is None:
        table = gather_needs(channel, topology, needs, context.cache.load_id, stage)
    else:
        table = same_needs(same_as, needs)
    if remote is not None:
        remote.known.load_id = table.load_id
    objects = ObjectCache(context.store, context.cache, table.load_id)
    store = objects.store
    tally = Tally(channel.counters().get(channel.rank, {}))
    found: dict[str, ObjectInfo | None] = {}
    with channel.announced(f"{stage}: find"):
        if table.leads:
            ahead = None if remote is None else partial(_ask_ahead, context, parts or {})
            _find(store, table.node_needs, found, FetchWatch(channel, tally), ahead, soon)
    report = {name: info is not None for name, info in found.items()}
    if not store.is_local:
        # Nothing is fetched unless all of it is there, and has room.
        lacking = channel.decide(f"{stage}: find", report, lambda reports: find_lacking(table, reports))
        _refuse(lacking, store, table, channel, stage)
        needed = whole_bytes(objects, found.values(), remote) if table.leads else {}
        agree_on_room(channel, topology.node_rank, context.cache, needed, stage)
    done: dict[str, FetchedFile] = {}
    with channel.announced(stage):
        if table.leads:
            done = _fetch(objects, found, remote, table, FetchWatch(channel, tally))
    told = channel.gather(f"{stage}: paths", [report, encode(done) if table.leads else None])
    if store.is_local:
        _refuse(find_lacking(table, [reported for reported, _ in told]), store, table, channel, stage)
    everything = decode(dict[str, FetchedFile], told[table.leader][1])
    for file in everything.values():
        # Also files that this rank did not ask for: the leader fetches parts of all the files of its node.
        for member, part in file.parts.items():
            inside = (f"{file.path}/{member}", f"{file.source}:{member}")
            if remote is not None:
                remote.known.note(*(inside if member else (file.path, file.source)), part)
        if remote is not None and file.whole is not None:
            remote.known.note_whole(file.path, file.source, file.whole)
    mine = [need.name for need in table.own]
    own = {name: everything[name] for name in mine if name in everything}
    # A leader that ends, of this node or of another one with the same folder, must not take them from this rank.
    context.cache.join(file.path for file in own.values() if file.kind == "archive" or not store.is_local)
    return Fetched(own, table)


def _refuse(
    lacking: Mapping[str, Sequence[int]], store: Store, table: NeedTable, channel: Channel, stage: str
) -> None:
    """Raises as `raise_lacking`, on all ranks, where there is something `lacking`, the same on all. All must call."""
    if lacking:
        held = {name: store.stat(name) is not None for name in lacking} if table.leads else {}
        channel.decide(
            f"{stage}: missing", held, lambda reports: raise_lacking(store, table, lacking, reports)
        )


def _find(
    store: Store,
    names: Sequence[str],
    found: dict[str, ObjectInfo | None],
    watch: FetchWatch,
    ahead: Callable[[str], None] | None,
    soon: Sequence[str],
) -> None:
    def job(name: str) -> None:
        if ahead is not None:
            ahead(name)
        resolved = resolve(store, name)
        if resolved is not None and resolved.info.is_folder:
            raise FormatError(
                f"{store.describe(resolved.info.name)}: is a folder, expected a file",
                path=store.describe(resolved.info.name),
            )
        found[name] = None if resolved is None else resolved.info
        watch.tally.moved += 1

    jobs = [_job(job, name) for name in names]
    if ahead is not None:
        jobs += [_job(ahead, name) for name in soon if name not in names]
    run_jobs(jobs, watch.tick, n_threads=_FIND_AT_ONCE)


def _ask_ahead(context: LoadContext, parts: Mapping[str, Sequence[ByteRange]], name: str) -> None:
    ask_ahead(context, name, parts=parts.get(name, ()))


def _job(work: Any, name: str) -> Any:
    def run(stop: Stop) -> None:
        work(name)

    return run


def _fetch(
    objects: ObjectCache,
    found: Mapping[str, ObjectInfo | None],
    remote: RemoteFiles | None,
    table: NeedTable,
    watch: FetchWatch,
) -> dict[str, FetchedFile]:
    store, tally = objects.store, watch.tally
    files: dict[str, FetchedFile] = {}
    wanted = {name: info for name, info in found.items() if info is not None}
    for name, info in wanted.items():
        if not store.is_local:
            # Of what may come in parts, only the index comes now.
            in_parts = remote is not None and remote.may_come_in_parts(info)
            tally.expect(name, 0 if in_parts else info.size_bytes)

    def job(name: str, stop: Stop) -> None:
        info = wanted[name]
        try:
            one = obtain(objects, info, remote, tally.of(name, stop))
        except NotFoundError as error:
            raise NotFoundError(
                f"{error.message}; needed by {ranks_text(table.ranks_needing[name])}", path=error.path
            ) from error
        tally.settle(name, one.fetched_bytes if one.partial else one.size_bytes, one.fetched_bytes)
        files[name] = FetchedFile(
            name=name,
            source=store.describe(one.object_name),
            path=one.path,
            kind=one.kind,
            size_bytes=one.size_bytes,
            fetched_bytes=one.fetched_bytes,
            members=one.members,
            modified_s=os.stat(one.path).st_mtime if store.is_local and one.kind == "file" else None,
            parts=one.parts,
            compared_by=one.compared.by,
            left_out=one.compared.left_out,
            whole=one.whole,
        )

    # The largest first, so that no thread is left with a large file at the end.
    order = sorted(wanted, key=lambda name: -(wanted[name].size_bytes or 0))
    run_jobs([lambda stop, name=name: job(name, stop) for name in order], watch.tick)  # type: ignore[misc]
    watch.tick()
    return files
