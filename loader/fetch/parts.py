"""Collects the parts of remote files that this rank will read, and has them fetched: before or while it restores.

First come the `small_parts`, which are read before anything is checked. Then the `restore_parts`: what the restore
reads (`verify.wanted_reads`) and what this rank has to sum (`verify.checks`). `fetching` runs the restore while those
are fetched; a rank reads a range as soon as it has landed (`materialize.storages`). `rounds` plans and runs each fetch.
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
"""Storages up to this size are fetched right after the index: counters, random states, biases."""


def small_parts(checkpoint: Checkpoint) -> WantedRanges:
    """The ranges that are read before anything is checked: small storages, random states, and `Contents.extra`."""
    wanted: WantedRanges = {}
    for index in checkpoint.indexes:
        _add_whole(wanted, (storage for storage in index.storages if storage.nbytes <= SMALL_STORAGE_BYTES))
    contents = checkpoint.contents
    _add_whole(wanted, {tensor.storage for _, tensor in tensors([contents.rng, contents.extra])})
    return wanted


def restore_parts(
    checkpoint: Checkpoint, checked: Checked, verification: Verification, weights: SharedWeights | None
) -> Parts:
    """The ranges of remote files that the restore and its checksums read on this rank; perhaps more, never fewer."""
    parts = Parts()
    if checkpoint.opening.store.is_local:
        return parts
    wanted = parts.wanted
    for storage, reads in verification.wanted.items():
        _add_storage(wanted, storage, reads.ranges)
    for storage, cells in verification.shares.items():
        _add_storage(wanted, storage, cells)
    _add_whole(wanted, verification.alone)
    if weights is not None:
        for storage, provided in weights.reads.items():
            _add_storage(wanted, storage, provided)
    if checked.prepared.algorithms:
        # Algorithms may change the model, and with it what is read of it.
        _add_whole(wanted, checkpoint.storages({"state": checked.contents.state}))
    elif checkpoint.opening.direct:
        _add_direct(parts.direct, verification, weights)
        for path, ranges in parts.direct.items():
            if path in checkpoint.opening.remote.known:
                # Bytes that are on this node already, with the index or from an earlier load, are read from there.
                parts.direct[path] = list(Landed(path).missing(ranges))
    return parts


def fetch_now(opening: Opening, wanted: Mapping[str, Sequence[ByteRange]], stage: str) -> None:
    """Fetches the ranges that all ranks want, by path, and waits for them. Every rank must call, whatever it wants.

    Raises, on all ranks alike, as `plan_round` and `FetchRound.run` do. Does nothing for a local store.
    """
    if opening.store.is_local:
        return
    fetch_round = plan_round(opening, Parts({path: list(ranges) for path, ranges in wanted.items()}), stage)
    with opening.stages.stage(stage) as timing:
        if fetch_round:
            timing.bytes += fetch_round.run()


@contextlib.contextmanager
def fetching(checkpoint: Checkpoint, reader: TensorReader, parts: Parts, stage: str) -> Iterator[None]:
    """Fetches `parts` while the block inside reads them; in it `reader` waits for bytes that have not landed.

    Every rank must enter, whatever it wants. Where fetching fails, the error is raised in the block of the rank that
    fetches, and so on all ranks. At the end, once all has landed, the headers of the storages are checked.
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
            with opening.stages.timed_in_thread(stage) as timing:
                timing.bytes += fetch_round.run()
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    def wait() -> None:
        if failure:
            raise failure[0]
        opening.stages.count(0)

    thread = threading.Thread(target=work, name="rankload-fetch", daemon=True)
    reader.waiting(wait, parts.wanted)
    reader.reading_direct(fetch_round.direct)
    if fetch_round:
        thread.start()
    else:
        ended.set()
    try:
        yield
        with opening.stages.stage(f"{stage}: end"):
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


def fetcher(checkpoint: Checkpoint) -> Callable[[Mapping[StorageRef, Sequence[ByteRange]]], None]:
    """What `verify.weights.share_weights` is to call, on all ranks, for ranges of storages that it reads."""

    def fetch(reads: Mapping[StorageRef, Sequence[ByteRange]]) -> None:
        wanted: WantedRanges = {}
        for storage, ranges in reads.items():
            _add_storage(wanted, storage, ranges)
        fetch_now(checkpoint.opening, wanted, "fetch weights")

    return fetch


def _add_direct(direct: WantedRanges, verification: Verification, weights: SharedWeights | None) -> None:
    """Adds the ranges that can be fetched directly into this rank's tensors."""
    alone = set(verification.alone)
    for storage, reads in verification.wanted.items():
        if storage in alone or storage.nbytes <= SMALL_STORAGE_BYTES:
            continue
        # Bytes that are only summed have no memory to be fetched into.
        summed = subtract(verification.shares.get(storage, ()), reads.ranges)
        spans = subtract(reads.direct, summed)
        if spans:
            _add_storage(direct, storage, spans)
    if weights is not None:
        for storage, provided in weights.reads.items():
            _add_storage(direct, storage, provided)


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
