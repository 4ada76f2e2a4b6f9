"""Plans a load without the job that will do it: `plan_load` gives what each node and rank would fetch, read and keep.

Nothing is fetched but the checkpoint's indexes, and what its store can only give whole. Imports no torch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..alone import OUTLINE, OpenCheckpoint, open_alone
from ..byte_ranges import ByteRange, overlap, subtract, total_bytes, union
from ..cache.folder import make_private_folder
from ..cache.holes import Landed
from ..errors import OptionError
from ..fetch.ahead import OF_ITEMS
from ..fetch.checkpoint_files import CheckpointFiles
from ..fetch.files import FetchedFile
from ..fetch.plan import FetchPlan
from ..fetch.rounds import WantedRanges
from ..fetch.wanted import early_parts
from ..materialize.staging import STAGING_BYTES
from ..options import LoadOptions, Options, resolve_options
from ..ranges.concurrency import MOST
from ..ranges.destinations import BUFFER_BYTES
from ..saved.contents import Saved
from ..sources.kinds import open_saved
from .jobs import TARGETS, Job, TargetName, job_of, likeliest_target
from .nodes import Dealt, RankReads, deal, fetches, rank_reads
from .recording import RankFiles
from .restores import Restore, Slice, restore_of


@dataclass(frozen=True)
class FileRead:
    """What one node gets of one file, in bytes."""

    file: str
    """What messages call it."""
    size_bytes: int
    """Of the whole file; -1 where it is not known."""
    fetched_bytes: int
    """From the store; of a local file, what is read of its tensors in place."""
    from_nodes_bytes: int = 0
    """From other nodes (``mode="job"``)."""
    ranges: tuple[ByteRange, ...] = ()
    """The ranges that are fetched or read after the index; () of a file that comes whole."""


@dataclass(frozen=True)
class RankPlan:
    """What one rank does."""

    rank: int
    node: int
    read_bytes: int
    """That it restores or sums; its node fetches them, or it does so itself."""
    direct_bytes: int
    """Those that it fetches into its own memory."""
    weights_bytes: int
    """Of weights and fp32 masters that it keeps."""
    optimizer_bytes: int
    """Of the optimizer's state that it keeps."""
    staging_bytes: int
    """What the load needs in memory besides, at most: buffers, and on the first rank of a node those of its
    connections."""
    slices: tuple[Slice, ...] = ()
    """What it keeps, of the rank that was asked about."""


@dataclass(frozen=True)
class NodePlan:
    """What one node does."""

    node: int
    ranks: tuple[int, ...]
    files: tuple[FileRead, ...]
    cache_bytes: int
    """What its cache takes at most: what is fetched, and twice as much of an archive that comes whole."""
    shared_bytes: int
    """Of the memory in which its ranks share weights while they are restored."""
    memory_bytes: int
    """What its ranks keep and the load needs besides, at most. The cache adds to it where that is in memory."""

    @property
    def fetched_bytes(self) -> int:
        return sum(one.fetched_bytes for one in self.files)

    @property
    def from_nodes_bytes(self) -> int:
        return sum(one.from_nodes_bytes for one in self.files)


@dataclass(frozen=True)
class LoadPlan:
    """What a load of a job would do."""

    name: str
    """What messages call the checkpoint."""
    kind: str
    layout: str
    target: TargetName
    world_size: int
    saved_world_size: int | None
    local: bool
    """Whether its files are read in place, so that nothing is fetched."""
    mode: str
    verify: str
    nodes: tuple[NodePlan, ...]
    ranks: tuple[RankPlan, ...]

    @property
    def fetched_bytes(self) -> int:
        """Of all nodes; of local files, what is read of them."""
        return sum(one.fetched_bytes for one in self.nodes)

    @property
    def by_file(self) -> dict[str, int]:
        """`fetched_bytes` by file."""
        found: dict[str, int] = {}
        for node in self.nodes:
            for one in node.files:
                found[one.file] = found.get(one.file, 0) + one.fetched_bytes
        return found


