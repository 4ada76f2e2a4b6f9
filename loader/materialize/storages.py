"""Reads each storage once and in order, into the places of its slices, and sums it for its checksum. Free of torch.

`StorageReader.place` comes first: it reads all slices that come directly from the store, over all storages at once
(`_divide` finds them). `StorageReader.read_all` then makes one `_Pass` over each storage, from its first slice to its
last; over all of it, where it is summed whole. Small storages beside each other are read together (`_neighbours`). A
file that comes in parts may still be growing: a pass waits for its bytes.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..byte_ranges import ByteRange, subtract
from ..cache.holes import Landed
from ..checksums import RangeSums, crc32
from ..errors import AccessError, CorruptError, InternalError, NotFoundError, fetched_twice
from ..options import Verify
from ..ranges.destinations import FirstWrite
from ..ranges.direct import DirectReads, Placement
from ..ranges.engine import OnLanded
from ..saved.tensor import StorageRef

STAGING_BYTES = 8 << 20
"""The size of the buffer for bytes that cannot be read into their destination itself."""
READY_BYTES = 64 << 20
"""A rank that reads no more than this from a remote store has all of it before it changes anything: the time that takes
is not worth a partial restore."""
WAIT_S = 0.01
"""The time between two looks at whether bytes have landed."""
SMALL_BYTES = 64 << 10
"""The largest storage that is read together with its neighbours, and the largest gap between two that is read too."""
_TOGETHER_BYTES = 1 << 20
"""How many bytes are read together at most: they must fit the processor's cache."""
_READ_BYTES = 8 << 20
_SUMMED_BYTES = 1 << 20
"""How many bytes are read at a time, and how many where they are summed: those must fit the processor's cache."""


@dataclass(frozen=True, slots=True)
class StorageSlice:
    """``nbytes`` bytes of a storage from byte ``start`` on, and where they go.

    They are read into ``view``; where that is None into the staging buffer (at most ``STAGING_BYTES`` of them), and
    ``use`` is called to take them from there. ``first_write`` is noted before, where they go to memory that the caller
    of a load owns.
    """

    start: int
    nbytes: int
    view: memoryview | None = None
    use: Callable[[], None] | None = None
    first_write: FirstWrite | None = None


_Planned = list[tuple[StorageRef, list[StorageSlice]]]

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
    """

    def __init__(
        self,
        verify: Verify,
        on_bytes: Callable[[int], None] | None,
        comes_in_parts: Callable[[str], bool] = lambda path: False,
        fetch_again: FetchAgain = no_store,
    ) -> None:
        self.verify = verify
        self.fetch_again = fetch_again
        self.comes_in_parts = comes_in_parts
        """Whether the file at a path comes in parts, so that a record says what has landed of it."""
        self.on_bytes = on_bytes
        self.staging: bytearray | memoryview = bytearray(STAGING_BYTES)
        self._checked: set[StorageRef] = set()
        self._shares: dict[StorageRef, RangeSums] = {}
        self._landed: dict[str, Landed | None] = {}
        self.on_wait: Callable[[], None] | None = None
        """Called every `WAIT_S` while bytes have not landed; it may raise. None where nothing is being fetched."""
        self.coming: dict[str, tuple[ByteRange, ...]] = {}
        """The ranges, by path, that are being fetched meanwhile."""
        self.direct: DirectReads | None = None
        """Ranges that are never in the node's files, and are read from the store."""

    def wait_for(self, path: str, start: int, stop: int) -> None:
        """Returns once bytes ``[start, stop)`` of the file at `path` have landed; at once for files that are whole.

        Raises `InternalError` where they are not being fetched.
        """
        landed = self._records_of(path)
        if landed is None or landed.has(start, stop):
            return
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
                _Pass(self, storage, (), summed=False).sum(missing)
            found[storage] = sums.sums()
            self._checked.add(storage)
        self._shares = {}
        return found

    def sums_of(self, storage: StorageRef) -> RangeSums | None:
        """This rank's sums of a storage that several ranks sum together; None for any other."""
        return self._shares.get(storage)

    def check(self, storage: StorageRef) -> None:
        """Reads all of `storage` and raises `CorruptError` where it does not match its checksum."""
        if storage.crc32 is not None and storage not in self._checked:
            _Pass(self, storage, (), summed=True).run(())

    def read_all(self, planned: _Planned, names_of: Callable[[StorageRef], Sequence[str]]) -> None:
        """Reads the slices of storages that are in the order of their files, each into its place.

        `names_of` a storage are those of the tensors that it is for, for messages. Raises `CorruptError` where a file
        ends early or a checksum differs; slices may have been written by then.
        """
        for group in _neighbours(planned):
            left = group if len(group) == 1 else self._read_together(group, names_of)
            for storage, slices in left:
                one = _Pass(self, storage, names_of(storage), summed=self._is_summed(storage))
                one.run(sorted(slices, key=lambda one: one.start))

    def _is_summed(self, storage: StorageRef) -> bool:
        alone = storage not in self._checked and storage not in self._shares
        return self.verify != "off" and storage.crc32 is not None and alone

    def _read_together(self, group: _Planned, names_of: Callable[[StorageRef], Sequence[str]]) -> _Planned:
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
        left: _Planned = []
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
                view = self.staging if one.view is None else one.view
                view[: one.nbytes] = own[one.start : one.start + one.nbytes]
                if one.use is not None:
                    one.use()
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
                (storage, [_apart(one, self.direct, storage, owned) for one in slices])
                for storage, slices in planned
            ]
        left, placements = _divide(self.direct, planned, self._shares, self.on_bytes)
        self.direct.place(placements)
        for first_write, view, landed in owned:
            first_write.before()
            view[:] = landed
        return left

    def passed(self, storage: StorageRef) -> None:
        """Notes that `storage` matched its checksum."""
        self._checked.add(storage)


