"""Collects the parts of remote files that this rank will read, and has them fetched: before or while it restores.

First come the `small_parts`, which are read before anything is checked. Then the `restore_parts`: what the restore
reads, and what this rank has to sum. `fetching` runs the restore while those are fetched; a rank reads a range as soon
as it has landed (`materialize.storages`). `rounds` plans and runs each fetch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..byte_ranges import ByteRange, subtract
from ..cache.holes import Landed
from ..formats.torch_file import FileIndex
from ..materialize.tensors import TensorReader
from ..ranges.direct import DirectReads
from ..saved.contents import Saved
from ..saved.copies import StorageReads
from ..saved.tensor import StorageRef
from ..saved.tree import storages
from .checkpoint_files import CheckpointFiles
from .rounds import Parts, WantedRanges, fetch_now, plan_round

SMALL_STORAGE_BYTES = 64 << 10
"""Storages up to this size are fetched right after the index: counters, random states, biases."""


def small_parts(saved: Saved) -> WantedRanges:
    """The ranges that are read before anything is checked: small storages, random states, and `Saved.extra`."""
    wanted: WantedRanges = {}
    held = storages([saved.state, saved.masters, saved.unnamed_masters])
    _add_whole(wanted, (storage for storage in held if storage.nbytes <= SMALL_STORAGE_BYTES))
    _add_whole(wanted, storages([saved.rng, saved.extra]))
    return wanted


def all_parts(tree: Any) -> WantedRanges:
    """The ranges of all storages in `tree`."""
    wanted: WantedRanges = {}
    _add_whole(wanted, storages(tree))
    return wanted


def restore_parts(
    files: CheckpointFiles,
    reads: Mapping[StorageRef, StorageReads],
    summed: Mapping[StorageRef, Sequence[ByteRange]],
    alone: Collection[StorageRef],
    shared: Mapping[StorageRef, Sequence[ByteRange]],
    unplanned: Iterable[StorageRef] = (),
) -> Parts:
    """The ranges of remote files that the restore and its checksums read on this rank.

    Args:
        reads: what the plan reads.
        summed: what this rank sums of storages that several ranks sum together.
        alone: storages that it sums whole, in one pass over each.
        shared: what it reads of weights that its node's ranks share.
        unplanned: storages of which it is not known yet what will be read: all of them is fetched.
    """
    parts = Parts()
    if files.context.store.is_local:
        return parts
    for wanted in ({storage: one.ranges for storage, one in reads.items()}, summed, shared):
        for storage, ranges in wanted.items():
            _add_storage(parts.wanted, storage, ranges)
    _add_whole(parts.wanted, alone)
    whole = list(unplanned)
    _add_whole(parts.wanted, whole)
    if files.context.direct and not whole:
        _add_direct(parts.direct, {one: reads[one] for one in reads.keys() - set(alone)}, summed, shared)
        for path, ranges in parts.direct.items():
            if path in files.remote.known:
                # Bytes that are on this node already, with the index or from an earlier load, are read from there.
                parts.direct[path] = list(Landed(path).missing(ranges))
    return parts


def _add_direct(
    direct: WantedRanges,
    reads: Mapping[StorageRef, StorageReads],
    summed: Mapping[StorageRef, Sequence[ByteRange]],
    shared: Mapping[StorageRef, Sequence[ByteRange]],
) -> None:
    """Adds the ranges that can be fetched directly into this rank's tensors."""
    for storage, one in reads.items():
        if storage.nbytes <= SMALL_STORAGE_BYTES:
            continue
        # Bytes that are only summed have no memory to be fetched into.
        spans = subtract(one.direct, subtract(summed.get(storage, ()), one.ranges))
        if spans:
            _add_storage(direct, storage, spans)
    for storage, provided in shared.items():
        _add_storage(direct, storage, provided)


def fetch_storages(files: CheckpointFiles, wanted: Mapping[StorageRef, Sequence[ByteRange]]) -> None:
    """As `fetch_now`, for ranges of storages that a node's ranks share. Every rank must call."""
    by_path: WantedRanges = {}
    for storage, ranges in wanted.items():
        _add_storage(by_path, storage, ranges)
    fetch_now(files.context, files.remote, by_path, "fetch weights")


@contextlib.contextmanager
def fetching(files: CheckpointFiles, reader: TensorReader, parts: Parts, stage: str) -> Iterator[None]:
    """Fetches `parts` while the block inside reads them; in it `reader` waits for bytes that have not landed.

    Every rank must enter, whatever it wants. Where fetching fails, the error is raised in the block of the rank that
    fetches, and so on all ranks. At the end, once all has landed, the headers of the storages are checked.
    """
    stages, remote = files.context.stages, files.remote
    if files.context.store.is_local:
        yield
        return
    fetch_round = plan_round(files.context, remote, parts, stage)
    failure: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            with stages.timed_in_thread(stage) as timing:
                timing.bytes += fetch_round.run()
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    def wait() -> None:
        if failure:
            raise failure[0]
        stages.count(0)

    thread = threading.Thread(target=work, name="rankload-fetch", daemon=True)
    reader.waiting(wait, parts.wanted)
    reader.reading_direct(fetch_round.direct)
    if fetch_round:
        thread.start()
    else:
        ended.set()
    try:
        yield
        with stages.stage(f"{stage}: end"):
            while not ended.wait(0.05):
                wait()
            wait()
            for index in files.indexes:
                _check_headers(index, parts.wanted, fetch_round.direct, reader)
    finally:
        reader.waiting(None, {})
        reader.reading_direct(None)
        remote.known.add_fetched(fetch_round.direct.fetched_bytes)
        if not ended.is_set():
            remote.stop()
            thread.join(10)


def _add_storage(wanted: WantedRanges, storage: StorageRef, ranges: Iterable[ByteRange]) -> None:
    """Adds `ranges` of `storage`, and its header, to the ranges of its file."""
    mine = wanted.setdefault(storage.file, [])
    if storage.header >= 0:
        mine.append(ByteRange(storage.header, storage.offset))
    mine.extend(ByteRange(storage.offset + start, storage.offset + stop) for start, stop in ranges)


def _add_whole(wanted: WantedRanges, storages: Iterable[StorageRef]) -> None:
    """Adds all bytes of `storages`."""
    for storage in storages:
        _add_storage(wanted, storage, [ByteRange(0, storage.nbytes)])


def _check_headers(
    index: FileIndex, wanted: Mapping[str, Sequence[ByteRange]], direct: DirectReads, reader: TensorReader
) -> None:
    """Compares the zip headers of the storages of which ranges were fetched, to the file or directly."""
    starts = {one.start for one in wanted.get(index.path, ())}
    for storage in index.storages:
        if storage.header not in starts:
            continue
        if direct.of(index.path, storage.header, storage.offset):
            kept = direct.header(index.path, storage.header)
            if kept is not None:
                index.check_headers([storage], kept)
        else:
            # Another process may still be fetching it.
            reader.wait_for(index.path, storage.header, storage.offset)
            index.check_headers([storage])
