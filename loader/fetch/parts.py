"""Collects the parts of remote files that this rank will read, and has them fetched: before or while it restores.

First come the `small_parts`, which are read before anything is checked. Then the `restore_parts`: what the restore
reads, and what this rank has to sum. `fetching` runs the restore while those are fetched; a rank reads a range as soon
as it has landed (`materialize.storages`). `rounds` plans and runs each fetch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from ..byte_ranges import ByteRange
from ..cache.holes import Landed
from ..formats.torch_file import FileIndex
from ..materialize.tensors import TensorReader
from ..ranges.direct import DirectReads
from ..saved.copies import StorageReads
from ..saved.tensor import StorageRef
from .checkpoint_files import CheckpointFiles
from .rounds import Parts, WantedRanges, fetch_now, plan_round
from .wanted import SMALL_STORAGE_BYTES, add_storage, all_parts, parts_of_restore, small_parts

__all__ = [
    "SMALL_STORAGE_BYTES",
    "all_parts",
    "fetch_storages",
    "fetching",
    "restore_parts",
    "small_parts",
]


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
    if files.context.store.is_local:
        return Parts()
    parts = parts_of_restore(reads, summed, alone, shared, unplanned, direct=files.context.direct)
    for path, ranges in parts.direct.items():
        if path in files.remote.known:
            # Bytes that are on this node already, with the index or from an earlier load, are read from there.
            parts.direct[path] = list(Landed(path).missing(ranges))
    return parts


def fetch_storages(files: CheckpointFiles, wanted: Mapping[StorageRef, Sequence[ByteRange]]) -> None:
    """As `fetch_now`, for ranges of storages that a node's ranks share. Every rank must call."""
    by_path: WantedRanges = {}
    for storage, ranges in wanted.items():
        add_storage(by_path, storage, ranges)
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
