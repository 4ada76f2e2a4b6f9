"""Says where the bytes of ranges go: memory that is there already, or a file of the object's size, filled in places."""

from __future__ import annotations

import errno
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from ..byte_ranges import ByteRange, union
from ..errors import CorruptError
from ..plurals import counted
from ..store_errors import disk_full

BUFFER_BYTES = 1 << 20
"""What is received before it is written: small enough to be in the processor's cache still."""
_FIRST_BYTES = 64 << 10
"""How much is received before memory of the caller's is first written."""


class FirstWrite:
    """Calls `note` before memory is first written that the caller of a load owns. Several threads may share it."""

    def __init__(self, note: Callable[[], None]) -> None:
        self._note = note
        self._lock = threading.Lock()
        self.noted = False

    def before(self) -> None:
        """To be called when there are bytes to write, before each write. Raises what `note` raises."""
        if self.noted:
            return
        with self._lock:
            if not self.noted:
                self._note()
                self.noted = True


class Destination(Protocol):
    """Takes bytes of one object. Called from several threads, never for the same bytes at once."""

    def views(self, start: int, stop: int) -> Iterator[memoryview]:
        """Writable memory for bytes ``[start, stop)``, in order; `take` is called for one before the next is used."""

    def take(self, start: int, view: memoryview) -> None:
        """Stores the bytes from `start` on, which are in `view`: one that `views` returned, or the beginning of one."""


class MemoryDestination:
    """Memory that is filled in place: of `pieces`, ``(start, view)`` takes the object's bytes from `start` on.

    Views are one-dimensional, contiguous and writable, of any item size. `first_writes` are those of the pieces that
    the caller of a load owns, by their start: until one was noted, its bytes are received elsewhere, so that a body
    that never comes is no change. Raises `ValueError` where pieces overlap, or cannot be written.
    """

    def __init__(
        self,
        pieces: Iterable[tuple[int, memoryview]],
        first_writes: Mapping[int, FirstWrite] | None = None,
    ) -> None:
        placed = sorted(((start, view.cast("B")) for start, view in pieces), key=lambda one: one[0])
        self._pieces = [(start, view) for start, view in placed if len(view)]
        self._starts = [start for start, _ in self._pieces]
        self._first_writes = first_writes or {}
        for (start, view), (after, _) in zip(self._pieces, self._pieces[1:], strict=False):
            if start + len(view) > after:
                raise ValueError(f"two pieces of memory take byte {after}")
            if view.readonly:
                raise ValueError("memory that can't be written")

    def views(self, start: int, stop: int) -> Iterator[memoryview]:
        position = start
        while position < stop:
            begin, view = self._piece(position)
            end = min(stop, begin + len(view))
            first = self._first_writes.get(begin)
            if first is not None and not first.noted:
                end = min(end, position + _FIRST_BYTES)
                yield memoryview(bytearray(end - position))
            else:
                yield view[position - begin : end - begin]
            position = end

    def take(self, start: int, view: memoryview) -> None:
        """Puts bytes that were received elsewhere into their place; others are there."""
        begin, piece = self._piece(start)
        if view.obj is not piece.obj:
            self._first_writes[begin].before()
            piece[start - begin : start - begin + len(view)] = view

    def _piece(self, position: int) -> tuple[int, memoryview]:
        """The piece that takes the byte at `position`."""
        index = bisect_right(self._starts, position) - 1
        begin, view = self._pieces[index] if index >= 0 else (position, memoryview(b""))
        if not begin <= position < begin + len(view):
            raise ValueError(f"byte {position} has no place in memory")
        return begin, view


class LandingFile(Destination, Protocol):
    """A file that is filled in places, and knows of what has landed in it."""

    def land(self, start: int, stop: int) -> None:
        """Says that bytes ``[start, stop)``, which this thread has just put there, are in place."""

    def close(self) -> None:
        """Ends writing: what comes later is refused."""


class ScatteredDestination:
    """The `spans` of an object go into `file`, all else into `memory`. No call is for bytes of both."""

    def __init__(self, memory: Destination, file: Destination, spans: Iterable[ByteRange]) -> None:
        self._memory = memory
        self._file = file
        self._spans = union(spans)

    def views(self, start: int, stop: int) -> Iterator[memoryview]:
        position = start
        while position < stop:
            into_file, end = self._piece(position)
            end = min(stop, end)
            yield from (self._file if into_file else self._memory).views(position, end)
            position = end

    def take(self, start: int, view: memoryview) -> None:
        into_file, _ = self._piece(start)
        (self._file if into_file else self._memory).take(start, view)

    def _piece(self, position: int) -> tuple[bool, int]:
        """Whether the byte at `position` goes into the file, and where the bytes end that go to the same place."""
        at = bisect_right(self._spans, position, key=lambda span: span.start)
        if at and position < self._spans[at - 1].stop:
            return True, self._spans[at - 1].stop
        return False, self._spans[at].start if at < len(self._spans) else 1 << 63


class FileDestination:
    """A file of `size_bytes`, sparse where nothing has landed. `close` it.

    The file is made where it is missing (0600) and kept as it is where it has that size; raises `CorruptError` where it
    has another, `AccessError` where the disk is full. Bytes are received into a small buffer and written from there:
    the pages of a mapped file would be zeroed first, which costs several times as much.
    """

    def __init__(self, path: str, size_bytes: int) -> None:
        self.path = path
        self._idle = threading.Condition()
        self._one_writes = threading.Lock()
        self._writing = 0
        self._closed = False
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            held = os.fstat(self._fd).st_size
            if held not in (0, size_bytes):
                raise CorruptError(f"{path}: holds {counted(held, 'byte')}, expected {size_bytes}", path=path)
            os.ftruncate(self._fd, size_bytes)
        except BaseException:
            os.close(self._fd)
            raise

    def views(self, start: int, stop: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(BUFFER_BYTES, stop - start)))
        # All writes but the first begin at a page.
        first = start - start % BUFFER_BYTES
        for begin in range(first, stop, BUFFER_BYTES):
            yield buffer[: min(begin + BUFFER_BYTES, stop) - max(begin, start)]

    def take(self, start: int, view: memoryview) -> None:
        with self._idle:
            if self._closed:
                raise ValueError(f"{self.path} is closed")
            self._writing += 1
        try:
            self._write(start, view)
        finally:
            with self._idle:
                self._writing -= 1
                self._idle.notify_all()

    def close(self) -> None:
        """Closes the file once writes under way have ended. `take` raises `ValueError` from then on: a read that was
        given up but goes on must not write, since the descriptor may be another file's."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: not self._writing)
            os.close(self._fd)

    def _write(self, start: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                # The kernel writes to a file for one thread at a time, and the others would spin: here they sleep.
                with self._one_writes:
                    done += os.pwrite(self._fd, view[done:], start + done)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise disk_full(self.path) from error
                raise
