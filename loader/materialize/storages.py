"""Reads each storage once and in order, into the places of its slices, and sums it for its checksum. Free of torch.

`StorageReader.place` comes first: it reads all slices that come directly from the store, over all storages at once
(`placing.divide` finds them). `StorageReader.read_all` then makes one `_Pass` over each storage, from its first slice
to its last; over all of it, where it is summed whole. Small storages beside each other are read together. A file that
comes in parts may still be growing: a pass waits for its bytes.

With several threads, the large storages of whole files come before that: they are cut into segments, each a pass of its
own, and the CRCs of a storage's segments are joined (`slices` says how). What does not go well there, because a file
ends early or a checksum differs, is left to the pass over the whole storage, which tells what is wrong.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from ..byte_ranges import ByteRange, subtract
from ..cache.holes import Landed
from ..checksums import RangeSums, crc32
from ..errors import AccessError, CorruptError, InternalError, NotFoundError, fetched_twice
from ..options import Verify
from ..ranges.destinations import FirstWrite
from ..ranges.direct import DirectReads
from ..saved.tensor import StorageRef
from ..workers import Stop, run_jobs
from .new_pages import make_pages
from .placing import divide, own_memory
from .slices import SMALL_BYTES, CutStorage, Planned, Segment, StorageSlice, neighbours
from .staging import SCRATCH_BYTES, HostStaging, Room, Staging

_PARALLEL_BYTES = 16 << 20
"""The least that several threads are started for."""
READY_BYTES = 64 << 20
"""A rank that reads no more than this from a remote store has all of it before it changes anything: the time that takes
is not worth a partial restore."""
WAIT_S = 0.01
"""The time between two looks at whether bytes have landed."""
_READ_BYTES = 8 << 20
_SUMMED_BYTES = SCRATCH_BYTES
"""How many bytes are read at a time, and how many where they are summed: those must fit the processor's cache."""


FetchAgain = Callable[[StorageRef, str, Callable[[], bool] | None], bool]
"""Called with a storage that does not match its checksum, what is wrong, and a function that tells whether its bytes
are right by now, where this rank alone can tell. Returns whether other bytes may be there now, to be read once more."""


def no_store(storage: StorageRef, why: str, is_right: Callable[[], bool] | None) -> bool:
    """A `FetchAgain` for files that are from no store."""
    return False


