"""A remote object that comes to this node in parts, as they are asked for: its source, its file, what has landed."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import uuid
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, BinaryIO, cast

from ..byte_ranges import ByteRange
from ..cache.holes import PartialFile
from ..cache.records import PARTS, product_name
from ..checksums import crc32
from ..errors import RankloadError
from ..ranges.base import RangeSource
from ..ranges.engine import ObjectRead, read_ranges
from ..ranges.targets import FileTarget
from ..stores.base import ObjectInfo, OnBytes, Store

if TYPE_CHECKING:
    from ..cache.node import NodeCache

BLOCK_BYTES = 64 << 10
"""What an index is read in."""


class RemoteFile:
    """One object, on the rank that fetches for its node. `close` it; the file stays for as long as its cache entry.

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
        self._count_lock = threading.Lock()

    @property
    def fetched_bytes(self) -> int:
        """What has landed from the store since it was opened."""
        return self._partial.landed_bytes - self._taken_bytes

    @property
    def resumed_bytes(self) -> int:
        """What an earlier process had landed."""
        return self._partial.resumed_bytes

    @property
    def missing_bytes(self) -> int:
        """How much of it is not here."""
        return sum(one.length for one in self._partial.missing([ByteRange(0, self.source.size_bytes)]))

    def reading(self, ranges: Iterable[ByteRange], peer: RangeSource | None = None) -> ObjectRead | None:
        """What is to be read, of the store or of `peer`, so that `ranges` are here; None where all of them are."""
        whole = ByteRange(0, self.source.size_bytes)
        missing = self._partial.missing(
            ByteRange(max(start, whole.start), min(stop, whole.stop)) for start, stop in ranges
        )
        if not missing:
            return None
        if peer is not None:
            return ObjectRead(peer, missing, self._target, self._taken, reads_along=False)
        return ObjectRead(self.source, missing, self._target, self._landed)

    def adopt(self, other: RemoteFile, base: int) -> None:
        """Takes over what has landed of `other`, in which this object begins at byte `base`."""
        for start, stop in self._partial.missing([ByteRange(0, self.source.size_bytes)]):
            for here in other._partial.landed(ByteRange(base + start, base + stop)):
                for at in range(here.start, here.stop, BLOCK_BYTES):
                    self._partial.adopt(at - base, other.read(at, min(BLOCK_BYTES, here.stop - at)))

    def ensure(self, ranges: Iterable[ByteRange], on_bytes: OnBytes) -> None:
        """Brings `ranges` here now. Raises as `read_ranges` does."""
        reading = self.reading(ranges)
        if reading is not None:
            read_ranges([reading], on_bytes)

    def opener(self, on_bytes: OnBytes) -> Callable[[str], BinaryIO]:
        """What opens it for reading, as a file whose parts come when they are read."""

        def open_file(path: str) -> BinaryIO:
            return cast(BinaryIO, io.BufferedReader(_Fetching(self, on_bytes), BLOCK_BYTES))

        return open_file

    def read(self, start: int, nbytes: int) -> bytes:
        """Bytes that are here."""
        return self._partial.read(start, nbytes)

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


class _SummedTarget(FileTarget):
    """Sums what is written while it is in the processor's cache."""

    def __init__(self, path: str, size_bytes: int) -> None:
        super().__init__(path, size_bytes)
        self._sums: dict[tuple[int, int], tuple[int, int]] = {}
        """Thread, and where its run of bytes ends so far, to where it begins and its CRC-32."""

    def take(self, start: int, view: memoryview) -> None:
        super().take(start, view)
        thread = threading.get_ident()
        begin, value = self._sums.pop((thread, start), (start, 0))
        self._sums[thread, start + len(view)] = (begin, crc32(view, value))

    def sum_of(self, start: int, stop: int) -> int:
        """The CRC-32 of bytes that this thread has written, of which those up to `stop` were the last."""
        begin, value = self._sums.pop((threading.get_ident(), stop), (-1, 0))
        return value if begin == start else self._read_again(start, stop)

    def _read_again(self, start: int, stop: int) -> int:
        """For what was not written in one go: a stream that began anew."""
        value = 0
        with open(self.path, "rb") as file:
            for position in range(start, stop, BLOCK_BYTES):
                file.seek(position)
                value = crc32(file.read(min(BLOCK_BYTES, stop - position)), value)
        return value


def open_remote_file(
    store: Store,
    info: ObjectInfo,
    source: RangeSource,
    cache: NodeCache,
    load_id: str,
    described: str,
    on_bytes: OnBytes,
) -> RemoteFile:
    """The object's file in `cache`, with what an earlier load landed in it. Raises as `RemoteFile` does."""

    def compared(count: int) -> None:
        # Something moves, and nothing was fetched.
        on_bytes(count)
        on_bytes(-count)

    # What has no version can't be told from what it was yesterday.
    version = source.version or f"load {load_id}"
    size = source.size_bytes
    entry = cache.entry(
        described,
        store.identity,
        info.name,
        str(size),
        version,
        nbytes=size,
        lasting=source.version is not None,
    )
    for slot in (PARTS, f"{PARTS}-{uuid.uuid4().hex}"):
        folder = os.path.join(entry.folder, slot)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        # Where another job on this node is at it, this one has a file of its own.
        with contextlib.suppress(BlockingIOError):
            return RemoteFile(source, os.path.join(folder, product_name(described)), compared)
    raise RankloadError(f"{described}: no file in {entry.folder} could be opened", path=described)


class _Fetching(io.RawIOBase):
    """A position in a remote file; reading brings what is read here, in whole blocks."""

    def __init__(self, file: RemoteFile, on_bytes: OnBytes) -> None:
        super().__init__()
        self._file = file
        self._on_bytes = on_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.source.size_bytes}[
            whence
        ]
        if base + offset < 0:
            raise OSError(22, "a position before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = self._file.source.size_bytes
        start, stop = self._position, min(size, self._position + len(buffer))
        if start >= stop:
            return 0
        first = start // BLOCK_BYTES * BLOCK_BYTES
        last = min(size, -(-stop // BLOCK_BYTES) * BLOCK_BYTES)
        self._file.ensure([ByteRange(first, last)], self._on_bytes)
        data = self._file.read(start, stop - start)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
