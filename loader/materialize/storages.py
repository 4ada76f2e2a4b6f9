"""Reads storages' bytes once and in order, and compares them with their checksums. Free of torch."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..byte_ranges import ByteRange, subtract
from ..cache.holes import Landed
from ..checksums import RangeSums, crc32
from ..errors import AccessError, CorruptError, NotFoundError
from ..options import Verify
from ..ranges.direct import DirectReads, OnLanded, Placement
from ..saved.values import StorageRef

STAGING_BYTES = 8 << 20
"""The size of the one buffer for what cannot be read straight into its place."""
WAIT_S = 0.01
"""How often it is looked whether bytes have landed."""
_READ_BYTES = 8 << 20
_SUMMED_BYTES = 1 << 20
"""Bytes read at a time; fewer where they are summed, which is done while they are in the processor's cache."""


@dataclass(frozen=True, slots=True)
class StorageSlice:
    """Bytes of a storage that are wanted; ``start`` counts from the storage's first byte.

    They are read into ``view`` or, where that is None, into the staging buffer (at most ``STAGING_BYTES`` of
    them), for ``use`` to take from there.
    """

    start: int
    nbytes: int
    view: memoryview | None = None
    use: Callable[[], None] | None = None


_Planned = list[tuple[StorageRef, list[StorageSlice]]]


