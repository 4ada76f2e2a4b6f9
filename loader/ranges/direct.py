"""Reads ranges of remote files directly into one rank's tensors, without the node's cache. Free of torch.

`DirectReads.place` reads many ranges at once, `DirectReads.read` one; both by `engine.read_ranges`. Short ranges beside
those come along by the same requests, and go into the node's file, where they are read as all that lies there is.
"""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from ..byte_ranges import ByteRange, coalesce, overlap, subtract, total_bytes, union
from ..stores.base import OnBytes
from .base import RangeSource
from .concurrency import MOST, START, Concurrency
from .destinations import (
    Destination,
    FirstWrite,
    LandingFile,
    MemoryDestination,
    ScatteredDestination,
)
from .engine import ObjectRead, OnLanded, ReadReport, read_ranges

SINGLE_CHUNK_BYTES = 2 << 20
"""The chunks of a single range, so that several connections share it."""


@dataclass
class Placement:
    """What is read of one file, and where it goes."""

    pieces: list[tuple[int, memoryview]] = field(default_factory=list)
    """Memory for the file's bytes from a position on, as for `MemoryDestination`."""
    first_writes: dict[int, FirstWrite] = field(default_factory=dict)
    """As for `MemoryDestination`."""
    headers: list[ByteRange] = field(default_factory=list)
    """The ranges of storages' headers, to be kept for `DirectReads.header`."""
    landed: OnLanded | None = None
    """As in `engine.ObjectRead`."""


