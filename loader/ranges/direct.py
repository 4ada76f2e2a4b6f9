"""Bytes that one rank reads from the store straight into its tensors, past the node's files. Free of torch."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from ..byte_ranges import ByteRange, total_bytes, union
from ..stores.base import OnBytes
from .base import RangeSource
from .concurrency import MOST, START, Concurrency
from .engine import ObjectRead, ReadReport, read_ranges
from .targets import MemoryTarget

SINGLE_CHUNK_BYTES = 2 << 20
"""What is read piece by piece is spread over connections in such chunks."""

OnLanded = Callable[[int, int], None]


@dataclass
class Placement:
    """What goes where of one file: memory for its bytes from a position on, and headers to be kept."""

    pieces: list[tuple[int, memoryview]] = field(default_factory=list)
    headers: list[ByteRange] = field(default_factory=list)
    landed: OnLanded | None = None
    """As in `range_engine.ObjectRead`."""


class DirectReads:
    """The `ranges` that this rank reads so, by path on this node. Used by one thread.

    `open_source` opens the object that is behind a path, at the version that the node's file has. `on_bytes` is told
    of bytes as they arrive (and may raise). `n_neighbours` ranks of this node, itself among them, do the same.
    """

    def __init__(
        self,
        ranges: Mapping[str, Sequence[ByteRange]],
        open_source: Callable[[str], RangeSource],
        on_bytes: OnBytes,
        *,
        n_neighbours: int = 1,
    ) -> None:
        self._ranges = {path: union(pieces) for path, pieces in ranges.items() if pieces}
        self._starts = {path: [one.start for one in pieces] for path, pieces in self._ranges.items()}
        self._open_source = open_source
        self._on_bytes = on_bytes
        self._n_neighbours = n_neighbours
        self._headers: dict[tuple[str, int], bytearray] = {}
        self.fetched_bytes: dict[str, int] = {}
        """What was read so far, by path, with what was read along or twice."""

    @property
    def nbytes(self) -> int:
        """How many bytes are read so, at most."""
        return sum(total_bytes(pieces) for pieces in self._ranges.values())

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def of(self, path: str, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Which bytes of ``[start, stop)`` are read so."""
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
        """Fills all pieces, of which every byte is one of `of`'s, over all files at once; by path.

        Headers are read along where they are among the ranges, and kept for `header`. Raises as `read_ranges` does;
        some pieces have been written by then.
        """
        readings = []
        for path, placement in wanted.items():
            pieces = list(placement.pieces)
            for header in placement.headers:
                if self.of(path, *header) == (header,):
                    memory = self._headers[path, header.start] = bytearray(header.length)
                    pieces.append((header.start, memoryview(memory)))
            spans = union((start, start + view.nbytes) for start, view in pieces)
            readings.append(
                ObjectRead(self._open_source(path), spans, MemoryTarget(pieces), placement.landed)
            )
            self._add(path, total_bytes(spans))
        if readings:
            self._settle(next(iter(wanted)), read_ranges(readings, self._on_bytes, pace=self._pace()))

    def read(self, path: str, start: int, view: memoryview) -> None:
        """Fills `view` with the bytes from `start` on, which are among `of`'s, now."""
        span = ByteRange(start, start + view.nbytes)
        reading = ObjectRead(self._open_source(path), [span], MemoryTarget([(start, view)]))
        self._add(path, span.length)
        self._settle(path, read_ranges([reading], self._on_bytes, chunk_bytes=SINGLE_CHUNK_BYTES))

    def header(self, path: str, start: int) -> Callable[[str], BinaryIO] | None:
        """What opens the header that begins at `start` as if it were in the file, where `place` kept it."""
        kept = self._headers.get((path, start))
        if kept is None:
            return None
        return lambda _: cast(BinaryIO, _At(bytes(kept), start))

    def _pace(self) -> Concurrency:
        """A node's ranks together begin with about as many connections as one that fetches for all, and may come to
        twice as many: they have more processors."""
        return Concurrency(max(2, START // self._n_neighbours), max(8, 2 * MOST // self._n_neighbours))

    def _add(self, path: str, n_bytes: int) -> None:
        self.fetched_bytes[path] = self.fetched_bytes.get(path, 0) + n_bytes

    def _settle(self, path: str, report: ReadReport) -> None:
        # Which file the bytes beside the wanted ones belong to is not told; they are few.
        self._add(path, report.read_bytes - report.wanted_bytes)


class _At(io.BytesIO):
    """Bytes that stand at `base` of a file."""

    def __init__(self, data: bytes, base: int) -> None:
        super().__init__(data)
        self._base = base

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return super().seek(max(0, offset - self._base) if whence == io.SEEK_SET else offset, whence)
