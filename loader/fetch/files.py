"""Fetch: each file comes to a node once, whichever ranks need it, and every rank learns where it lies.

Local rank 0 of each node (its lowest rank) works for the node; the others wait in the channel, which follows
its progress. Plain local files are used where they lie; archives and compressed files are unpacked into the
node's cache, once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..cache.node import NodeCache
from ..errors import FormatError, NotFoundError, StalledError
from ..ranges.workers import Stop, run_jobs
from ..stores.base import Store
from ..stores.symlinks import resolve
from .needs import FileNeed, NeedTable, find_lacking, gather_needs, refuse, spoken_ranks
from .remote_files import ObjectPart
from .room_check import agree_on_room
from .whole import Tally, obtain, whole_bytes

if TYPE_CHECKING:
    from ...distributed.channel import Channel
    from ...distributed.topology import Topology
    from .remote_files import RemoteFiles

PARALLEL_FILES = 4
_TUPLES = ("members", "compared_by", "left_out")

__all__ = ["Fetched", "FetchedFile", "FileNeed", "fetch_files"]


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """One file on this node."""

    name: str
    """As it was asked for."""
    source: str
    """The object it came from, after links, without secrets."""
    path: str
    """What to read: the file, decompressed where it was compressed; of an archive, its folder."""
    kind: Literal["file", "archive"]
    size_bytes: int
    """As stored; -1 where the store did not tell and the file was there already."""
    fetched_bytes: int
    """Moved by this node for it: 0 for local files, and where the cache had it."""
    seconds: float
    members: tuple[str, ...] = ()
    """An archive's regular files, relative to `path`."""
    parts: Mapping[str, ObjectPart] = field(default_factory=dict)
    """Where it comes from, if its index alone is there (under ``""``); of an archive, its members of which that is so.
    The rest comes by `fetch_ranges`."""
    compared_by: tuple[str, ...] = ()
    """What all its bytes, as stored, were compared with (`whole_checks`)."""
    left_out: tuple[str, ...] = ()
    """What they could not be compared with."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What one rank asked for, on its node."""

    files: Mapping[str, FetchedFile] = field(default_factory=dict)
    """By the name asked for; an optional one that is not there is left out."""

    @property
    def paths(self) -> dict[str, str]:
        """Local path by name."""
        return {name: file.path for name, file in self.files.items()}

    @property
    def fetched_bytes(self) -> int:
        return sum(file.fetched_bytes for file in self.files.values())


def fetch_files(
    channel: Channel,
    topology: Topology,
    store: Store,
    needs: Sequence[str | FileNeed],
    cache: NodeCache,
    remote: RemoteFiles | None = None,
    *,
    stage: str = "fetch",
) -> Fetched:
    """Makes the objects that this rank needs files on its node. Every rank must call, whatever it needs.

    Of torch files in stores that do ranges, and of those in tars there, only the index comes, and `remote` knows of
    them (by default they come whole). What was put into `cache` lasts until its context ends; end it on all ranks only
    when all have read. An object that was fetched by an earlier call with the same `cache` is not fetched again.

    Raises, on every rank alike: `NotFoundError` naming each file that is missing on any node, the ranks that
    need it, and for local paths which node has it; `AccessError`, `CorruptError`, `UnsafeError`,
    `FormatError` as the store, the cache and the archives do; `StalledError` where nothing arrives for the
    channel's ``stall_timeout_s``.
    """
    table = gather_needs(channel, topology, needs, cache.load_id, stage)
    tally = Tally(channel.counters().get(channel.rank, {}))
    found: dict[str, Any] = {}
    if table.leads:
        _find(store, table.node_needs, found, FetchWatch(channel, tally))
    report = {name: info is not None for name, info in found.items()}
    lacking = channel.decide(f"{stage}: find", report, lambda reports: find_lacking(table, reports))
    if lacking:
        held = {name: store.stat(name) is not None for name in lacking} if table.leads else {}
        channel.decide(f"{stage}: missing", held, lambda reports: refuse(store, table, lacking, reports))

    if not store.is_local:
        needed: dict[str, int] = {}
        if table.leads:
            needed = whole_bytes(store, found.values(), cache, remote, table.load_id)
        agree_on_room(channel, topology.node_rank, cache, needed, stage)
    done: dict[str, Any] = {}
    with channel.stage(stage):
        if table.leads:
            done = _fetch(store, found, cache, remote, table, tally, FetchWatch(channel, tally))
    node = channel.gather(f"{stage}: paths", done if table.leads else None)[table.leader]
    everything = {name: _from_record(record) for name, record in node.items()}
    for file in everything.values():
        # Whoever fetches for the node brings parts of all its files.
        for member, origin in file.parts.items():
            inside = (f"{file.path}/{member}", f"{file.source}:{member}")
            if remote is not None:
                remote.known.note(*(inside if member else (file.path, file.source)), origin)
    mine = [need.name for need in table.own]
    return Fetched({name: everything[name] for name in mine if name in everything})


