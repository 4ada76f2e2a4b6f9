"""Fetching the parts of remote files that a node's ranks need: each asks, the node's first rank brings them once.

The wanted ranges are known once everything else is: `wanted_reads` tells what a restore reads, `joint_checks` what is
summed beside it, and the files' own directories where that lies. Ranks read a part as soon as it has landed
(`storage_read`), so the restore goes on while the rest is under way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .check import Checked
from .fetch import FetchWatch
from .fetch_one import Tally
from .materialize import Reader
from .opening import Checkpoint, Opening
from .preflight import agree_on_room
from .ranges import ByteRange, union
from .torch_file import FileIndex
from .tree_walk import tensors
from .values import StorageRef
from .verification import Verification
from .weight_sharing import SharedWeights

Wanted = dict[str, list[ByteRange]]
"""Path on this node to the ranges of its file."""

SMALL_BYTES = 64 << 10
"""Storages up to this size come with the index: counters, states of random generators, biases."""


def add_storage(wanted: Wanted, storage: StorageRef, ranges: Iterable[ByteRange]) -> None:
    """Adds `ranges` of `storage`, and its header, to what is wanted of its file."""
    mine = wanted.setdefault(storage.file, [])
    if storage.header >= 0:
        mine.append(ByteRange(storage.header, storage.offset))
    mine.extend(ByteRange(storage.offset + start, storage.offset + stop) for start, stop in ranges)


def add_whole(wanted: Wanted, storages: Iterable[StorageRef]) -> None:
    """Adds all of `storages`."""
    for storage in storages:
        add_storage(wanted, storage, [ByteRange(0, storage.nbytes)])


def small_parts(checkpoint: Checkpoint) -> Wanted:
    """What is read before anything is checked: small storages, random states, and what nobody claims."""
    wanted: Wanted = {}
    for index in checkpoint.indexes:
        add_whole(wanted, (storage for storage in index.storages if storage.nbytes <= SMALL_BYTES))
    contents = checkpoint.contents
    add_whole(wanted, {tensor.storage for _, tensor in tensors([contents.rng, contents.extra])})
    return wanted


def restore_parts(
    checkpoint: Checkpoint, checked: Checked, verification: Verification, weights: SharedWeights | None
) -> Wanted:
    """What the restore and its checksums read of remote files on this rank, at most."""
    wanted: Wanted = {}
    if checkpoint.opening.store.is_local:
        return wanted
    for storage, reads in verification.wanted.items():
        add_storage(wanted, storage, reads.ranges)
    for storage, cells in verification.shares.items():
        add_storage(wanted, storage, cells)
    add_whole(wanted, verification.alone)
    if checked.prepared.algorithms:
        # What is read of the model will be known once they have changed it.
        add_whole(wanted, checkpoint.storages({"state": checked.contents.state}))
    if weights is not None:
        for storage, provided in weights.reads.items():
            add_storage(wanted, storage, provided)
    return wanted


def fetch_now(opening: Opening, wanted: Mapping[str, Sequence[ByteRange]], stage: str) -> None:
    """Brings what is wanted to each node, and waits for it. Every rank must call, whatever it wants."""
    if opening.store.is_local:
        return
    mine = _for_this_node(opening, wanted, stage)
    with opening.watch.stage(stage) as lap:
        if mine:
            lap.bytes += _run(opening, mine)


@contextlib.contextmanager
def fetching(
    checkpoint: Checkpoint, reader: Reader, wanted: Mapping[str, Sequence[ByteRange]], stage: str
) -> Iterator[None]:
    """Around a block that reads what is wanted while it comes; its readers wait for what has not landed.

    Every rank must enter, whatever it wants. What fails to come is raised in the block of the rank that fetches, and
    so on all ranks.
    """
    opening = checkpoint.opening
    if opening.store.is_local:
        yield
        return
    mine = _for_this_node(opening, wanted, stage)
    failure: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            with opening.watch.beside(stage) as lap:
                lap.bytes += _run(opening, mine)
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    def wait() -> None:
        if failure:
            raise failure[0]
        opening.watch.count(0)

    thread = threading.Thread(target=work, name="rankload-fetch", daemon=True)
    reader.waiting(wait)
    if mine:
        thread.start()
    else:
        ended.set()
    try:
        yield
        with opening.watch.stage(f"{stage}: end"):
            while not ended.wait(0.05):
                wait()
            wait()
            for index in checkpoint.indexes:
                index.check_headers(_fetched(index, wanted))
    finally:
        reader.waiting(None)
        if not ended.is_set():
            opening.remote.stop()
            thread.join(10)


def _fetched(index: FileIndex, wanted: Mapping[str, Sequence[ByteRange]]) -> list[StorageRef]:
    """The storages of a file that something was fetched of, and so their headers."""
    starts = {one.start for one in wanted.get(index.path, ())}
    return [storage for storage in index.storages if storage.header in starts]


def bringer(checkpoint: Checkpoint) -> Callable[[Mapping[StorageRef, Sequence[ByteRange]]], None]:
    """What `weight_sharing` calls on all ranks for bytes that may not be here yet."""

    def bring(reads: Mapping[StorageRef, Sequence[ByteRange]]) -> None:
        wanted: Wanted = {}
        for storage, ranges in reads.items():
            add_storage(wanted, storage, ranges)
        fetch_now(checkpoint.opening, wanted, "fetch weights")

    return bring


def _for_this_node(opening: Opening, wanted: Mapping[str, Sequence[ByteRange]], stage: str) -> Wanted:
    """What this rank is to bring: on the rank that fetches for its node, all that the node's ranks want.

    Raises, on all ranks alike, `AccessError` where a node has no room for it.
    """
    session = opening.session
    record = {
        "node": session.topology.node_rank,
        "wanted": {
            path: [edge for one in union(ranges) for edge in one]
            for path, ranges in wanted.items()
            if path in opening.remote
        },
    }

    def deal(told: Sequence[Any]) -> list[Any]:
        nodes = [one["node"] for one in told]
        leaders = {node: nodes.index(node) for node in nodes}
        shares: list[dict[str, list[int]]] = [{} for _ in told]
        for one in told:
            share = shares[leaders[one["node"]]]
            for path, edges in one["wanted"].items():
                share.setdefault(path, []).extend(edges)
        return [
            {path: [edge for one in _paired(edges) for edge in one] for path, edges in share.items()}
            for share in shares
        ]

    dealt = session.channel.deal(f"{stage}: ranges", record, deal)
    mine = {path: list(_paired(edges)) for path, edges in dealt.items()}
    needed = opening.remote.missing_by_folder(mine)
    planned = agree_on_room(session.channel, session.topology.node_rank, opening.cache, needed, stage)
    if session.topology.rank == 0:
        # Known here at once, while what the others count comes with their beats.
        session.channel.progress(bytes_planned=planned)
    return mine


def _paired(edges: Sequence[int]) -> tuple[ByteRange, ...]:
    return union(zip(edges[::2], edges[1::2], strict=True))


def _run(opening: Opening, wanted: Wanted) -> int:
    """Brings `wanted`; the bytes that it took."""
    channel = opening.session.channel
    nbytes = opening.remote.missing_bytes(wanted)
    tally = Tally(channel.counters().get(channel.rank, {}))
    tally.expect("parts", nbytes)
    arrived, *_ = tally.of("parts", opening.remote.stopping)
    watch = FetchWatch(channel, tally)

    def on_bytes(count: int) -> None:
        arrived(count)
        watch.tick()

    report = opening.remote.fetch(wanted, on_bytes)
    tally.settle("parts", report.read_bytes, report.read_bytes)
    watch.tick()
    return report.read_bytes