class _Pass:
    """One pass over a storage, from its first wanted byte to its last; over all of it where it is `summed` whole."""

    def __init__(
        self, reader: StorageReader, storage: StorageRef, names: Sequence[str], *, summed: bool
    ) -> None:
        self.reader = reader
        self.storage = storage
        self.names = names
        self.summed = summed
        self.shared = reader.sums_of(storage)
        self.crc = 0
        self.frontier = 0
        self.staging = memoryview(reader.staging)
        self.file = -1

    def sum(self, ranges: Sequence[ByteRange]) -> None:
        """Reads `ranges` only to sum them."""
        self.file = _open(self.storage)
        try:
            for start, stop in ranges:
                for begin in range(start, stop, STAGING_BYTES):
                    self._fill(begin, self.staging[: min(STAGING_BYTES, stop - begin)])
        finally:
            os.close(self.file)

    def run(self, slices: Sequence[StorageSlice]) -> None:
        """Reads `slices`, which are in order, and compares the checksum where the storage is summed whole.

        Where it differs, the storage is fetched once more, if it is from a store, and the slices are read again.
        """
        self._read(slices)
        if self.summed and self.crc != self.storage.crc32:
            why = self._differs()
            again = self.reader.fetch_again(self.storage, f"storage {self.storage.key} {why}", self._is_right)
            if again:
                self._read(slices)
            if self.crc != self.storage.crc32:
                error = self._corrupt(f"{self._differs()}. The file is damaged")
                raise fetched_twice(error) if again else error
        if self.summed:
            self.reader.passed(self.storage)

    def _read(self, slices: Sequence[StorageSlice]) -> None:
        self.crc = self.frontier = 0
        self.file = _open(self.storage)
        try:
            for one in slices:
                self._pass_over(one.start)
                if one.view is not None:
                    self._fill(one.start, one.view, one.first_write)
                else:
                    self._fill(one.start, self.staging[: one.nbytes])
                    if one.first_write is not None:
                        one.first_write.before()
                    if one.use is not None:
                        one.use()
            self._pass_over(self.storage.nbytes)
        finally:
            os.close(self.file)

    def _differs(self) -> str:
        return f"has CRC-32 {self.crc:08x}; the file's directory says {self.storage.crc32:08x}"

    def _is_right(self) -> bool:
        """Whether the storage matches its checksum as it lies in the file now."""
        other = _Pass(self.reader, self.storage, (), summed=True)
        other._read(())
        return other.crc == self.storage.crc32

    def _pass_over(self, position: int) -> None:
        """Reads and sums the bytes up to `position` that no slice wants, where the storage is summed whole."""
        while self.summed and self.frontier < position:
            self._fill(self.frontier, self.staging[: min(STAGING_BYTES, position - self.frontier)])

    def _fill(self, start: int, view: memoryview, first_write: FirstWrite | None = None) -> None:
        """Reads the storage's bytes from ``start`` into all of ``view``, and sums them.

        Until ``first_write`` is noted, bytes are read into the staging buffer first: a failed read is no change.
        """
        step = _SUMMED_BYTES if self.summed or self.shared is not None else _READ_BYTES
        done = 0
        while done < len(view):
            part = view[done : done + step]
            apart = first_write is not None and not first_write.noted
            if apart:
                part = self.staging[: len(part)]
            first = self.storage.offset + start + done
            part, count = self._direct(first, part)
            if count == 0:
                self.reader.wait_for(self.storage.file, first, first + len(part))
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
            if self.reader.on_bytes is not None:
                self.reader.on_bytes(count)

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


