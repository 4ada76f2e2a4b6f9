"""Fetching the parts of remote files that a node's ranks need: each asks, the node's first rank brings them once.

The wanted ranges are known once everything else is: `wanted_reads` tells what a restore reads, `joint_checks` what is
summed beside it, and the files' own directories where that lies. Ranks read a part as soon as it has landed
(`storage_read`), so the restore goes on while the rest is under way. `fetch_plan` tells whose errand what is,
`fetch_bring` runs it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ..byte_ranges import ByteRange, subtract
from ..cache.holes import Landed
from ..check import Checked
from ..checkpoint import Checkpoint, Opening
from ..formats.torch_file import FileIndex
from ..materialize.tensors import TensorReader
from ..ranges.direct import DirectReads
from ..saved.tree import tensors
from ..saved.values import StorageRef
from ..verify.checks import Verification
from ..verify.weights import SharedWeights
from .rounds import Parts, WantedRanges, plan_round

SMALL_STORAGE_BYTES = 64 << 10
"""Storages up to this size come with the index: counters, states of random generators, biases."""


def add_storage(wanted: WantedRanges, storage: StorageRef, ranges: Iterable[ByteRange]) -> None:
    """Adds `ranges` of `storage`, and its header, to what is wanted of its file."""
    mine = wanted.setdefault(storage.file, [])
    if storage.header >= 0:
        mine.append(ByteRange(storage.header, storage.offset))
    mine.extend(ByteRange(storage.offset + start, storage.offset + stop) for start, stop in ranges)


def add_whole(wanted: WantedRanges, storages: Iterable[StorageRef]) -> None:
    """Adds all of `storages`."""
    for storage in storages:
        add_storage(wanted, storage, [ByteRange(0, storage.nbytes)])


def small_parts(checkpoint: Checkpoint) -> WantedRanges:
    """What is read before anything is checked: small storages, random states, and what nobody claims."""
    wanted: WantedRanges = {}
    for index in checkpoint.indexes:
        add_whole(wanted, (storage for storage in index.storages if storage.nbytes <= SMALL_STORAGE_BYTES))
    contents = checkpoint.contents
    add_whole(wanted, {tensor.storage for _, tensor in tensors([contents.rng, contents.extra])})
    return wanted


def restore_parts(
    checkpoint: Checkpoint, checked: Checked, verification: Verification, weights: SharedWeights | None
) -> Parts:
    """What the restore and its checksums read of remote files on this rank, at most."""
    parts = Parts()
    if checkpoint.opening.store.is_local:
        return parts
    wanted = parts.wanted
    for storage, reads in verification.wanted.items():
        add_storage(wanted, storage, reads.ranges)
    for storage, cells in verification.shares.items():
        add_storage(wanted, storage, cells)
    add_whole(wanted, verification.alone)
    if weights is not None:
        for storage, provided in weights.reads.items():
            add_storage(wanted, storage, provided)
    if checked.prepared.algorithms:
        # What is read of the model will be known once they have changed it.
        add_whole(wanted, checkpoint.storages({"state": checked.contents.state}))
    elif checkpoint.opening.direct:
        _add_direct(parts.direct, verification, weights)
        for path, ranges in parts.direct.items():
            if path in checkpoint.opening.remote.known:
                # What came with the index, or was there before this load, is not fetched again.
                parts.direct[path] = list(Landed(path).missing(ranges))
    return parts


def _add_direct(direct: WantedRanges, verification: Verification, weights: SharedWeights | None) -> None:
    alone = set(verification.alone)
    for storage, reads in verification.wanted.items():
        if storage in alone or storage.nbytes <= SMALL_STORAGE_BYTES:
            continue
        # What is only summed has no memory of its own to go to.
        summed = subtract(verification.shares.get(storage, ()), reads.ranges)
        spans = subtract(reads.direct, summed)
        if spans:
            add_storage(direct, storage, spans)
    if weights is not None:
        for storage, provided in weights.reads.items():
            add_storage(direct, storage, provided)


def fetch_now(opening: Opening, wanted: Mapping[str, Sequence[ByteRange]], stage: str) -> None:
    """Brings what is wanted to each node, and waits for it. Every rank must call, whatever it wants."""
    if opening.store.is_local:
        return
    fetch_round = plan_round(opening, Parts({path: list(ranges) for path, ranges in wanted.items()}), stage)
    with opening.watch.stage(stage) as lap:
        if fetch_round:
            lap.bytes += fetch_round.run()


@contextlib.contextmanager
def fetching(checkpoint: Checkpoint, reader: TensorReader, parts: Parts, stage: str) -> Iterator[None]:
    """Around a block that reads what is wanted while it comes; its readers wait for what has not landed.

    Every rank must enter, whatever it wants. What fails to come is raised in the block of the rank that fetches, and
    so on all ranks.
    """
    opening = checkpoint.opening
    if opening.store.is_local:
        yield
        return
    fetch_round = plan_round(opening, parts, stage)
    failure: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            with opening.watch.beside(stage) as lap:
                lap.bytes += fetch_round.run()
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    def wait() -> None:
        if failure:
            raise failure[0]
        opening.watch.count(0)

    thread = threading.Thread(target=work, name="rankload-fetch", daemon=True)
    reader.waiting(wait, parts.wanted)
    reader.reading_direct(fetch_round.direct)
    if fetch_round:
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
                _check_headers(index, parts.wanted, fetch_round.direct, reader)
    finally:
        reader.waiting(None, {})
        reader.reading_direct(None)
        opening.remote.known.add_fetched(fetch_round.direct.fetched_bytes)
        if not ended.is_set():
            opening.remote.stop()
            thread.join(10)


def _check_headers(
    index: FileIndex, wanted: Mapping[str, Sequence[ByteRange]], direct: DirectReads, reader: TensorReader
) -> None:
    """Compares the headers of the storages that something was fetched of, wherever it went."""
    starts = {one.start for one in wanted.get(index.path, ())}
    for storage in index.storages:
        if storage.header not in starts:
            continue
        if direct.of(index.path, storage.header, storage.offset):
            kept = direct.header(index.path, storage.header)
            if kept is not None:
                index.check_headers([storage], kept)
        else:
            # Another process may still be bringing it.
            reader.wait_for(index.path, storage.header, storage.offset)
            index.check_headers([storage])


def fetcher(checkpoint: Checkpoint) -> Callable[[Mapping[StorageRef, Sequence[ByteRange]]], None]:
    """What `weight_sharing` calls on all ranks for bytes that may not be here yet."""

    def fetch(reads: Mapping[StorageRef, Sequence[ByteRange]]) -> None:
        wanted: WantedRanges = {}
        for storage, ranges in reads.items():
            add_storage(wanted, storage, ranges)
        fetch_now(checkpoint.opening, wanted, "fetch weights")

    return fetch
