"""Many ranges of one or several objects, read by as many connections as bring more, straight into their places.

    wanted ranges  →  small gaps read along  →  chunks  →  runs of chunks, one request each  →  landed, chunk by chunk

Runs get shorter towards the end, so that connections end together; a run that fails goes on where it stopped.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..byte_ranges import CHUNK_BYTES, ByteRange, coalesce, overlap, split, union
from ..store_errors import TryAgainError
from ..stores.base import OnBytes
from .base import RangeSource
from .concurrency import Concurrency
from .retries import Retries
from .targets import Target
from .window import shared_source
from .workers import Stop, run_jobs

__all__ = ["ObjectRead", "ReadReport", "read_ranges"]

MAX_RUN_BYTES = 64 << 20
_WAIT_S = 0.05


@dataclass
class ReadReport:
    """What a run came to."""

    wanted_bytes: int = 0
    read_bytes: int = 0
    """With the gaps that were read along, and what was read twice."""
    requests: int = 0
    retries: int = 0
    connections: int = 0
    """The most that were at work at once."""


def read_ranges(
    readings: Iterable[ObjectRead],
    on_bytes: OnBytes,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    pace: Concurrency | None = None,
) -> ReadReport:
    """Reads everything that `readings` want, and calls `on_bytes` (as `store.OnBytes` says) in this thread.

    Bytes that are read along are counted, too. An object whose server does no ranges is streamed once, from its
    beginning. The first error stops all: `NotFoundError`, `AccessError`, `CorruptError`, or what a callback raised.
    At most as many runs of 64 MiB are under way as `pace` has connections.
    """
    engine = _Engine(list(readings), on_bytes, chunk_bytes, pace or Concurrency())
    return engine.run()


class _Engine:
    def __init__(
        self, readings: list[ObjectRead], on_bytes: OnBytes, chunk_bytes: int, pace: Concurrency
    ) -> None:
        self._on_bytes = on_bytes
        self._pace = pace
        self._readings = [one for one in readings if union(one.ranges)]
        self._queue = deque(chunks(self._readings, chunk_bytes))
        self._left_bytes = sum(chunk.span.length for chunk in self._queue)
        self._retries = Retries(len(self._queue))
        self._ready = threading.Condition()
        self._working = 0
        self._by_source: dict[int, int] = {}
        self._count_lock = threading.Lock()
        self._arrived = 0
        self._taken_back = 0
        self._reported = 0
        self.report = ReadReport(wanted_bytes=sum(one.length for r in readings for one in union(r.ranges)))

    def run(self) -> ReadReport:
        most = min(self._pace.most, len(self._queue))
        try:
            run_jobs([self._work] * most, self._tell, n_threads=most, wanted=lambda: self._pace.limit)
        finally:
            self.report.read_bytes = self._arrived
            self.report.retries = self._retries.used
        self._tell()
        for reading in self._readings:
            reading.source.confirm()
        return self.report

    def _count(self, n_bytes: int) -> None:
        now = time.monotonic()
        with self._count_lock:
            self._arrived += n_bytes
            before = self._pace.limit
            grew = self._pace.observe(now, self._arrived) > before
        if grew:
            with self._ready:
                self._ready.notify_all()

    def _tell(self) -> None:
        total = self._arrived - self._taken_back
        new, self._reported = total - self._reported, total
        self._on_bytes(new)

    def _work(self, stop: Stop) -> None:
        while (run := self._take(stop)) is not None:
            try:
                self._read(run, stop)
            finally:
                with self._ready:
                    self._working -= 1
                    self._by_source[id(shared_source(run.reading.source))] -= 1
                    self._ready.notify()

    def _take(self, stop: Stop) -> RangeRequest | None:
        """The next run, once there is a connection for it; None where nothing is left."""
        while True:
            stop.check()
            with self._ready:
                if not self._queue:
                    self._ready.notify_all()
                    return None
                if self._working < self._pace.limit and (run := self._next_run()) is not None:
                    self._working += 1
                    key = id(shared_source(run.reading.source))
                    self._by_source[key] = self._by_source.get(key, 0) + 1
                    self.report.requests += 1
                    self.report.connections = max(self.report.connections, self._working)
                    return run
                self._ready.wait(_WAIT_S)

    def _next_run(self) -> RangeRequest | None:
        """Adjacent chunks of the first object that may have one more connection."""
        free = (
            index
            for index, chunk in enumerate(self._queue)
            if self._by_source.get(id(shared_source(chunk.reading.source)), 0)
            < chunk.reading.source.max_connections
        )
        index = next(free, None)
        if index is None:
            return None
        self._queue.rotate(-index)
        run = RangeRequest(self._queue[0].reading)
        source = run.reading.source
        length = 0
        # As if the connections that there may be soon were at work: on links where each is slow, a long run that one of
        # the first took would be what all the others wait for in the end.
        share = self._left_bytes // (2 * self._pace.soon)
        most = min(MAX_RUN_BYTES, share) if source.has_ranges else 1 << 62
        while self._queue and run.follows(self._queue[0]):
            length += self._queue[0].span.length
            if run.chunks and length > most:
                length -= self._queue[0].span.length
                break
            run.chunks.append(self._queue.popleft())
        self._queue.rotate(index)
        self._left_bytes -= length
        return run

    def _read(self, run: RangeRequest, stop: Stop) -> None:
        source = run.reading.source
        position = run.start
        attempt = 0
        pending = deque(run.chunks)
        n_landed = 0

        filling = Filling(run, position)

        def arrived(n_bytes: int) -> None:
            nonlocal position, attempt, n_landed
            stop.check()
            if not n_bytes:
                return
            attempt = 0
            filling.arrived(n_bytes)
            position += n_bytes
            self._count(n_bytes)
            while pending and pending[0].span.stop <= position:
                chunk = pending.popleft()
                # One that landed before its stream began anew has been told of.
                if len(run.chunks) - len(pending) > n_landed:
                    n_landed += 1
                    for part in chunk.wanted if run.reading.landed is not None else ():
                        run.reading.landed(part.start, part.stop)  # type: ignore[misc]

        while pending:
            filling = Filling(run, position)
            try:
                source.read_into(position, run.stop, filling.views(), arrived)
            except TryAgainError as error:
                filling.end()
                attempt += 1
                pause_s = self._retries.pause_s(error, attempt)
                if error.throttled:
                    with self._count_lock:
                        self._pace.throttled(time.monotonic())
                if not source.has_ranges:
                    with self._count_lock:
                        self._taken_back += position - run.start
                    position = run.start
                    pending = deque(run.chunks)
                _sleep(pause_s, stop)


def _sleep(seconds: float, stop: Stop) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        stop.check()
        time.sleep(min(left, _WAIT_S))


_TRASH_BYTES = 64 << 10

OnLanded = Callable[[int, int], None]


@dataclass(frozen=True)
class ObjectRead:
    """What is wanted of one object, and where it goes."""

    source: RangeSource
    ranges: Sequence[ByteRange]
    target: Target
    landed: OnLanded | None = None
    """Called as ``landed(start, stop)`` when those bytes are in place, every wanted byte once, in a reading thread,
    several at a time; what it raises stops everything."""
    reads_along: bool = True
    """Whether small gaps may be read along; not where the source has nothing there."""


@dataclass(frozen=True)
class Chunk:
    """Bytes of one object that land together."""

    reading: ObjectRead
    span: ByteRange
    wanted: tuple[ByteRange, ...]
    """The parts of `span` that are; the rest is read along."""


@dataclass
class RangeRequest:
    """Adjacent chunks of one object, read by one request."""

    reading: ObjectRead
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


def chunks(readings: Iterable[ObjectRead], chunk_bytes: int) -> Iterator[Chunk]:
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
            yield Chunk(reading, span, overlap(wanted[first:last], [span]))


class Filling:
    """One attempt's way through the memory that the bytes of a run go into, from `position` on."""

    def __init__(self, run: RangeRequest, position: int) -> None:
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