class DirectReads:
    """The `ranges` that this rank reads directly, by the path of their file on this node. Used by one thread.

    `open_source` opens the object of a path, at the version that the node's file has. `on_bytes` is called as bytes
    arrive, and may raise. `n_neighbours` is how many ranks of this node, this one included, read directly.

    The ranges `along`, by path too, come with those around them into the node's file, which ``open_file(path,
    size_bytes)`` opens for writing. `close` it then.
    """

    def __init__(
        self,
        ranges: Mapping[str, Sequence[ByteRange]],
        open_source: Callable[[str], RangeSource],
        on_bytes: OnBytes,
        *,
        n_neighbours: int = 1,
        along: Mapping[str, Sequence[ByteRange]] | None = None,
        open_file: Callable[[str, int], LandingFile] | None = None,
    ) -> None:
        self._ranges = {path: union(spans) for path, spans in ranges.items() if spans}
        self._starts = {path: [one.start for one in spans] for path, spans in self._ranges.items()}
        self._open_source = open_source
        self._on_bytes = on_bytes
        self._n_neighbours = n_neighbours
        self._along = {path: union(spans) for path, spans in (along or {}).items() if spans}
        """What has not come along so far."""
        self._open_file = open_file
        self._files: dict[str, LandingFile] = {}
        self._headers: dict[tuple[str, int], bytearray] = {}
        self.fetched_bytes: dict[str, int] = {}
        """How many bytes were read so far, by path, with gaps and what was read twice."""

    @property
    def nbytes(self) -> int:
        """How many bytes the ranges hold."""
        return sum(total_bytes(spans) for spans in self._ranges.values())

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def of(self, path: str, start: int, stop: int) -> tuple[ByteRange, ...]:
        """The bytes of ``[start, stop)`` that are among the ranges of `path`."""
        held = self._ranges.get(path)
        if not held:
            return ()
        at = max(bisect_right(self._starts[path], start) - 1, 0)
        found = []
        while at < len(held) and held[at].start < stop:
            common = ByteRange(max(start, held[at].start), min(stop, held[at].stop))
            if common.start < common.stop:
                found.append(common)
            at += 1
        return tuple(found)

    def place(self, wanted: Mapping[str, Placement]) -> None:
        """Fills the memory in `wanted`, by path, over all files at once. Every byte of it must be among the ranges.

        Headers that are among the ranges are read too, and kept for `header`. Raises as `read_ranges` does; some memory
        has been written by then.
        """
        reads = []
        for path, placement in wanted.items():
            pieces = list(placement.pieces)
            for header in placement.headers:
                if self.of(path, *header) == (header,):
                    memory = self._headers[path, header.start] = bytearray(header.length)
                    pieces.append((header.start, memoryview(memory)))
            spans = union((start, start + view.nbytes) for start, view in pieces)
            into = MemoryDestination(pieces, placement.first_writes)
            reads.append(self._read_of(path, spans, into, self._around(path, spans), placement.landed))
        if reads:
            report = read_ranges(reads, self._on_bytes, concurrency=self._concurrency())
            self._settle(next(iter(wanted)), report)

    def open_all(self) -> None:
        """Opens the objects that the ranges are of, and the files that others come along into, so that none fails to
        open later. Raises as `open_source` and `open_file`."""
        for path in self._ranges:
            self._open_source(path)
        for path in self._along:
            self._file(path)

    def own(self, path: str, start: int, stop: int) -> tuple[ByteRange, ...]:
        """The bytes of ``[start, stop)`` that this rank reads itself: directly, or along with that, later than now."""
        return union(self.of(path, start, stop), overlap([ByteRange(start, stop)], self._along.get(path, ())))

    def bring(self, path: str, start: int, stop: int) -> None:
        """Has those bytes of ``[start, stop)`` land in the file that come along with others later, and those near them.

        For who needs them before what is around them is read. Raises as `read_ranges` does.
        """
        left = self._along.get(path, ())
        if not overlap([ByteRange(start, stop)], left):
            return
        near = [one for one in coalesce(left) if one.start < stop and start < one.stop]
        read = self._read_of(path, (), MemoryDestination(()), overlap(left, near), None)
        self._settle(path, read_ranges([read], self._on_bytes, concurrency=self._concurrency()))

    def close(self) -> None:
        """Ends writing into the node's files."""
        for file in self._files.values():
            file.close()

    def read(self, path: str, start: int, view: memoryview) -> None:
        """Fills `view` with the bytes from `start` on, which must be among the ranges. Raises as `read_ranges` does."""
        span = ByteRange(start, start + view.nbytes)
        object_read = ObjectRead(self._open_source(path), [span], MemoryDestination([(start, view)]))
        self._add(path, span.length)
        self._settle(path, read_ranges([object_read], self._on_bytes, chunk_bytes=SINGLE_CHUNK_BYTES))

    def read_header(self, path: str, header: ByteRange) -> None:
        """Reads the `header`, which must be among the ranges, and keeps it for `header`. Raises as `read_ranges`."""
        memory = bytearray(header.length)
        self.read(path, header.start, memoryview(memory))
        self._headers[path, header.start] = memory

    def header(self, path: str, start: int) -> Callable[[str], BinaryIO] | None:
        """Opens, when called, the file at `path` with only the header at `start` in it; None unless `place` kept it."""
        kept = self._headers.get((path, start))
        if kept is None:
            return None
        return lambda _: cast(BinaryIO, _At(bytes(kept), start))

    def _around(self, path: str, spans: Sequence[ByteRange]) -> tuple[ByteRange, ...]:
        """What comes along with `spans`: what one request reads with some of them (`coalesce`)."""
        left = self._along.get(path, ())
        if not left:
            return ()
        joined = coalesce([*spans, *left])
        starts = [one.start for one in spans]
        return overlap(
            left,
            [one for one in joined if bisect_left(starts, one.start) < bisect_left(starts, one.stop)],
        )

    def _read_of(
        self,
        path: str,
        spans: Sequence[ByteRange],
        memory: Destination,
        along: Sequence[ByteRange],
        on_landed: OnLanded | None,
    ) -> ObjectRead:
        """The read of `spans` into `memory`, and of `along` into the node's file; both are counted as read."""
        self._add(path, total_bytes([*spans, *along]))
        if not along:
            return ObjectRead(self._open_source(path), spans, memory, on_landed)
        self._along[path] = subtract(self._along[path], along)
        file = self._file(path)

        def landed(start: int, stop: int) -> None:
            span = [ByteRange(start, stop)]
            into_file = overlap(span, along)
            for one in into_file:
                file.land(*one)
            for one in subtract(span, into_file) if on_landed is not None else ():
                on_landed(*one)  # type: ignore[misc]

        into = ScatteredDestination(memory, file, along)
        return ObjectRead(self._open_source(path), union(spans, along), into, landed)

    def _file(self, path: str) -> LandingFile:
        if path not in self._files:
            if self._open_file is None:
                raise ValueError(f"ranges come along into {path}, which nothing opens")
            self._files[path] = self._open_file(path, self._open_source(path).size_bytes)
        return self._files[path]

    def _concurrency(self) -> Concurrency:
        """A node's ranks together begin with about as many connections as one that fetches for all, and may come to
        twice as many, since they have more processors."""
        return Concurrency(max(2, START // self._n_neighbours), max(8, 2 * MOST // self._n_neighbours))

    def _add(self, path: str, n_bytes: int) -> None:
        self.fetched_bytes[path] = self.fetched_bytes.get(path, 0) + n_bytes

    def _settle(self, path: str, report: ReadReport) -> None:
        # The report does not say of which file the other bytes are; they are few.
        self._add(path, report.read_bytes - report.wanted_bytes)


class _At(io.BytesIO):
    """A file with nothing but `data`, at position `base`."""

    def __init__(self, data: bytes, base: int) -> None:
        super().__init__(data)
        self._base = base

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return super().seek(max(0, offset - self._base) if whence == io.SEEK_SET else offset, whence)