def _neighbours(planned: _Planned) -> Iterator[_Planned]:
    """`planned`, which is in the order of the files, in groups: small storages that lie close to each other, and each
    other one by itself."""
    group: _Planned = []
    start = end = 0
    for storage, slices in planned:
        near = (
            group
            and storage.nbytes <= SMALL_BYTES
            and storage.file == group[0][0].file
            and end <= storage.offset <= end + SMALL_BYTES
            and storage.offset + storage.nbytes - start <= _TOGETHER_BYTES
        )
        if group and not near:
            yield group
            group = []
        if not group:
            start = storage.offset
        # One that is not small stays alone: nothing is near its end.
        end = storage.offset + storage.nbytes if storage.nbytes <= SMALL_BYTES else -SMALL_BYTES - 1
        group.append((storage, slices))
    if group:
        yield group


def _apart(
    wanted: StorageSlice,
    direct: DirectReads,
    storage: StorageRef,
    owned: list[tuple[FirstWrite, memoryview, memoryview]],
) -> StorageSlice:
    """`wanted` with memory apart in place of memory that the caller of the load owns, where all of it comes directly;
    adds both to `owned`."""
    span = ByteRange(storage.offset + wanted.start, storage.offset + wanted.start + wanted.nbytes)
    if wanted.first_write is None or wanted.view is None or direct.of(storage.file, *span) != (span,):
        return wanted
    landed = memoryview(bytearray(wanted.nbytes))
    owned.append((wanted.first_write, wanted.view, landed))
    return replace(wanted, view=landed, first_write=None)


def _divide(
    direct: DirectReads,
    planned: Sequence[tuple[StorageRef, Sequence[StorageSlice]]],
    shares: Mapping[StorageRef, RangeSums],
    on_bytes: Callable[[int], None] | None,
) -> tuple[_Planned, dict[str, Placement]]:
    """The slices that are left to read from files, and the `Placement` of what `direct` is to read, by path.

    What lands is summed into `shares` and counted by `on_bytes`, in the reading threads, by one at a time.
    """
    left: _Planned = []
    placements: dict[str, Placement] = {}
    storages: dict[str, list[StorageRef]] = {}
    for storage, slices in planned:
        kept: list[StorageSlice] = []
        placement = placements.get(storage.file) or Placement()
        before = len(placement.pieces)
        for one in slices:
            kept.extend(_place_direct(direct, storage, one, placement))
        if len(placement.pieces) > before:
            placements[storage.file] = placement
            storages.setdefault(storage.file, []).append(storage)
            if storage.header >= 0:
                placement.headers.append(ByteRange(storage.header, storage.offset))
        left.append((storage, kept))
    for path, placement in placements.items():
        placement.landed = _on_landed(storages[path], placement, shares, on_bytes)
    return left, placements


def _place_direct(
    direct: DirectReads, storage: StorageRef, wanted: StorageSlice, placement: Placement
) -> Iterator[StorageSlice]:
    """Adds what of `wanted` comes directly to `placement`; yields the rest."""
    first, view = storage.offset + wanted.start, wanted.view
    spans = direct.of(storage.file, first, first + wanted.nbytes) if view is not None else ()
    if not spans or view is None:
        yield wanted
        return
    for start, stop in spans:
        placement.pieces.append((start, view[start - first : stop - first]))
        if wanted.first_write is not None:
            placement.first_writes[start] = wanted.first_write
    for start, stop in subtract([ByteRange(first, first + wanted.nbytes)], spans):
        part = view[start - first : stop - first]
        yield replace(wanted, start=start - storage.offset, nbytes=stop - start, view=part)


def _on_landed(
    storages: Sequence[StorageRef],
    placement: Placement,
    shares: Mapping[StorageRef, RangeSums],
    on_bytes: Callable[[int], None] | None,
) -> OnLanded:
    """What to call as bytes of one file land in `placement`: sums those that `shares` has of its `storages`."""
    in_order = sorted(storages, key=lambda storage: storage.offset)
    offsets = [storage.offset for storage in in_order]
    pieces = sorted(placement.pieces, key=lambda piece: piece[0])
    starts = [start for start, _ in pieces]
    one_at_a_time = threading.Lock()

    def landed(start: int, stop: int) -> None:
        with one_at_a_time:
            at = max(bisect_right(starts, start) - 1, 0)
            while at < len(pieces) and pieces[at][0] < stop:
                first, view = pieces[at]
                begin, end = max(first, start), min(first + view.nbytes, stop)
                storage = in_order[bisect_right(offsets, first) - 1]
                sums = shares.get(storage)
                if begin < end and sums is not None:
                    sums.update(begin - storage.offset, view[begin - first : end - first])
                at += 1
            if on_bytes is not None:
                on_bytes(stop - start)

    return landed