def plan_load(
    path: str | os.PathLike[str],
    *,
    world_size: int,
    n_nodes: int = 1,
    target: TargetName | None = None,
    rank: int | None = None,
    object_store: Any = None,
    options: Options | LoadOptions | Mapping[str, Any] | None = None,
) -> LoadPlan:
    """What a full load of the checkpoint at `path` does in a job of `world_size` ranks, as many on each node.

    Args:
        path: as `load` takes it.
        world_size: ranks of the job.
        n_nodes: nodes that they are on.
        target: what the job restores into (`jobs`); None: what the job that saved it would.
        rank: the rank whose slices are listed; None: of none.
        object_store: as `load` takes it.
        options: `LoadOptions`, or a mapping of its fields; ``mode`` and ``verify`` count.

    Raises:
        RankloadError: as a load would: `LayoutError` where the checkpoint cannot be restored into such a job. An
            `OptionError` where the ranks cannot be spread evenly.
    """
    _check(world_size, n_nodes, target, rank)
    resolved = options if isinstance(options, Options) else resolve_options(options)
    nodes = [each // (world_size // n_nodes) for each in range(world_size)]
    if resolved.cache_dir is not None and not os.path.lexists(resolved.cache_dir):
        make_private_folder(resolved.cache_dir)
    with tempfile.TemporaryDirectory(prefix="rankload-plan-", dir=resolved.cache_dir) as folder:
        # Not the node's own cache: what it has already would not be planned, and indexes alone are of no use there.
        own = replace(resolved, cache_dir=folder, cache_size=0)
        with open_alone(path, OUTLINE, object_store=object_store, options=own) as opened:
            files = opened.files
            job = job_of(opened.saved, target or likeliest_target(opened.saved), world_size)
            seen = _Seen(files)
            ranks: list[RankReads] = []
            plans: list[RankPlan] = []
            asked: list[frozenset[str]] = []
            for each in range(world_size):
                restore, reads, needed = _of_rank(files, job, each, seen)
                ranks.append(reads)
                asked.append(needed)
                plans.append(
                    RankPlan(
                        each,
                        nodes[each],
                        0,
                        0,
                        restore.kept_bytes("weights", "masters"),
                        restore.kept_bytes("optimizer"),
                        _staging_bytes(each, nodes, local=files.context.store.is_local),
                        tuple(restore.slices) if each == rank else (),
                    )
                )
            dealt = deal(ranks, nodes, files.name_at, verify=resolved.verify, direct=files.context.direct)
            return _plan(opened.saved, files, job.target, resolved, nodes, seen, asked, ranks, dealt, plans)


def node_ranges(
    opened: OpenCheckpoint, *, world_size: int, n_nodes: int, node: int, target: TargetName
) -> WantedRanges:
    """The ranges of remote files, by path, that the ranks of one node restore in a job as `plan_load` describes it.

    Their indexes, and files that come whole, are fetched to this node. What ranks sum for others is left out. Raises as
    `plan_load`.
    """
    _check(world_size, n_nodes, target, None)
    if not 0 <= node < n_nodes:
        raise OptionError(f"node_rank={node}: expected one of 0 to {n_nodes - 1}")
    files = opened.files
    job = job_of(opened.saved, target, world_size)
    seen = _Seen(files)
    each_node = world_size // n_nodes
    own = [_of_rank(files, job, each, seen)[1] for each in range(node * each_node, (node + 1) * each_node)]
    dealt = deal(own, [node] * len(own), files.name_at, verify="off", direct=False)
    wanted: WantedRanges = {}
    for early in (one.early for one in own):
        _add(wanted, early)
    for parts in dealt.restores:
        _add(wanted, parts.wanted)
    return {path: ranges for path, ranges in wanted.items() if path in files.remote.known}


def _of_rank(
    files: CheckpointFiles, job: Job, rank: int, seen: _Seen
) -> tuple[Restore, RankReads, frozenset[str]]:
    """What one rank restores, what it wants of files for that, and the paths of the files that its node needs."""
    recorder = RankFiles(files)
    saved = open_saved(recorder, job.demand(rank))
    seen.note()
    restore = restore_of(job, rank, saved)
    early = seen.index_ranges(recorder)
    if not files.context.store.is_local:
        _add(early, early_parts(saved))
    model = saved.state.get("model")
    held = model if isinstance(model, Mapping) else {}
    reads = rank_reads(restore, early, held, saved.name, files.name_at)
    return restore, reads, frozenset(recorder.asked)


def _check(world_size: int, n_nodes: int, target: str | None, rank: int | None) -> None:
    if target is not None and target not in TARGETS:
        raise OptionError(f"target={target!r}: expected one of {', '.join(TARGETS)}")
    if world_size < 1 or n_nodes < 1 or world_size % n_nodes:
        raise OptionError(
            f"world_size={world_size} with {n_nodes} nodes: expected as many ranks on each node, and one at least"
        )
    if rank is not None and not 0 <= rank < world_size:
        raise OptionError(f"rank={rank}: expected one of 0 to {world_size - 1}")


def _staging_bytes(rank: int, nodes: Sequence[int], *, local: bool) -> int:
    leads = rank == nodes.index(nodes[rank])
    return STAGING_BYTES + (MOST * BUFFER_BYTES if leads and not local else 0)


def _add(wanted: WantedRanges, more: WantedRanges) -> None:
    for path, ranges in more.items():
        wanted.setdefault(path, []).extend(ranges)


class _Seen:
    """The files that any rank has asked for, and what comes with the index of each."""

    def __init__(self, files: CheckpointFiles) -> None:
        self._files = files
        self.files: dict[str, FetchedFile] = {}
        """By local path."""
        self.landed: dict[str, tuple[ByteRange, ...]] = {}
        """Of files that come in parts, and of archives' members, what their index brought."""
        self._sizes: dict[str, int] = {}
        self.note()

    def note(self) -> None:
        """Notes what one more rank has asked for."""
        for file in self._files.fetched:
            self.files.setdefault(file.path, file)
        for path, size in self._files.remote.known.sizes.items():
            if path not in self.landed:
                self._sizes[path] = size
                # Of files of items, what is here are items of which several ranks may have asked for others.
                self.landed[path] = () if path.endswith(OF_ITEMS) else _landed(path, size)

    def index_ranges(self, recorder: RankFiles) -> WantedRanges:
        """The ranges that one rank's indexes are in, of files that come in parts and are no index by themselves."""
        known = self._files.remote.known
        found: WantedRanges = {}
        for item in recorder.items_read:
            if item.file.path in known:
                found.setdefault(item.file.path, []).append(ByteRange(item.span.start, item.span.stop))
        return {path: list(overlap(items, _landed(path, self._sizes[path]))) for path, items in found.items()}


def _landed(path: str, size: int) -> tuple[ByteRange, ...]:
    whole = [ByteRange(0, size)]
    return subtract(whole, Landed(path).missing(whole))


def _plan(
    outline: Saved,
    files: CheckpointFiles,
    target: TargetName,
    options: Options,
    nodes: Sequence[int],
    seen: _Seen,
    asked: Sequence[frozenset[str]],
    ranks: Sequence[RankReads],
    dealt: Dealt,
    plans: Sequence[RankPlan],
) -> LoadPlan:
    local = files.context.store.is_local
    early = [_left(one.early, seen, files) for one in ranks]
    read = [sum(map(total_bytes, one.wanted.values())) for one in dealt.restores]
    for one in dealt.restores:
        one.wanted, one.direct = _left(one.wanted, seen, files), _left(one.direct, seen, files)
    fetched = fetches(early, dealt.restores, nodes, files.name_at, "node" if local else options.mode)
    made = []
    for node in dict.fromkeys(nodes):
        own = [each for each, at in enumerate(nodes) if at == node]
        needed = frozenset(path for each in own for path in asked[each])
        reads = tuple(_file_reads(files, seen, needed, [fetched[each] for each in own], local=local))
        shared = max(dealt.images[each] for each in own)
        kept = sum(
            plans[each].weights_bytes + plans[each].optimizer_bytes + plans[each].staging_bytes
            for each in own
        )
        made.append(
            NodePlan(
                node,
                tuple(own),
                reads,
                _cache_bytes(reads, seen, needed, fetched, own, local=local),
                shared,
                kept + shared,
            )
        )
    return LoadPlan(
        outline.name,
        outline.kind,
        outline.layout,
        target,
        len(nodes),
        outline.world_size,
        local,
        options.mode,
        options.verify,
        tuple(made),
        tuple(
            replace(
                one,
                read_bytes=read[each],
                direct_bytes=sum(map(total_bytes, fetched[each].direct.values())),
            )
            for each, one in enumerate(plans)
        ),
    )


def _left(wanted: WantedRanges, seen: _Seen, files: CheckpointFiles) -> WantedRanges:
    """The ranges of files that are still to be fetched or read once their indexes are here."""
    known, local = files.remote.known, files.context.store.is_local
    unpacked = os.path.join(files.context.cache.folder, "")
    return {
        path: list(subtract(ranges, seen.landed.get(path, ())))
        for path, ranges in wanted.items()
        if (not path.startswith(unpacked) if local else path in known)
    }


def _file_reads(
    files: CheckpointFiles,
    seen: _Seen,
    needed: frozenset[str],
    fetched: Sequence[FetchPlan],
    *,
    local: bool,
) -> Iterator[FileRead]:
    names: dict[str, list[str]] = {}
    for path in (*seen.landed, *(path for path in needed if local)):
        owner = path
        while owner not in needed and owner != os.path.dirname(owner):
            owner = os.path.dirname(owner)  # of an archive's member, the folder that stands for the archive
        if owner in needed:
            names.setdefault(owner, []).append(files.name_at(path))
    for path in sorted(needed, key=lambda one: seen.files[one].source):
        file = seen.files[path]
        brought: list[ByteRange] = []
        count = taken = 0
        for name in dict.fromkeys(names.get(path, ())):
            own = union(
                *(each.get(name, ()) for one in fetched for each in (one.bring, one.direct, one.along))
            )
            count += total_bytes(own)
            taken += sum(total_bytes(ranges.get(name, ())) for one in fetched for ranges in one.take.values())
            brought += own
        # A local archive is unpacked whole.
        index = (file.size_bytes if file.kind == "archive" else 0) if local else file.fetched_bytes
        yield FileRead(file.source, file.size_bytes, index + count, taken, tuple(brought))


def _cache_bytes(
    reads: Sequence[FileRead],
    seen: _Seen,
    needed: frozenset[str],
    fetched: Sequence[FetchPlan],
    own: Sequence[int],
    *,
    local: bool,
) -> int:
    unpacked = sum(
        max(0, file.size_bytes)
        for path, file in seen.files.items()
        if path in needed and file.kind == "archive" and not file.parts
    )
    if local:
        return unpacked
    direct = sum(total_bytes(ranges) for each in own for ranges in fetched[each].direct.values())
    return sum(one.fetched_bytes + one.from_nodes_bytes for one in reads) - direct + unpacked
