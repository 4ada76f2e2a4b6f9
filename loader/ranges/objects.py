"""Reads any bytes of one object, wherever it lies: of a local file in place, of a store's object by ranges.

For whoever looks into many objects, a little into each: `open_bytes` opens one, and what is read of it is kept nowhere.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

from ..byte_ranges import ByteRange
from ..errors import AccessError, CorruptError, NotFoundError
from ..http.connections import Connections
from ..retries import until_done
from ..store_errors import is_not_there
from ..stores.base import ObjectInfo, OnBytes, Store
from .base import RangeSource
from .concurrency import Concurrency
from .destinations import MemoryDestination
from .engine import ObjectRead, read_ranges
from .open import open_range_source
from .seekable import SeekableFile

_BUFFER_BYTES = 64 << 10


class ObjectBytes:
    """The bytes of one object, at one version where its store states any. Several threads may read."""

    def __init__(
        self,
        described: str,
        size_bytes: int,
        fill: Callable[[int, memoryview], None],
        source: RangeSource | None = None,
    ) -> None:
        self.described = described
        """What messages call the object."""
        self.size_bytes = size_bytes
        self._fill = fill
        self._source = source
        self._concurrency = Concurrency()

    def read_into(self, start: int, view: memoryview) -> None:
        """Fills `view` with the bytes from `start` on, all of which the object must have.

        Raises `CorruptError` where it has changed or ends before, `NotFoundError` or `AccessError`.
        """
        if len(view):
            self._fill(start, view)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes ``[start, stop)``, as far as there are any. Raises as `read_into`."""
        stop = min(stop, self.size_bytes)
        data = bytearray(max(0, stop - start))
        self.read_into(start, memoryview(data))
        return bytes(data)

    def read_much(self, start: int, view: memoryview, on_bytes: OnBytes) -> None:
        """As `read_into`, for many bytes: over several connections at once. For one thread at a time.

        `on_bytes` hears of them as they come (`stores.base.OnBytes`).
        """
        if self._source is None or not len(view):
            self.read_into(start, view)
            on_bytes(len(view))
            return
        wanted = ObjectRead(
            self._source, [ByteRange(start, start + len(view))], MemoryDestination([(start, view)])
        )
        read_ranges([wanted], on_bytes, concurrency=self._concurrency)

    def as_file(
        self, buffer_bytes: int = _BUFFER_BYTES, *, start: int = 0, stop: int | None = None
    ) -> BinaryIO:
        """The bytes ``[start, stop)``, or all, as a file to read from, which is read `buffer_bytes` at a time at least.

        The object must have them.
        """
        part = _AsFile(self, start, self.size_bytes if stop is None else stop)
        return cast(BinaryIO, io.BufferedReader(part, buffer_bytes))


@contextlib.contextmanager
def open_bytes(store: Store, info: ObjectInfo, connections: Connections) -> Iterator[ObjectBytes | None]:
    """The bytes of the object that ``store.stat`` says `info` of; None where the store gives whole objects only.

    Raises `NotFoundError`, `AccessError`, or `CorruptError` where the object is no longer the one in `info`.
    """
    if store.is_local:
        with open_local(store.local_path(info.name)) as found:
            yield found
        return
    described = store.describe(info.name)

    def idle() -> None:
        store.heard(0, described)

    source = until_done(store.outages, described, lambda: open_range_source(store, info, connections), idle)
    if source is None or not source.has_ranges:
        if source is not None:
            source.close()
        yield None
        return
    try:
        yield ObjectBytes(source.describe(), source.size_bytes, _filler(source, idle), source)
    finally:
        source.close()


def _filler(source: RangeSource, idle: Callable[[], None]) -> Callable[[int, memoryview], None]:
    def fill(start: int, view: memoryview) -> None:
        until_done(
            source.outages,
            source.describe(),
            lambda: source.read_into(start, start + len(view), [view]),
            idle,
        )

    return fill


@contextlib.contextmanager
def open_local(path: str) -> Iterator[ObjectBytes]:
    """The bytes of a file on this node. Raises `NotFoundError` or `AccessError`."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if is_not_there(error):
            raise NotFoundError(f"{path} is not there any more", path=path) from None
        raise _unreadable(path, error) from error

    def fill(start: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(file, [view[done:]], start + done)
            except OSError as error:
                raise CorruptError(
                    f"{path}: cannot be read at byte {start + done:,} ({error.strerror}): the disk may be failing; "
                    "take another copy of it",
                    path=path,
                ) from error
            if not count:
                raise CorruptError(
                    f"{path}: ends at byte {start + done:,}, expected more: it was cut short while it was read",
                    path=path,
                )
            done += count

    try:
        yield ObjectBytes(path, os.fstat(file).st_size, fill)
    finally:
        os.close(file)


def _unreadable(path: str, error: OSError) -> AccessError:
    return AccessError(
        f"{path}: it cannot be opened ({error.strerror}); check the permissions of the file and of the folders above "
        "it",
        path=path,
    )


class _AsFile(SeekableFile):
    def __init__(self, data: ObjectBytes, start: int, stop: int) -> None:
        super().__init__(stop - start)
        self._data = data
        self._start = start

    def read_at(self, start: int, view: memoryview) -> int:
        self._data.read_into(self._start + start, view)
        return len(view)