class StorageReader:
    """Reads pieces of storages, and checks each storage that it reads as ``verify`` says.

    ``before`` and ``during`` differ only in when `check` is called: a storage that it found to be right is
    not summed again. ``on_bytes`` is told of bytes as they are read.

    A storage that several ranks check together (`share`) is not checked here: its share of bytes is summed as they
    are read, and `finish` tells what they sum to.
    """

    def __init__(
        self,
        verify: Verify,
        on_bytes: Callable[[int], None] | None,
        comes_in_parts: Callable[[str], bool] = lambda path: False,
    ) -> None:
        self.verify = verify
        self.comes_in_parts = comes_in_parts
        """Whether the file at a path is one of which a record tells what has landed."""
        self.on_bytes = on_bytes
        self.staging: bytearray | memoryview = bytearray(STAGING_BYTES)
        self._checked: set[StorageRef] = set()
        self._shares: dict[StorageRef, RangeSums] = {}
        self._landed: dict[str, Landed | None] = {}
        self.on_wait: Callable[[], None] | None = None
        """Called again and again while bytes of a file that comes in parts have not landed; it may raise."""
        self.coming: dict[str, tuple[ByteRange, ...]] = {}
        """What of such files somebody brings while this is read."""
        self.direct: DirectReads | None = None
        """Bytes that never come to the node's files, and are read from the store when they are wanted."""

    def wait_for(self, path: str, start: int, stop: int) -> None:
        """Returns once bytes ``[start, stop)`` of the file at `path` are there; at once for files that are whole.

        Raises `CorruptError` where nobody is to bring them.
        """
        if path not in self._landed:
            self._landed[path] = Landed(path) if self.comes_in_parts(path) else None
        landed = self._landed[path]
        if landed is None or landed.has(start, stop):
            return
        unplanned = subtract([ByteRange(start, stop)], self.coming.get(path, ()))
        while not landed.has(start, stop):
            if self.on_wait is None or unplanned:
                raise CorruptError(
                    f"{path}: bytes {start:,} to {stop:,} are read, and were not fetched: this is a mistake in "
                    "rankload's plan of the load; please report it",
                    path=path,
                )
            self.on_wait()
            time.sleep(WAIT_S)

    def share(self, shares: Mapping[StorageRef, Sequence[ByteRange]]) -> None:
        """From now on only these ranges of these storages are summed here; others sum the rest of them."""
        self._shares = {storage: RangeSums(ranges) for storage, ranges in shares.items()}

    def finish(self) -> dict[StorageRef, list[int]]:
        """What each range of `share` sums to, in order; what was not read so far is read now.

        Their storages are then taken to be right: whoever has all ranks' sums has to say so.
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
        """What of `storage` is summed here, where it is shared."""
        return self._shares.get(storage)

    def check(self, storage: StorageRef) -> None:
        """Reads all of `storage` and raises `CorruptError` where it does not match its checksum."""
        if storage.crc32 is not None and storage not in self._checked:
            _Pass(self, storage, (), summed=True).run(())

    def read(self, storage: StorageRef, pieces: Iterable[StorageSlice], names: Sequence[str]) -> None:
        """Reads `pieces`, each into its place; ``names`` says for messages whose they are.

        Raises `CorruptError` where the file ends first, or the checksum differs: some pieces have been
        written by then.
        """
        alone = storage not in self._checked and storage not in self._shares
        summed = self.verify != "off" and storage.crc32 is not None and alone
        _Pass(self, storage, names, summed=summed).run(sorted(pieces, key=lambda piece: piece.start))

    def place(
        self, planned: Sequence[tuple[StorageRef, list[StorageSlice]]]
    ) -> list[tuple[StorageRef, list[StorageSlice]]]:
        """Reads those pieces, of all storages at once, that come straight from the store; returns those that are left.

        Raises as `read_ranges` does: some pieces have been written by then.
        """
        if not self.direct:
            return list(planned)
        left, placements = divide(self.direct, planned, self._shares, self.on_bytes)
        self.direct.place(placements)
        return left

    def passed(self, storage: StorageRef) -> None:
        """Notes that `storage` matched its checksum."""
        self._checked.add(storage)


class _Pass:
    """One run over a storage, from its first wanted byte to its last; over all of it where it is summed."""

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
        """Reads `ranges` only to sum them up."""
        self.file = self._open()
        try:
            for start, stop in ranges:
                for begin in range(start, stop, STAGING_BYTES):
                    self._fill(begin, self.staging[: min(STAGING_BYTES, stop - begin)])
        finally:
            os.close(self.file)

    def run(self, pieces: Sequence[StorageSlice]) -> None:
        self.file = self._open()
        try:
            for piece in pieces:
                self._pass_over(piece.start)
                if piece.view is not None:
                    self._fill(piece.start, piece.view)
                else:
                    self._fill(piece.start, self.staging[: piece.nbytes])
                    if piece.use is not None:
                        piece.use()
            self._pass_over(self.storage.nbytes)
        finally:
            os.close(self.file)
        if self.summed:
            if self.crc != self.storage.crc32:
                raise self._corrupt(
                    f"has CRC-32 {self.crc:08x}; the file's directory says {self.storage.crc32:08x}. The "
                    "file is damaged"
                )
            self.reader.passed(self.storage)

    def _open(self) -> int:
        path = self.storage.file
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFoundError(f"{path} is gone since its index was read", path=path) from None
        except OSError as error:
            raise AccessError(f"{path} cannot be opened ({error.strerror})", path=path) from error

    def _pass_over(self, position: int) -> None:
        """Sums what lies between the bytes that are wanted."""
        while self.summed and self.frontier < position:
            self._fill(self.frontier, self.staging[: min(STAGING_BYTES, position - self.frontier)])

    def _fill(self, start: int, view: memoryview) -> None:
        """Reads the storage's bytes from ``start`` into all of ``view``, and sums them."""
        step = _SUMMED_BYTES if self.summed or self.shared is not None else _READ_BYTES
        done = 0
        while done < len(view):
            part = view[done : done + step]
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
            done += count
            if self.reader.on_bytes is not None:
                self.reader.on_bytes(count)

    def _direct(self, first: int, view: memoryview) -> tuple[memoryview, int]:
        """Reads from the store what of `view`, with the file's bytes from `first` on, never comes to the file.

        What of it is to be done now, and how many bytes of that were read so.
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
        used = f", used by {', '.join(self.names[:3])}" if self.names else ""
        more = f" and {len(self.names) - 3} more" if len(self.names) > 3 else ""
        return CorruptError(
            f"{self.storage.file}: storage {self.storage.key}{used}{more}, {text}; fetch the file again.",
            path=self.storage.file,
        )


def divide(
    direct: DirectReads,
    planned: Sequence[tuple[StorageRef, Sequence[StorageSlice]]],
    shares: Mapping[StorageRef, RangeSums],
    on_bytes: Callable[[int], None] | None,
) -> tuple[_Planned, dict[str, Placement]]:
    """The pieces that are left, and what `direct` is to place, by path.

    What lands is summed into `shares`, and told to `on_bytes`, in the reading threads, one at a time.
    """
    left: _Planned = []
    placements: dict[str, Placement] = {}
    storages: dict[str, list[StorageRef]] = {}
    for storage, pieces in planned:
        kept: list[StorageSlice] = []
        placement = placements.get(storage.file) or Placement()
        before = len(placement.pieces)
        for piece in pieces:
            kept.extend(_leave(direct, storage, piece, placement))
        if len(placement.pieces) > before:
            placements[storage.file] = placement
            storages.setdefault(storage.file, []).append(storage)
            if storage.header >= 0:
                placement.headers.append(ByteRange(storage.header, storage.offset))
        left.append((storage, kept))
    for path, placement in placements.items():
        placement.landed = _landing(storages[path], placement, shares, on_bytes)
    return left, placements


def _leave(
    direct: DirectReads, storage: StorageRef, piece: StorageSlice, placement: Placement
) -> Iterator[StorageSlice]:
    """Puts what of `piece` comes straight from the store into `placement`; yields the rest."""
    first, view = storage.offset + piece.start, piece.view
    spans = direct.of(storage.file, first, first + piece.nbytes) if view is not None else ()
    if not spans or view is None:
        yield piece
        return
    for start, stop in spans:
        placement.pieces.append((start, view[start - first : stop - first]))
    for start, stop in subtract([ByteRange(first, first + piece.nbytes)], spans):
        part = view[start - first : stop - first]
        yield replace(piece, start=start - storage.offset, nbytes=stop - start, view=part)


def _landing(
    storages: Sequence[StorageRef],
    placement: Placement,
    shares: Mapping[StorageRef, RangeSums],
    on_bytes: Callable[[int], None] | None,
) -> OnLanded:
    """Sums what has landed of `storages`, of one file, where it is to be summed here."""
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
