"""Collects the parts of remote files that this rank will read, and has them fetched: before or while it restores.

First come the `early_parts`, which are read before anything is checked. Then the `restore_parts`: what the restore
reads, and what this rank has to sum. `fetching` runs the restore while those are fetched; a rank reads a range as soon
as it has landed (`materialize.storages`). `rounds` plans and runs each fetch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

from ..byte_ranges import ByteRange, subtract, total_bytes, union
from ..cache.holes import Landed
from ..errors import CorruptError, fetched_twice
from ..formats.torch_file import FileIndex
from ..materialize.slices import reading_threads
from ..materialize.storages import READY_BYTES
from ..materialize.tensors import TensorReader
from ..options import Verify
from ..ranges.direct import DirectReads
from ..saved.copies import StorageReads
from ..saved.tensor import StorageRef
from .checkpoint_files import CheckpointFiles
from .rounds import FetchRound, Parts, WantedRanges, fetch_now, plan_round
from .wanted import add_storage, all_parts, early_parts, parts_of_restore

__all__ = [
    "Coming",
    "all_parts",
    "check_headers",
    "early_parts",
    "fetch_storages",
    "fetching",
    "files_reader",
    "restore_parts",
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


def files_reader(files: CheckpointFiles, verify: Verify) -> TensorReader:
    """The reader of a load: it knows what of `files` comes in parts, and fetches again what came damaged."""
    return TensorReader(
        verify=verify,
        on_bytes=files.context.stages.count,
        comes_in_parts=files.remote.known.__contains__,
        fetch_again=files.again.storage,
        n_threads=reading_threads(files.context.session.topology.local_world_size),
    )


def check_headers(files: CheckpointFiles, storages: Iterable[StorageRef]) -> None:
    """Compares the zip headers of `storages`, all of which is here, with their files' directories.

    One that contradicts it is fetched once more, where it is from a store. Raises `CorruptError`.
    """
    by_path = {index.path: index for index in files.indexes}
    for storage in storages:
        index = by_path.get(storage.file)
        if index is not None and storage.header >= 0:
            header = [ByteRange(storage.header, storage.offset)]
            files.again.reading(index.path, index.name, partial(index.check_headers, [storage]), header)


class Coming:
    """What is being fetched while it is read; `fetching` makes it."""

    def __init__(self, files: CheckpointFiles, reader: TensorReader, parts: Parts, stage: str) -> None:
        self._files = files
        self._reader = reader
        self._stage = stage
        self._wanted = parts.wanted
        self._round: FetchRound | None = None
        self._ended = threading.Event()
        self._settled = False
        self._failure: list[BaseException] = []
        self._thread: threading.Thread | None = None
        if not files.context.store.is_local:
            self._round = plan_round(files.context, files.remote, parts, stage)

    def begin(self) -> None:
        """Begins to fetch; the reader waits for bytes that have not landed from now on."""
        if self._round is None:
            return
        self._reader.waiting(self._wait, self._wanted)
        self._reader.reading_direct(self._round.direct)
        if self._round:
            # Not before it runs: until then it would keep alive what refers to it, all that was read of the files.
            self._thread = threading.Thread(target=self._work, name="rankload-fetch", daemon=True)
            self._thread.start()
        else:
            self._ended.set()

    def before_change(self) -> None:
        """To be called before the first change: what fails on any rank in it is no partial restore. Every rank must.

        Opens what this rank reads directly and, where this rank reads no more than `READY_BYTES`, waits until all of
        it has landed.
        """
        if self._round is None:
            return
        direct = self._round.direct
        with self._files.context.stages.stage(f"{self._stage}: ready"):
            direct.open_all()
            if sum(total_bytes(union(ranges)) for ranges in self._wanted.values()) > READY_BYTES:
                return
            for path, ranges in self._wanted.items():
                for wanted in ranges:
                    for start, stop in subtract([wanted], direct.own(path, *wanted)):
                        self._reader.wait_for(path, start, stop)

    def fetched(self) -> None:
        """Returns once all has landed that this rank fetches for its node; raises what fetching raised."""
        if self._round is None:
            return
        while not self._ended.wait(0.05):
            self._wait()
        self._wait()

    def settle(self) -> None:
        """Returns once all has landed on all nodes, and the headers of the storages were checked. Every rank must call.

        Headers that contradict their file's directory are fetched once more. Raises, on all ranks alike, what fetching
        raised, and `CorruptError`.
        """
        if self._round is None or self._settled:
            return
        with self._files.context.stages.stage(f"{self._stage}: end"):
            self.fetched()
            for index in self._files.indexes:
                self._check_headers(index, self._round.direct)
        self._settled = True

    def again(
        self, read: Callable[[Collection[StorageRef]], object], damaged: Mapping[StorageRef, str]
    ) -> None:
        """Calls `read` with storages that came `damaged`, and notes what it reads directly as fetched again."""
        before = dict(self._round.direct.fetched_bytes) if self._round is not None else {}
        read(damaged.keys())
        for path, n_bytes in self._round.direct.fetched_bytes.items() if self._round is not None else ():
            whys = [why for storage, why in damaged.items() if storage.file == path]
            n_again = n_bytes - before.get(path, 0)
            self._files.remote.note_again(
                self._files.name_at(path), n_again, (whys or ["it came damaged"])[0]
            )

    def close(self) -> None:
        """Ends what is still being fetched."""
        if self._round is None:
            return
        self._reader.waiting(None, {})
        self._reader.reading_direct(None)
        self._round.direct.close()
        self._files.remote.known.add_fetched(self._round.direct.fetched_bytes)
        if not self._ended.is_set():
            self._files.remote.stop()
            if self._thread is not None:
                self._thread.join(10)

    def _work(self) -> None:
        try:
            with self._files.context.stages.timed_in_thread(self._stage) as timing:
                timing.bytes += self._round.run() if self._round is not None else 0
        except BaseException as error:
            self._failure.append(error)
        finally:
            self._ended.set()

    def _wait(self) -> None:
        if self._failure:
            raise self._failure[0]
        self._files.context.stages.count(0)

    def _check_headers(self, index: FileIndex, direct: DirectReads) -> None:
        """Compares the zip headers of the storages of which ranges were fetched, to the file or directly."""
        starts = {one.start for one in self._wanted.get(index.path, ())}
        for storage in index.storages:
            if storage.header in starts:
                try:
                    self._check_header(index, storage, direct)
                except CorruptError as error:
                    self._fetch_header(index, storage, direct, error)

    def _check_header(self, index: FileIndex, storage: StorageRef, direct: DirectReads) -> None:
        if direct.of(index.path, storage.header, storage.offset):
            kept = direct.header(index.path, storage.header)
            if kept is not None:
                index.check_headers([storage], kept)
            return
        # Another process may still be fetching it.
        self._reader.wait_for(index.path, storage.header, storage.offset)
        index.check_headers([storage])

    def _fetch_header(
        self, index: FileIndex, storage: StorageRef, direct: DirectReads, error: CorruptError
    ) -> None:
        header, remote = ByteRange(storage.header, storage.offset), self._files.remote
        why = error.message.removeprefix(f"{index.name}: ")

        def is_right() -> bool:
            try:
                index.check_headers([storage])
            except CorruptError:
                return False
            return True

        if direct.of(index.path, *header):
            direct.read_header(index.path, header)
            remote.note_again(index.name, header.length, why)
        elif not self._files.again.ranges(index.path, [header], why, is_right):
            raise error
        try:
            self._check_header(index, storage, direct)
        except CorruptError as again:
            raise fetched_twice(again) from again.__cause__


@contextlib.contextmanager
def fetching(files: CheckpointFiles, reader: TensorReader, parts: Parts, stage: str) -> Iterator[Coming]:
    """Fetches `parts` while the block inside reads them; in it `reader` waits for bytes that have not landed.

    Every rank must enter, whatever it wants. Where fetching fails, the error is raised in the block of the rank that
    fetches, and so on all ranks. At the end it is settled (`Coming.settle`), unless the block did so.
    """
    coming = Coming(files, reader, parts, stage)
    coming.begin()
    try:
        yield coming
        coming.settle()
    finally:
        coming.close()
