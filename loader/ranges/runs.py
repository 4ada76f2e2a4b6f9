"""What one request of the range engine reads, and where its bytes go on the way. Free of torch.

wanted ranges  →  chunks, which land together  →  runs of adjacent chunks, one request each
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..byte_ranges import ByteRange, coalesce, intersect, split, union
from .base import RangeSource
from .targets import Target

_TRASH_BYTES = 64 << 10

Landed = Callable[[int, int], None]


@dataclass(frozen=True)
class Reading:
    """What is wanted of one object, and where it goes."""

    source: RangeSource
    ranges: Sequence[ByteRange]
    target: Target
    landed: Landed | None = None
    """Called as ``landed(start, stop)`` when those bytes are in place, every wanted byte once, in a reading thread,
    several at a time; what it raises stops everything."""
    reads_along: bool = True
    """Whether small gaps may be read along; not where the source has nothing there."""


@dataclass(frozen=True)
class Chunk:
    """Bytes of one object that land together."""

    reading: Reading
    span: ByteRange
    wanted: tuple[ByteRange, ...]
    """The parts of `span` that are; the rest is read along."""


@dataclass
class Run:
    """Adjacent chunks of one object, read by one request."""

    reading: Reading
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def start(self) -> int:
        """Of the first chunk."""
        return self.chunks[0].span.start

    @property
    def stop(self) -> int:
        """Of the last chunk."""
        return self.chunks[-1].span.stop

    def follows(self, chunk: Chunk) -> bool:
        """Whether `chunk` can be read by the same request."""
        return not self.chunks or (chunk.reading is self.reading and chunk.span.start == self.stop)


def chunks(readings: Iterable[Reading], chunk_bytes: int) -> Iterator[Chunk]:
    """What `readings` want, in their order."""
    for reading in readings:
        wanted = union(reading.ranges)
        # A server without ranges is read from the beginning, whatever is wanted.
        joined = coalesce(wanted) if reading.reads_along else wanted
        if not reading.source.has_ranges:
            joined = (ByteRange(0, wanted[-1].stop),)
        starts = [one.start for one in wanted]
        for span in split(joined, chunk_bytes=chunk_bytes):
            first = max(bisect_right(starts, span.start) - 1, 0)
            last = bisect_left(starts, span.stop)
            yield Chunk(reading, span, intersect(wanted[first:last], [span]))


class Filling:
    """One attempt's way through the memory that the bytes of a run go into, from `position` on."""

    def __init__(self, run: Run, position: int) -> None:
        self._run = run
        self._position = position
        self._view = memoryview(b"")
        self._start = 0
        self._filled = 0
        self._counts = False

    def views(self) -> Iterator[memoryview]:
        """Where the bytes go, in order; those that nobody wants go nowhere. For `source.read_into`."""
        trash = memoryview(bytearray(_TRASH_BYTES))
        position = self._position
        for chunk in self._run.chunks:
            for part in chunk.wanted:
                if part.stop > position:
                    yield from self._given(_nowhere(trash, part.start - position), position, counts=False)
                    position = max(position, part.start)
                    yield from self._given(
                        self._run.reading.target.views(position, part.stop), position, counts=True
                    )
                    position = part.stop
            yield from self._given(_nowhere(trash, chunk.span.stop - position), position, counts=False)
            position = max(position, chunk.span.stop)

    def arrived(self, n_bytes: int) -> None:
        """The next bytes are in the view that was given last."""
        self._filled += n_bytes
        if self._filled == len(self._view):
            self.end()

    def end(self) -> None:
        """Hands over what has come into the last view so far."""
        if self._counts and self._filled:
            self._run.reading.target.take(self._start, self._view[: self._filled])
        self._view, self._filled = memoryview(b""), 0

    def _given(self, views: Iterator[memoryview], position: int, *, counts: bool) -> Iterator[memoryview]:
        for view in views:
            self._view, self._start, self._filled, self._counts = view.cast("B"), position, 0, counts
            position += len(self._view)
            yield view


def _nowhere(trash: memoryview, n_bytes: int) -> Iterator[memoryview]:
    for start in range(0, n_bytes, len(trash)):
        yield trash[: min(len(trash), n_bytes - start)]