class StorageReader:
    """Reads slices of storages, and compares each storage with its checksum, unless ``verify`` is ``off``.

    ``before`` and ``during`` differ only in that the caller calls `check` beforehand: a storage that matched is not
    summed again. ``on_bytes`` is called with how many bytes were just read.

    A storage that several ranks sum together (`share`) is not compared here: this rank's ranges of it are summed as
    they are read, and `finish` returns their CRC-32s.

    With ``n_threads`` above 1, that many threads read large storages of whole files. ``on_bytes`` and ``fetch_again``
    are called in the calling thread alone; slices' ``use`` and ``first_write`` are called in those threads too.
    """

    def __init__(
        self,
        verify: Verify,
        on_bytes: Callable[[int], None] | None,
        comes_in_parts: Callable[[str], bool] = lambda path: False,
        fetch_again: FetchAgain = no_store,
        n_threads: int = 1,
    ) -> None:
        self.n_threads = n_threads
        self.verify = verify
        self.fetch_again = fetch_again
        self.comes_in_parts = comes_in_parts
        """Whether the file at a path comes in parts, so that a record says what has landed of it."""
        self.on_bytes = on_bytes
        self._rooms: list[Room] = []
        self._new_staging: Callable[[], Staging] = HostStaging
        self._checked: set[StorageRef] = set()
        self._shares: dict[StorageRef, RangeSums] = {}
        self._landed: dict[str, Landed | None] = {}
        self.on_wait: Callable[[], None] | None = None
        """Called every `WAIT_S` while bytes have not landed; it may raise. None where nothing is being fetched."""
        self.coming: dict[str, tuple[ByteRange, ...]] = {}
        """The ranges, by path, that are being fetched meanwhile."""
        self.direct: DirectReads | None = None
        """Ranges that are never in the node's files, and are read from the store."""

    def stage_in(self, new_staging: Callable[[], Staging]) -> None:
        """From now on, bytes are staged in memory that `new_staging` makes, once for each thread that needs some."""
        self._new_staging = new_staging
        self._rooms.clear()

    @contextmanager
    def room(self) -> Iterator[Room]:
        """What one thread reads with, for the length of the block."""
        try:
            room = self._rooms.pop()
        except IndexError:
            room = Room(self._new_staging())
        try:
            with room.staging.working():
                yield room
        finally:
            self._rooms.append(room)

    def wait_for(self, path: str, start: int, stop: int) -> None:
        """Returns once bytes ``[start, stop)`` of the file at `path` have landed; at once for files that are whole.

        Raises `InternalError` where they are not being fetched.
        """
        landed = self._records_of(path)
        if landed is None or landed.has(start, stop):
            return
        if self.direct is not None:
            self.direct.bring(path, start, stop)
        unplanned = subtract([ByteRange(start, stop)], self.coming.get(path, ()))
        while not landed.has(start, stop):
            if self.on_wait is None or unplanned:
                raise InternalError(
                    f"{path}: bytes {start:,} to {stop:,} are read, and were not fetched: this is a mistake in "
                    "rankload's plan of the load; please report it",
                    path=path,
                )
            self.on_wait()
            time.sleep(WAIT_S)

    def _records_of(self, path: str) -> Landed | None:
        """What has landed of the file at `path`; None where it is whole."""
        if path not in self._landed:
            self._landed[path] = Landed(path) if self.comes_in_parts(path) else None
        return self._landed[path]

    def share(self, shares: Mapping[StorageRef, Sequence[ByteRange]]) -> None:
        """From now on, only these ranges of these storages are summed here; other ranks sum the rest."""
        self._shares = {storage: RangeSums(ranges) for storage, ranges in shares.items()}

    def finish(self) -> dict[StorageRef, list[int]]:
        """The CRC-32s of the ranges given to `share`, in order. Bytes of them that were not read yet are read now.

        Their storages count as compared from then on: that is left to the caller, who has all ranks' sums.
        """
        found = {}
        for storage, sums in self._shares.items():
            missing = list(sums.missing())
            if missing:
                with self.room() as room:
                    _Pass(self, storage, (), room, summed=False).sum(missing)
            found[storage] = sums.sums()
            self._checked.add(storage)
        self._shares = {}
        return found

    def sums_of(self, storage: StorageRef) -> RangeSums | None:
        """This rank's sums of a storage that several ranks sum together; None for any other."""
        return self._shares.get(storage)

    def check(self, storages: Iterable[StorageRef]) -> None:
        """Reads all of each of `storages`, and raises `CorruptError` for the first that does not match its checksum."""
        left: Planned = [(one, []) for one in storages if one.crc32 is not None and one not in self._checked]
        for storage, _ in self._read_in_threads(left, summed=lambda _: True):
            with self.room() as room:
                _Pass(self, storage, (), room, summed=True).run(())

    def read_all(self, planned: Planned, names_of: Callable[[StorageRef], Sequence[str]]) -> None:
        """Reads the slices of storages that are in the order of their files, each into its place.

        `names_of` a storage are those of the tensors that it is for, for messages. Raises `CorruptError` where a file
        ends early or a checksum differs; slices may have been written by then.
        """
        planned = self._read_in_threads(planned, summed=self._is_summed)
        for group in neighbours(planned):
            left = group if len(group) == 1 else self._read_together(group)
            for storage, slices in left:
                with self.room() as room:
                    one = _Pass(self, storage, names_of(storage), room, summed=self._is_summed(storage))
                    one.run(sorted(slices, key=lambda one: one.start))

    def _read_in_threads(self, planned: Planned, *, summed: Callable[[StorageRef], bool]) -> Planned:
        """Reads large storages of whole files by several threads; returns what is left: all others, and those that did
        not go well. Raises what ``use`` or ``first_write`` of a slice, or `on_bytes`, raised."""
        if self.n_threads < 2 or self.direct:
            return planned
        cut = [
            CutStorage(storage, slices, summed=summed(storage))
            for storage, slices in planned
            if storage.nbytes > SMALL_BYTES and self._records_of(storage.file) is None
        ]
        segments = [segment for one in cut for segment in one.segments]
        if len(segments) < 2 or sum(one.nbytes for one in segments) < _PARALLEL_BYTES:
            return planned
        counted = _Counted()

        def tick() -> None:
            n_bytes = counted.taken()
            if self.on_bytes is not None:
                self.on_bytes(n_bytes)

        run_jobs(
            [partial(self._read_segment, segment, counted) for segment in segments],
            tick,
            n_threads=self.n_threads,
        )
        n_bytes = counted.taken()
        if n_bytes and self.on_bytes is not None:
            self.on_bytes(n_bytes)
        done = set()
        for one in cut:
            if one.is_right:
                done.add(one.storage)
                if one.summed:
                    self.passed(one.storage)
        return [(storage, slices) for storage, slices in planned if storage not in done]

    def _read_segment(self, segment: Segment, counted: _Counted, stop: Stop) -> None:
        """Reads a segment in a thread of its own, and sums it where its storage is `summed` whole."""

        def on_bytes(n_bytes: int) -> None:
            stop.check()
            counted.add(n_bytes)

        with self.room() as room:
            one = _Pass(
                self, segment.storage, (), room, summed=segment.summed, span=segment.span, on_bytes=on_bytes
            )
            try:
                one.read(segment.slices)
            except (CorruptError, NotFoundError, AccessError):
                return  # the pass over the whole storage finds it again, and tells the tensors
        segment.crc = one.crc
        segment.is_read = True

    def _is_summed(self, storage: StorageRef) -> bool:
        alone = storage not in self._checked and storage not in self._shares
        return self.verify != "off" and storage.crc32 is not None and alone

    def _read_together(self, group: Planned) -> Planned:
        """Reads neighbours by one read, and fills their slices from it; returns those that need a pass of their own.

        Those are all of a file that comes in parts or ends early, what several ranks sum together, and what does not
        match its checksum.
        """
        (first, _), (last, _) = group[0], group[-1]
        if self._records_of(first.file) is not None:
            return group
        start, stop = first.offset, last.offset + last.nbytes
        opened = _open(first)
        try:
            data = memoryview(os.pread(opened, stop - start, start))
        except OSError:
            return group
        finally:
            os.close(opened)
        if len(data) < stop - start:
            return group
        with self.room() as room:
            return self._use_together(group, data, start, room.staging)

    def _use_together(self, group: Planned, data: memoryview, start: int, staging: Staging) -> Planned:
        """Fills the slices of `group` from `data`, which are the file's bytes from `start` on; returns what is left."""
        left: Planned = []
        n_bytes = 0
        for storage, slices in group:
            own = data[storage.offset - start : storage.offset - start + storage.nbytes]
            summed = self._is_summed(storage)
            if storage in self._shares or (summed and crc32(own) != storage.crc32):
                left.append((storage, slices))
                continue
            if summed:
                self.passed(storage)
            for one in slices:
                n_bytes += one.nbytes
                if one.first_write is not None:
                    one.first_write.before()
                view = staging.claim(one.nbytes) if one.view is None else one.view
                view[:] = own[one.start : one.start + one.nbytes]
                if one.use is not None:
                    one.use(view)
        if self.on_bytes is not None:
            self.on_bytes(n_bytes)
        return left

    def place(
        self, planned: Sequence[tuple[StorageRef, list[StorageSlice]]]
    ) -> list[tuple[StorageRef, list[StorageSlice]]]:
        """Reads those parts of the slices that come directly from the store, of all storages at once.

        Returns what is left to `read`: the same storages, some perhaps without slices. Raises as `read_ranges` does;
        slices may have been written by then.
        """
        if not self.direct:
            return list(planned)
        owned: list[tuple[FirstWrite, memoryview, memoryview]] = []
        if self.direct.nbytes <= READY_BYTES:
            planned = [
                (storage, [own_memory(one, self.direct, storage, owned) for one in slices])
                for storage, slices in planned
            ]
        left, placements = divide(self.direct, planned, self._shares, self.on_bytes)
        self.direct.place(placements)
        for first_write, view, landed in owned:
            first_write.before()
            view[:] = landed
        return left

    def passed(self, storage: StorageRef) -> None:
        """Notes that `storage` matched its checksum."""
        self._checked.add(storage)