def _from_record(record: Mapping[str, Any]) -> FetchedFile:
    parts = {member: ObjectPart(**origin) for member, origin in record["parts"].items()}
    return FetchedFile(**{**record, **{each: tuple(record[each]) for each in _TUPLES}, "parts": parts})


def _find(store: Store, names: Sequence[str], found: dict[str, Any], watch: FetchWatch) -> None:
    def job(name: str) -> None:
        resolved = resolve(store, name)
        if resolved is not None and resolved.info.is_folder:
            raise FormatError(
                f"{store.describe(resolved.info.name)}: is a folder, expected a file",
                path=store.describe(resolved.info.name),
            )
        found[name] = None if resolved is None else resolved.info
        watch.tally.moved += 1

    run_jobs([_job(job, name) for name in names], watch.tick, n_threads=PARALLEL_FILES)


def _fetch(
    store: Store,
    found: Mapping[str, Any],
    cache: NodeCache,
    remote: RemoteFiles | None,
    table: NeedTable,
    tally: Tally,
    watch: FetchWatch,
) -> dict[str, Any]:
    files: dict[str, FetchedFile] = {}
    wanted = {name: info for name, info in found.items() if info is not None}
    for name, info in wanted.items():
        if not store.is_local:
            # Of what may come in parts, only the index comes now.
            in_parts = remote is not None and remote.may_come_in_parts(info)
            tally.expect(name, 0 if in_parts else info.size_bytes)

    def job(name: str, stop: Stop) -> None:
        started = time.monotonic()
        info = wanted[name]
        try:
            one = obtain(store, info, cache, remote, table.load_id, tally.of(name, stop))
        except NotFoundError as error:
            raise NotFoundError(
                f"{error.message}; needed by {spoken_ranks(table.ranks_needing[name])}", path=error.path
            ) from error
        tally.settle(name, one.fetched_bytes if one.partial else one.size_bytes, one.fetched_bytes)
        files[name] = FetchedFile(
            name=name,
            source=store.describe(one.object_name),
            path=one.path,
            kind=one.kind,
            size_bytes=one.size_bytes,
            fetched_bytes=one.fetched_bytes,
            seconds=time.monotonic() - started,
            members=one.members,
            parts=one.parts,
            compared_by=one.compared.by,
            left_out=one.compared.left_out,
        )

    # The longest first, so that none of them is alone at the end.
    order = sorted(wanted, key=lambda name: -(wanted[name].size_bytes or 0))
    run_jobs([lambda stop, name=name: job(name, stop) for name in order], watch.tick)  # type: ignore[misc]
    watch.tick()
    return {name: asdict(file) for name, file in files.items()}


class FetchWatch:
    """Tells the channel what moves, learns from it what failed elsewhere, and notices when nothing moves."""

    def __init__(self, channel: Channel, tally: Tally) -> None:
        self.tally = tally
        self._channel = channel
        self._seen = -1
        self._since = time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        if self.tally.moved != self._seen:
            self._seen, self._since = self.tally.moved, now
        elif now - self._since > self._channel.stall_timeout_s:
            where = self.tally.unfinished()
            raise StalledError(
                f"nothing has arrived for {now - self._since:.0f} s: {where}",
                rank=self._channel.rank,
                host=self._channel.host,
            )
        # A stall is told above, so this may be called whether or not something moved: it is how a failure of
        # another rank gets here.
        self._channel.progress(**self.tally.counters())


def _job(work: Any, name: str) -> Any:
    def run(stop: Stop) -> None:
        work(name)

    return run
