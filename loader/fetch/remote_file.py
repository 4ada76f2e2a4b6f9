"""Fetches ranges of one remote object into a file with holes, and remembers in the cache which ones have landed.

`open_remote_file` is the way in; only the node's leader calls it. Other ranks read the same file by its record
(`cache.holes.Landed`).
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import BinaryIO, cast

from ..byte_ranges import ByteRange, subtract, total_bytes, union
from ..cache.folder import make_private
from ..cache.holes import PartialFile, record_landed, replace_bytes
from ..cache.records import PARTS, product_name
from ..checksums import crc32, crc32_in_file
from ..errors import RankloadError
from ..ranges.base import RangeSource
from ..ranges.destinations import FileDestination
from ..ranges.engine import ObjectRead, read_ranges
from ..ranges.seekable import SeekableFile
from ..stores.base import ObjectInfo, OnBytes
from .object_cache import ObjectCache

BLOCK_BYTES = 64 << 10
"""An index is fetched in multiples of this."""


class RemoteFile:
    """One object that comes in parts, on the rank that fetches it. The file at `path` stays when this is closed.

    Raises `BlockingIOError` where another process holds the file at `path`, OSError where the disk refuses.
    """

    def __init__(
        self, source: RangeSource, path: str, on_compared: Callable[[int], None] | None = None
    ) -> None:
        self.source = source
        self.path = path
        with contextlib.ExitStack() as opening:
            self._partial = PartialFile(path, source.size_bytes, on_compared)
            opening.callback(self._partial.close)
            self._target = _SummedTarget(path, source.size_bytes)
            opening.pop_all()
        self._taken_bytes = 0
        self._read: list[ByteRange] = []
        self._count_lock = threading.Lock()

    @property
    def fetched_bytes(self) -> int:
        """How many bytes came from the store since this was opened; not those that other ranks gave."""
        return self._partial.landed_bytes - self._taken_bytes

    @property
    def missing_bytes(self) -> int:
        """How many bytes of the object have not landed."""
        return sum(one.length for one in self._partial.missing([ByteRange(0, self.source.size_bytes)]))

    def missing_beside(self, ranges: Iterable[ByteRange]) -> int:
        """How many bytes of the object will be missing once `ranges` have landed."""
        left = subtract([ByteRange(0, self.source.size_bytes)], union(ranges))
        return total_bytes(self._partial.missing(left))

    def object_read(self, ranges: Iterable[ByteRange], peer: RangeSource | None = None) -> ObjectRead | None:
        """The read, from the store or from `peer`, that makes all of `ranges` land; None where they have already."""
        whole = ByteRange(0, self.source.size_bytes)
        missing = self._partial.missing(
            ByteRange(max(start, whole.start), min(stop, whole.stop)) for start, stop in ranges
        )
        if not missing:
            return None
        if peer is not None:
            return ObjectRead(peer, missing, self._target, self._taken, reads_along=False)
        return ObjectRead(self.source, missing, self._target, self._landed)

    def put(self, start: int, data: bytes) -> int:
        """Lands bytes that have come from the store by another way, where they had not; returns how many those are."""
        n_bytes = 0
        for here in self._partial.missing([ByteRange(start, start + len(data))]):
            part = memoryview(data)[here.start - start : here.stop - start]
            self._partial.write(here.start, part)
            self._partial.land(here.start, here.stop, crc32(part))
            n_bytes += here.length
        return n_bytes

    def adopt(self, other: RemoteFile, base: int) -> None:
        """Copies what has landed of `other`, in which this object begins at byte `base`."""
        for start, stop in self._partial.missing([ByteRange(0, self.source.size_bytes)]):
            for here in other._partial.landed(ByteRange(base + start, base + stop)):
                for at in range(here.start, here.stop, BLOCK_BYTES):
                    self._partial.adopt(at - base, other.read(at, min(BLOCK_BYTES, here.stop - at)))

    def ensure(self, ranges: Iterable[ByteRange], on_bytes: OnBytes) -> None:
        """Fetches what is missing of `ranges`, now. Raises as `read_ranges` does."""
        object_read = self.object_read(ranges)
        if object_read is not None:
            read_ranges([object_read], on_bytes)

    def fetch_again(self, ranges: Sequence[ByteRange], on_bytes: OnBytes) -> int:
        """Puts what the store has of `ranges`, all of which has landed, in the place of what is there; returns its
        bytes. Hold `cache.holes.fetching_again`. Raises as `read_ranges` does."""
        return fetch_again(self.source, self.path, ranges, on_bytes)

    def opener(self, on_bytes: OnBytes) -> Callable[[str], BinaryIO]:
        """A function like ``open`` for this object: reading the file that it returns fetches what is missing."""

        def open_file(path: str) -> BinaryIO:
            return cast(BinaryIO, io.BufferedReader(_FetchingFile(self, on_bytes), BLOCK_BYTES))

        return open_file

    def read(self, start: int, nbytes: int) -> bytes:
        """Bytes that have landed."""
        self._read.append(ByteRange(start, start + nbytes))
        return self._partial.read(start, nbytes)

    def forget_what_was_read(self) -> int:
        """Drops all bytes that `read` has returned, so that they are fetched again when they are needed; how many.

        For before other processes know of the file.
        """
        dropped = self._partial.landed_among(self._read)
        self._read = []
        self.forget(dropped)
        return total_bytes(dropped)

    def forget(self, ranges: Sequence[ByteRange]) -> None:
        """Drops `ranges`, as `forget_what_was_read` does."""
        self._partial.forget(ranges)

    @property
    def damaged_bytes(self) -> int:
        """How many bytes that an earlier load had landed were found to be wrong, and are fetched again."""
        return self._partial.damaged_bytes

    def close(self) -> None:
        self.source.close()
        self._target.close()
        self._partial.close()

    def _taken(self, start: int, stop: int) -> None:
        self._landed(start, stop)
        with self._count_lock:
            self._taken_bytes += stop - start

    def _landed(self, start: int, stop: int) -> None:
        self._partial.land(start, stop, self._target.sum_of(start, stop))


def open_remote_file(
    objects: ObjectCache, info: ObjectInfo, source: RangeSource, on_bytes: OnBytes
) -> RemoteFile:
    """The object's file in the cache, with what an earlier load landed in it.

    Where another process holds that file, this one gets a file of its own; a load waits a moment for a prefetch, which
    leaves its file to it. Raises OSError where the disk refuses.
    """

    def compared(count: int) -> None:
        # Shows that something moves, without counting as fetched.
        on_bytes(count)
        on_bytes(-count)

    described = objects.store.describe(info.name)
    entry = objects.entry(info.name, source.size_bytes, source.version, nbytes=source.size_bytes)
    for slot in (PARTS, f"{PARTS}-{uuid.uuid4().hex}"):
        folder = os.path.join(entry.folder, slot)
        make_private(folder)
        while True:
            # BlockingIOError: another job on this node holds the first.
            with contextlib.suppress(BlockingIOError):
                return RemoteFile(source, os.path.join(folder, product_name(described)), compared)
            if not entry.await_prefetch(on_bytes):
                break
    raise RankloadError(f"{described}: no file in {entry.folder} could be opened", path=described)


def fetch_again(source: RangeSource, path: str, ranges: Sequence[ByteRange], on_bytes: OnBytes) -> int:
    """`RemoteFile.fetch_again` of the file at `path`, for any process of the node."""
    target = FileDestination(path, source.size_bytes)
    try:
        with replace_bytes(path, ranges):
            return read_ranges([ObjectRead(source, ranges, target)], on_bytes).read_bytes
    finally:
        target.close()


class _SummedTarget(FileDestination):
    """Computes the CRC-32 of what is written, while the bytes are in the processor's cache."""

    def __init__(self, path: str, size_bytes: int) -> None:
        super().__init__(path, size_bytes)
        self._sums: dict[tuple[int, int], tuple[int, int]] = {}
        """Of each thread's consecutive bytes: (thread, end so far) to (start, CRC-32)."""

    def take(self, start: int, view: memoryview) -> None:
        super().take(start, view)
        thread = threading.get_ident()
        begin, value = self._sums.pop((thread, start), (start, 0))
        self._sums[thread, start + len(view)] = (begin, crc32(view, value))

    def sum_of(self, start: int, stop: int) -> int:
        """The CRC-32 of ``[start, stop)``, which this thread has just written."""
        begin, value = self._sums.pop((threading.get_ident(), stop), (-1, 0))
        return value if begin == start else self._read_again(start, stop)

    def _read_again(self, start: int, stop: int) -> int:
        """The same, of bytes that were not written consecutively: a stream that began anew."""
        with open(self.path, "rb") as file:
            return crc32_in_file(file.fileno(), start, stop)


class SharedFile(_SummedTarget):
    """The node's file at `path`, for any process of the node that lands bytes in it which no other one fetches.

    Other processes hear of them by the file's record (`cache.holes`).
    """

    def land(self, start: int, stop: int) -> None:
        """As `ranges.destinations.LandingFile`."""
        record_landed(self.path, start, stop, self.sum_of(start, stop))


class _FetchingFile(SeekableFile):
    """A position in a remote file; reading fetches what has not landed, in whole blocks."""

    def __init__(self, file: RemoteFile, on_bytes: OnBytes) -> None:
        super().__init__(file.source.size_bytes)
        self._file = file
        self._on_bytes = on_bytes

    def read_at(self, start: int, view: memoryview) -> int:
        first = start // BLOCK_BYTES * BLOCK_BYTES
        last = min(self.size_bytes, -(-(start + len(view)) // BLOCK_BYTES) * BLOCK_BYTES)
        self._file.ensure([ByteRange(first, last)], self._on_bytes)
        data = self._file.read(start, len(view))
        view[: len(data)] = data
        return len(data)