class _Counted:
    """Bytes that several threads have read, until the calling thread takes note of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_bytes = 0

    def add(self, n_bytes: int) -> None:
        with self._lock:
            self._n_bytes += n_bytes

    def taken(self) -> int:
        with self._lock:
            n_bytes, self._n_bytes = self._n_bytes, 0
        return n_bytes


class _Pass:
    """One pass over a storage, from its first wanted byte to its last; over all of its `span` where that is `summed`.

    `span` is the whole storage, unless several passes share it.
    """

    def __init__(
        self,
        reader: StorageReader,
        storage: StorageRef,
        names: Sequence[str],
        room: Room,
        *,
        summed: bool,
        span: ByteRange | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        self.reader = reader
        self.storage = storage
        self.names = names
        self.summed = summed
        self.span = ByteRange(0, storage.nbytes) if span is None else span
        self.on_bytes = reader.on_bytes if on_bytes is None else on_bytes
        self.shared = reader.sums_of(storage)
        self.crc = 0
        self.frontier = self.span.start
        self.room = room
        self.file = -1

    def sum(self, ranges: Sequence[ByteRange]) -> None:
        """Reads `ranges` only to sum them."""
        self.file = _open(self.storage)
        try:
            for start, stop in ranges:
                for begin in range(start, stop, _SUMMED_BYTES):
                    self._fill(begin, self.room.scratch[: stop - begin])
        finally:
            os.close(self.file)

    def run(self, slices: Sequence[StorageSlice]) -> None:
        """Reads `slices`, which are in order, and compares the checksum where the storage is summed whole.

        Where it differs, the storage is fetched once more, if it is from a store, and the slices are read again.
        """
        self.read(slices)
        if self.summed and self.crc != self.storage.crc32:
            why = self._differs()
            again = self.reader.fetch_again(self.storage, f"storage {self.storage.key} {why}", self._is_right)
            if again:
                self.read(slices)
            if self.crc != self.storage.crc32:
                error = self._corrupt(f"{self._differs()}. The file is damaged")
                raise fetched_twice(error) if again else error
        if self.summed:
            self.reader.passed(self.storage)

    def read(self, slices: Sequence[StorageSlice]) -> None:
        """Reads `slices`, which are in order; `crc` is that of the span afterwards, where that is summed."""
        self.crc, self.frontier = 0, self.span.start
        self.file = _open(self.storage)
        try:
            for one in slices:
                self._pass_over(one.start)
                if one.view is not None:
                    self._fill(one.start, one.view, one.first_write, is_new=one.first_write is None)
                else:
                    view = self.room.staging.claim(one.nbytes)
                    self._fill(one.start, view)
                    if one.first_write is not None:
                        one.first_write.before()
                    if one.use is not None:
                        one.use(view)
            self._pass_over(self.span.stop)
        finally:
            os.close(self.file)

    def _differs(self) -> str:
        return f"has CRC-32 {self.crc:08x}; the file's directory says {self.storage.crc32:08x}"

    def _is_right(self) -> bool:
        """Whether the storage matches its checksum as it lies in the file now."""
        other = _Pass(self.reader, self.storage, (), self.room, summed=True)
        other.read(())
        return other.crc == self.storage.crc32

    def _pass_over(self, position: int) -> None:
        """Reads and sums the bytes up to `position` that no slice wants, where the storage is summed whole."""
        while self.summed and self.frontier < position:
            self._fill(self.frontier, self.room.scratch[: position - self.frontier])

    def _fill(
        self, start: int, view: memoryview, first_write: FirstWrite | None = None, *, is_new: bool = False
    ) -> None:
        """Reads the storage's bytes from ``start`` into all of ``view``, and sums them.

        Until ``first_write`` is noted, bytes are read into a buffer first: a failed read is no change. `is_new` says
        that ``view`` was most likely never written to.
        """
        step = _SUMMED_BYTES if self.summed or self.shared is not None else _READ_BYTES
        done = 0
        while done < len(view):
            part = view[done : done + step]
            apart = first_write is not None and not first_write.noted
            if apart:
                part = self.room.scratch[: len(part)]
            first = self.storage.offset + start + done
            part, count = self._direct(first, part)
            if count == 0:
                self.reader.wait_for(self.storage.file, first, first + len(part))
                if is_new:
                    make_pages(part)
                try:
                    count = os.preadv(self.file, [part], first)
                except OSError as error:
                    raise self._corrupt(
                        f"cannot be read at byte {start + done:,} ({error.strerror})"
                    ) from error
            if count == 0:
                raise self._corrupt(
                    f"ends after {start + done:,} of {self.storage.nbytes:,} bytes: the file was truncated "
                    "since its index was read"
                )
            self._sum(start + done, part[:count])
            if apart and first_write is not None:
                first_write.before()
                view[done : done + count] = part[:count]
            done += count
            if self.on_bytes is not None:
                self.on_bytes(count)

    def _direct(self, first: int, view: memoryview) -> tuple[memoryview, int]:
        """Reads the beginning of `view`, for the file's bytes from `first` on, from the store if those come directly.

        Returns the beginning of `view`, up to where direct ranges begin or end, and how many bytes of it were read: all
        or none.
        """
        direct = self.reader.direct
        spans = direct.of(self.storage.file, first, first + len(view)) if direct else ()
        if not direct or not spans:
            return view, 0
        if spans[0].start > first:
            return view[: spans[0].start - first], 0
        view = view[: spans[0].stop - first]
        direct.read(self.storage.file, first, view)
        return view, len(view)

    def _sum(self, start: int, view: memoryview) -> None:
        if self.shared is not None:
            self.shared.update(start, view)
        stop = start + len(view)
        if self.summed and stop > self.frontier:
            self.crc = crc32(view[max(0, self.frontier - start) :], self.crc)
            self.frontier = stop

    def _corrupt(self, text: str) -> CorruptError:
        more = f" and {len(self.names) - 3} more" if len(self.names) > 3 else ""
        used = f", used by {', '.join(self.names[:3])}{more}," if self.names else ""
        return CorruptError(
            f"{self.storage.file}: storage {self.storage.key}{used} {text}; take another copy of it.",
            path=self.storage.file,
        )


def _open(storage: StorageRef) -> int:
    path = storage.file
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"{path} is gone since its index was read", path=path) from None
    except OSError as error:
        raise AccessError(f"{path} cannot be opened ({error.strerror})", path=path) from error
