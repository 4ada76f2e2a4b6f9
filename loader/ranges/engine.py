"""Reads many ranges of one or several objects, over as many connections as pay, directly into their destinations.

    wanted ranges  →  small gaps added  →  chunks  →  requests for adjacent chunks  →  landed, chunk by chunk

Requests get shorter towards the end, so that connections end together. One that fails goes on where it stopped, for as
long as `retries` decides; from a server without ranges, it begins anew.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..byte_ranges import CHUNK_BYTES, ByteRange, coalesce, overlap, split, union
from ..retries import Attempts, Progress, TryAgainError
from ..stores.base import OnBytes
from ..workers import Stop, run_jobs
from .base import RangeSource
from .concurrency import Concurrency
from .destinations import Destination
from .window import shared_source

__all__ = ["ObjectRead", "OnLanded", "ReadReport", "read_ranges"]

MAX_REQUEST_BYTES = 64 << 20
_TRASH_BYTES = 64 << 10
"""The buffer that the bytes of gaps go into."""
_CONFIRM_AT_ONCE = 16
_WAIT_S = 0.05
"""How often a waiting thread checks whether the work is given up."""

OnLanded = Callable[[int, int], None]
"""Called as ``landed(start, stop)`` when those bytes of an object are in its destination."""


@dataclass
class ReadReport:
    """What one call of `read_ranges` read."""

    wanted_bytes: int = 0
    read_bytes: int = 0
    """With small gaps, and what was read twice."""
    requests: int = 0
    retries: int = 0
    connections: int = 0
    """The most that read at once."""


@dataclass(frozen=True)
class ObjectRead:
    """What is wanted of one object, and where it goes."""

    source: RangeSource
    ranges: Sequence[ByteRange]
    destination: Destination
    landed: OnLanded | None = None
    """Called for every wanted byte once, in the reading threads, by several of them at a time. What it raises ends
    `read_ranges`."""
    reads_along: bool = True
    """Whether small gaps may be read, for the sake of fewer requests; not where the source lacks those bytes."""


@dataclass(frozen=True)
class Chunk:
    """Bytes of one object that land together."""

    object_read: ObjectRead
    span: ByteRange
    wanted: tuple[ByteRange, ...]
    """The parts of `span` that are wanted; the rest is read and dropped."""


@dataclass
class RangeRequest:
    """Adjacent chunks of one object, read by one request."""

    object_read: ObjectRead
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def start(self) -> int:
        """Where the first chunk begins."""
        return self.chunks[0].span.start

    @property
    def stop(self) -> int:
        """Where the last chunk ends."""
        return self.chunks[-1].span.stop

    def follows(self, chunk: Chunk) -> bool:
        """Whether `chunk` can be read by the same request."""
        return not self.chunks or (chunk.object_read is self.object_read and chunk.span.start == self.stop)


def read_ranges(
    reads: Iterable[ObjectRead],
    on_bytes: OnBytes,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    concurrency: Concurrency | None = None,
) -> ReadReport:
    """Reads everything that `reads` want, and calls `on_bytes` (see `stores.base.OnBytes`) in this thread.

    Small gaps between wanted ranges may be read too, and count. An object whose server does no ranges is streamed from
    its beginning. At most as many requests, of up to 64 MiB each, are under way as `concurrency` allows.

    The first error ends all reads, and is raised once they have ended: `NotFoundError`, `AccessError`, `CorruptError`
    where an object has changed or a body ended early in all attempts, or what a callback raised.
    """
    engine = _Engine(list(reads), on_bytes, chunk_bytes, concurrency or Concurrency())
    return engine.run()


class _Engine:
    """One call of `read_ranges`: its queue of chunks, its threads, and what they count."""

    def __init__(
        self, reads: list[ObjectRead], on_bytes: OnBytes, chunk_bytes: int, concurrency: Concurrency
    ) -> None:
        self._on_bytes = on_bytes
        self._concurrency = concurrency
        self._reads = [one for one in reads if union(one.ranges)]
        self._queue = deque(chunks(self._reads, chunk_bytes))
        self._left_bytes = sum(chunk.span.length for chunk in self._queue)
        self._progress = Progress()
        self._ready = threading.Condition()
        self._working = 0
        self._by_source: dict[int, int] = {}
        self._count_lock = threading.Lock()
        self._arrived = 0
        self._taken_back = 0
        self._reported = 0
        self.report = ReadReport(wanted_bytes=sum(one.length for r in reads for one in union(r.ranges)))

    def run(self) -> ReadReport:
        most = min(self._concurrency.most, len(self._queue))
        try:
            run_jobs(
                [self._work] * most, self._pass_on, n_threads=most, wanted=lambda: self._concurrency.limit
            )
        finally:
            self.report.read_bytes = self._arrived
        self._pass_on()
        _confirm([one.source for one in self._reads])
        return self.report

    def _count(self, n_bytes: int) -> None:
        now = time.monotonic()
        with self._count_lock:
            self._arrived += n_bytes
            before = self._concurrency.limit
            grew = self._concurrency.observe(now, self._arrived) > before
        if grew:
            with self._ready:
                self._ready.notify_all()

    def _pass_on(self) -> None:
        total = self._arrived - self._taken_back
        new, self._reported = total - self._reported, total
        self._on_bytes(new)

    def _work(self, stop: Stop) -> None:
        while (request := self._take(stop)) is not None:
            try:
                self._read(request, stop)
            finally:
                with self._ready:
                    self._working -= 1
                    self._by_source[id(shared_source(request.object_read.source))] -= 1
                    self._ready.notify()

    def _take(self, stop: Stop) -> RangeRequest | None:
        """The next request, once there is a connection for it; None where nothing is left."""
        while True:
            stop.check()
            with self._ready:
                if not self._queue:
                    self._ready.notify_all()
                    return None
                if self._working < self._concurrency.limit and (request := self._next_request()) is not None:
                    self._working += 1
                    key = id(shared_source(request.object_read.source))
                    self._by_source[key] = self._by_source.get(key, 0) + 1
                    self.report.requests += 1
                    self.report.connections = max(self.report.connections, self._working)
                    return request
                self._ready.wait(_WAIT_S)

    def _next_request(self) -> RangeRequest | None:
        """Adjacent chunks of the first object that may have one more connection."""
        free = (
            index
            for index, chunk in enumerate(self._queue)
            if self._by_source.get(id(shared_source(chunk.object_read.source)), 0)
            < chunk.object_read.source.max_connections
        )
        index = next(free, None)
        if index is None:
            return None
        self._queue.rotate(-index)
        request = RangeRequest(self._queue[0].object_read)
        source = request.object_read.source
        length = 0
        # As if the connections that there may be soon were reading: on links where each is slow, all the others would
        # wait in the end for a long request that one of the first had taken.
        share = self._left_bytes // (2 * self._concurrency.soon)
        most = min(MAX_REQUEST_BYTES, share) if source.has_ranges else 1 << 62
        while self._queue and request.follows(self._queue[0]):
            length += self._queue[0].span.length
            if request.chunks and length > most:
                length -= self._queue[0].span.length
                break
            request.chunks.append(self._queue.popleft())
        self._queue.rotate(index)
        self._left_bytes -= length
        return request

    def _read(self, request: RangeRequest, stop: Stop) -> None:
        source = request.object_read.source
        position = furthest = request.start
        attempts = Attempts(source.outages, source.describe(), self._progress)
        pending = deque(request.chunks)
        n_landed = 0

        filling = Filling(request, position)

        def arrived(n_bytes: int) -> None:
            nonlocal position, furthest, n_landed
            stop.check()
            if not n_bytes:
                # A rank that hands out what it fetches itself may wait for the store: that is its own wait.
                if source.kind != "peer":
                    attempts.quiet()
                return
            filling.arrived(n_bytes)
            position += n_bytes
            # What comes again of a stream that began anew is no progress.
            if position > furthest:
                furthest = position
                attempts.moved()
            self._count(n_bytes)
            while pending and pending[0].span.stop <= position:
                chunk = pending.popleft()
                # Of a stream that began anew, the first chunks have been reported before.
                if len(request.chunks) - len(pending) > n_landed:
                    n_landed += 1
                    for part in chunk.wanted if request.object_read.landed is not None else ():
                        request.object_read.landed(part.start, part.stop)  # type: ignore[misc]

        with attempts:
            while pending:
                filling = Filling(request, position)
                try:
                    source.read_into(position, request.stop, filling.views(), arrived)
                except TryAgainError as error:
                    filling.end()
                    with self._count_lock:
                        self.report.retries += 1
                        if error.throttled:
                            self._concurrency.throttled(time.monotonic())
                        if not source.has_ranges:
                            self._taken_back += position - request.start
                    if not source.has_ranges:
                        position = request.start
                        pending = deque(request.chunks)
                    attempts.failed(error, stop.check)


def _confirm(sources: Iterable[RangeSource]) -> None:
    """`RangeSource.confirm` of each, at the same time: it may be a request."""
    each = list({id(shared_source(one)): shared_source(one) for one in sources}.values())
    if len(each) == 1:
        each[0].confirm()
        return
    jobs = [lambda stop, one=one: one.confirm() for one in each]
    most = min([_CONFIRM_AT_ONCE, *(one.max_connections for one in each)])
    run_jobs(jobs, lambda: None, n_threads=most)


def chunks(reads: Iterable[ObjectRead], chunk_bytes: int) -> Iterator[Chunk]:
    """What `reads` want, in their order, cut as `byte_ranges.split` does."""
    for object_read in reads:
        wanted = union(object_read.ranges)
        joined = coalesce(wanted) if object_read.reads_along else wanted
        # A server without ranges is read from the beginning, whatever is wanted.
        if not object_read.source.has_ranges:
            joined = (ByteRange(0, wanted[-1].stop),)
        starts = [one.start for one in wanted]
        for span in split(joined, chunk_bytes=chunk_bytes):
            first = max(bisect_right(starts, span.start) - 1, 0)
            last = bisect_left(starts, span.stop)
            yield Chunk(object_read, span, overlap(wanted[first:last], [span]))


class Filling:
    """Where the bytes of one attempt at a request go, from `position` on, and which of them have come."""

    def __init__(self, request: RangeRequest, position: int) -> None:
        self._request = request
        self._position = position
        self._view = memoryview(b"")
        self._start = 0
        self._filled = 0
        self._counts = False

    def views(self) -> Iterator[memoryview]:
        """Where the bytes go, in order, for `RangeSource.read_into`; those of gaps go into a buffer of their own."""
        trash = memoryview(bytearray(_TRASH_BYTES))
        position = self._position
        for chunk in self._request.chunks:
            for part in chunk.wanted:
                if part.stop > position:
                    yield from self._given(_nowhere(trash, part.start - position), position, counts=False)
                    position = max(position, part.start)
                    yield from self._given(
                        self._request.object_read.destination.views(position, part.stop),
                        position,
                        counts=True,
                    )
                    position = part.stop
            yield from self._given(_nowhere(trash, chunk.span.stop - position), position, counts=False)
            position = max(position, chunk.span.stop)

    def arrived(self, n_bytes: int) -> None:
        """Counts bytes that have come into the view that was given last."""
        self._filled += n_bytes
        if self._filled == len(self._view):
            self.end()

    def end(self) -> None:
        """Hands the destination what has come into the last view so far."""
        if self._counts and self._filled:
            self._request.object_read.destination.take(self._start, self._view[: self._filled])
        self._view, self._filled = memoryview(b""), 0

    def _given(self, views: Iterator[memoryview], position: int, *, counts: bool) -> Iterator[memoryview]:
        for view in views:
            self._view, self._start, self._filled, self._counts = view.cast("B"), position, 0, counts
            position += len(self._view)
            yield view


def _nowhere(trash: memoryview, n_bytes: int) -> Iterator[memoryview]:
    for start in range(0, n_bytes, len(trash)):
        yield trash[: min(len(trash), n_bytes - start)]
