"""Asks for the first bytes of objects at once, instead of asking what there is of them: `FirstAnswers`.

A GET tells what HEAD would: whether the object is there, its size and its version. What else is known to be needed of
it is asked for at the same time, and taken where its answer is of the same version.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from ..byte_ranges import ByteRange
from ..errors import AccessError, CorruptError, NotFoundError
from ..http.answers import (
    Arrived,
    Headers,
    Pin,
    check_partial_answer,
    content_length,
    content_range,
    cut_short,
    pin_of,
    status_error,
)
from ..http.exchange import Answer
from ..http.redirects import Followed
from ..retries import Outages, TryAgainError, until_done
from ..workers import Stop, stopped_by
from .base import Heard, ObjectInfo
from .sums import StoredSum, in_headers, in_linked

T = TypeVar("T")

WHOLE = frozenset({200, 203})
"""Answers to a GET that carry the object: any other says something else, or brings a part that was not asked for."""
_PAGES = ("text/html", "application/xhtml+xml")
_MOST_KEPT = 8
"""How many answers with whole objects are kept open: each has a connection of its own."""
_AT_ONCE = 32
"""How many parts of objects are asked for at once."""
_LONGER_BYTES = 64 << 10
"""By how much an object may be longer than others of its kind, for its end to be found where theirs is."""
_NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True)
class FirstBytes:
    """What the answers to the first requests for an object brought: its version, and bytes of it."""

    info: ObjectInfo
    pin: Pin
    url: str | None = field(repr=False)
    """Where redirects led, which may be signed; None where there were none."""
    has_ranges: bool
    sums: tuple[StoredSum, ...]
    """Checksums of the whole object."""
    parts: tuple[tuple[int, bytes], ...] = field(repr=False)
    """Bytes from a position on, in order."""
    rest: Followed | None = field(default=None, repr=False)
    """An answer with the whole object, of which nothing was read: its server does no ranges."""

    @property
    def all_bytes(self) -> bytes | None:
        """The whole object; None where not all of it came."""
        data = b"".join(part for _, part in self.parts)
        return data if len(data) == self.info.size_bytes else None

    def beginning(self, n_bytes: int) -> bytes | None:
        """The first `n_bytes`, or all of a smaller object; None where they have not come."""
        start = self.parts[0][1] if self.parts and self.parts[0][0] == 0 else b""
        return (
            start[:n_bytes] if start and len(start) >= min(n_bytes, self.info.size_bytes or n_bytes) else None
        )


class Asking(Protocol):
    """How a store is asked; its methods are those of `HttpStore`."""

    def describe(self, name: str) -> str:
        """As `Store.describe`."""

    def get(self, name: str, span: str) -> Followed:
        """The answer to one GET for the bytes `span`, whatever its status. Raises as `follow`."""

    def waits(self, name: str) -> Arrived:
        """What is called while an answer about `name` comes."""

    def until_done(self, name: str, work: Callable[[], None]) -> None:
        """Calls `work` until it does not raise `TryAgainError` any more, or patience ends."""

    def add_sums(self, name: str, sums: tuple[StoredSum, ...], *, of_whole: bool) -> None:
        """Keeps the checksums that an answer stated; `of_whole`: there are no others."""


class FirstAnswers:
    """What was asked of objects before anything else, by name. Threads may share it."""

    def __init__(self, store: Asking) -> None:
        self._store = store
        self._first: dict[str, FirstBytes | None] = {}
        self._sizes: dict[str, int] = {}
        """Of an object whose end is needed, by its name without numbers: others of its kind are about as long."""
        self._connections = threading.BoundedSemaphore(_AT_ONCE)
        self.latency_s = 0.0
        """How long the fastest answer took; 0 where nothing was asked."""

    def __contains__(self, name: str) -> bool:
        """Whether it was asked for, and told of."""
        return name in self._first

    def get(self, name: str) -> FirstBytes | None:
        """What came; None where nothing was asked, or nothing is there."""
        return self._first.get(name)

    def note(self, name: str, first: FirstBytes | None, took_s: float) -> None:
        """Keeps what was asked for in another way, within `took_s`; None: nothing is there."""
        self.latency_s = min(self.latency_s or took_s, took_s)
        self._first[name] = first

    def describe(self, name: str, info: ObjectInfo) -> None:
        """Puts `info` in the place of what the answer said of the object, whose size must be the same.

        Where it is not, what came is dropped.
        """
        first = self._first.get(name)
        if first is not None and first.info.size_bytes == info.size_bytes:
            self._first[name] = replace(first, info=info)
        else:
            self.forget(name)

    def take(self, name: str) -> FirstBytes | None:
        """As `get`, once: the caller has what may be open in it."""
        return self._first.pop(name, None)

    def forget(self, name: str) -> None:
        """Drops what came."""
        first = self._first.pop(name, None)
        if first is not None and first.rest is not None:
            first.rest.answer.drop()

    def close(self) -> None:
        """Drops all that came."""
        for name in list(self._first):
            self.forget(name)

    def ask(
        self,
        name: str,
        n_bytes: int,
        and_last: Callable[[bytes], bool] | None,
        parts: Sequence[ByteRange] = (),
        *,
        last_later: bool = False,
    ) -> None:
        """Asks for the first `n_bytes` of an object, and at the same time for its `parts`.

        Where the first bytes show, to `and_last`, that the last as many are needed too, they are asked for next (with
        `last_later`, by a second call); at the same time, where an object of the same kind tells how long it is about.
        Where the answer says nothing of the object, nothing is known afterwards. Raises as `Store.stat`.
        """
        if name not in self._first:
            self._ask(name, n_bytes, parts, has_last=and_last is not None and not last_later)
        first = self._first.get(name)
        if first is None or and_last is None or not first.parts or not and_last(first.parts[0][1]):
            return
        self._sizes.setdefault(_kind_of(name), first.info.size_bytes or 0)
        if not last_later and first.has_ranges:
            self._store.until_done(name, lambda: self._ask_last(name, n_bytes))

    def _ask(self, name: str, n_bytes: int, parts: Sequence[ByteRange], *, has_last: bool) -> None:
        others = list(parts)
        likely = self._sizes.get(_kind_of(name), 0)
        if has_last and likely > 2 * n_bytes:
            others.append(ByteRange(likely - n_bytes, likely + _LONGER_BYTES))
        stop = Stop()
        found: list[tuple[Pin, int, bytes] | None] = []
        with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(others)))) as threads:
            answers = [threads.submit(self._try_part, name, one, stop) for one in others]
            try:
                self._store.until_done(name, lambda: self._ask_first(name, n_bytes))
                found = [one.result() for one in answers]
            except BaseException:
                stop.set()
                raise
        for one in found:
            if one is not None:
                self._add(name, *one)

    def _ask_first(self, name: str, n_bytes: int) -> None:
        described = self._store.describe(name)
        began = time.monotonic()
        followed = self._store.get(name, f"0-{n_bytes - 1}")
        took_s = time.monotonic() - began
        self.latency_s = min(self.latency_s or took_s, took_s)
        answer = followed.answer
        with contextlib.ExitStack() as ending:
            ending.callback(end, answer)
            status, headers = answer.response.status, answer.response.headers
            total = content_range(headers)[2]
            if status in (404, 410):
                self._first[name] = None
                return
            if status not in WHOLE and total is None:
                error = status_error(status, headers, answer.error_body(), described, "")
                if isinstance(error, TryAgainError):
                    raise error
                return  # Other requests may say more.
            size = total if status not in WHOLE else content_length(headers)
            pin, is_part = pin_of(headers, size), status == 206 and size != 0
            if is_part:
                check_partial_answer(headers, 0, min(n_bytes, size or 0), pin, described)
            # A server without ranges sends all of an object: it is taken where it is no longer than what was asked for.
            is_all = (status in WHOLE and size is not None and size <= n_bytes) or (
                is_part and size == answer.n_bytes
            )
            data = self._received(followed, name) if is_part or is_all else b""
            sums = sums_of(followed) if status in WHOLE or is_all else in_headers(headers, whole=False)
            if sums or is_all:
                self._store.add_sums(name, sums, of_whole=True)
            parts = ((0, data),) if data else ()
            url = followed.url if followed.passed else None
            first = FirstBytes(info_of(name, headers, pin), pin, url, status not in WHOLE, sums, parts)
            is_kept = (
                sum(one is not None and one.rest is not None for one in self._first.values()) < _MOST_KEPT
            )
            if status in WHOLE and not is_all and is_kept:
                # `download` goes on with it.
                first = replace(first, rest=followed)
                ending.pop_all()
            self._first[name] = first

    def _ask_last(self, name: str, n_bytes: int) -> None:
        first = self._first.get(name)
        if first is None:
            return
        size = first.info.size_bytes or 0
        begin = max(len(first.parts[0][1]), size - n_bytes)
        start, data = first.parts[-1]
        if start + len(data) == size and start <= begin:
            return  # It has come.
        if begin < size:
            described = self._store.describe(name)
            followed = self._store.get(name, f"{begin}-{size - 1}")
            with reading(followed):
                self._check_status(followed, name, frozenset({206}))
                headers = followed.answer.response.headers
                if check_partial_answer(headers, begin, size, first.pin, described) < size - begin:
                    raise cut_short(described, begin, size - begin, followed.answer.n_bytes or 0)
                data = self._received(followed, name)
            self._add(name, first.pin, begin, data)

    def _try_part(self, name: str, span: ByteRange, stop: Stop) -> tuple[Pin, int, bytes] | None:
        """The bytes `span` of an object, as far as it has them; None where they are not to be had now."""
        described = self._store.describe(name)
        with (
            contextlib.suppress(AccessError, CorruptError, NotFoundError, TryAgainError),
            stopped_by(stop),
            self._connections,
        ):
            followed = self._store.get(name, f"{span.start}-{span.stop - 1}")
            with reading(followed):
                headers = followed.answer.response.headers
                total = content_range(headers)[2]
                if followed.answer.response.status != 206 or total is None:
                    return None
                pin = pin_of(headers, total)
                check_partial_answer(headers, span.start, span.stop, pin, described)
                return pin, span.start, self._received(followed, name)
        return None

    def _add(self, name: str, pin: Pin, start: int, data: bytes) -> None:
        """Adds a part, where it is of the object's version, and not among those that have come."""
        first = self._first.get(name)
        if first is None or (pin.size_bytes, pin.version) != (first.pin.size_bytes, first.pin.version):
            return
        for before, other in first.parts:
            if before <= start < before + len(other):
                data, start = data[before + len(other) - start :], before + len(other)
        if data:
            self._first[name] = replace(first, parts=tuple(sorted((*first.parts, (start, data)))))

    def _received(self, followed: Followed, name: str) -> bytes:
        """The body of an answer, of which little comes."""
        data, arrived = bytearray(), self._store.waits(name)
        for piece in followed.answer.pieces(arrived, self._store.describe(name)):
            data += piece
            arrived(len(piece))
        return bytes(data)

    def _check_status(self, followed: Followed, name: str, statuses: frozenset[int]) -> None:
        response = followed.answer.response
        if response.status not in statuses:
            body = followed.answer.error_body()
            raise status_error(response.status, response.headers, body, self._store.describe(name), "")


class AsksFirst:
    """A store that can be asked for first bytes; its other methods answer by what came, until `forget`."""

    _first: FirstAnswers
    heard: Heard
    outages: Outages

    def describe(self, name: str) -> str:
        """As `Store.describe`."""
        raise NotImplementedError

    def waits(self, name: str) -> Arrived:
        """What is called while a small answer about `name` is waited for."""
        described = self.describe(name)
        return lambda n_bytes: self.heard(n_bytes, described)

    def until_done(self, name: str, work: Callable[[], T]) -> T:
        """What `work` returns, begun anew as long as there is an outage."""
        waits = self.waits(name)
        return until_done(self.outages, self.describe(name), work, lambda: waits(0))

    def ask_ahead(
        self,
        name: str,
        n_bytes: int,
        and_last: Callable[[bytes], bool] | None = None,
        parts: Sequence[ByteRange] = (),
        *,
        last_likely: bool = False,
        last_later: bool = False,
        with_sums: bool = False,
    ) -> None:
        """Asks for the first `n_bytes` of an object, and its `parts`, instead of asking what there is of it.

        Where these show, to `and_last`, that the last as many are needed too, they are asked for as well; with
        `last_later`, when it is called again. `last_likely`: they mostly are, as a store may know that cannot wait to
        be shown. `with_sums`: `stored_sums` will be asked of it too, which some stores can be at the same time.

        Until `forget`, `stat` answers by what came. So do `peek`, `read_small` and `download` where it is enough; and a
        range source opens with it. Raises as `stat`; where the answer says nothing of the object, nothing is known
        afterwards.
        """
        self._first.ask(name, n_bytes, and_last, parts, last_later=last_later)

    @property
    def latency_s(self) -> float:
        """How long the fastest answer took of those that `ask_ahead` waited for; 0 where it did not."""
        return self._first.latency_s

    def first_bytes(self, name: str) -> FirstBytes | None:
        """What `ask_ahead` brought; None where it was not called, or nothing came."""
        return self._first.get(name)

    def forget(self, name: str) -> None:
        """Drops what `ask_ahead` brought: from now on, the server is asked."""
        self._first.forget(name)

    def first_info(self, name: str) -> ObjectInfo | None:
        """What the answer in `_first` says that there is; that there is nothing, it says once."""
        first = self._first.get(name)
        if first is None:
            self.forget(name)
        return None if first is None else first.info


def info_of(name: str, headers: Headers, pin: Pin) -> ObjectInfo:
    """What an answer, which fixes `pin`, says of the object."""
    return ObjectInfo(
        name=name,
        size_bytes=pin.size_bytes,
        version=pin.version,
        may_be_page=headers.get("Content-Type", "").strip().lower().startswith(_PAGES),
        is_stream=pin.size_bytes is None and headers.get("Accept-Ranges", "").strip().lower() != "bytes",
    )


def sums_of(followed: Followed) -> tuple[StoredSum, ...]:
    """The checksums of the whole object in an answer, and in those that redirected to it."""
    linked = (one for headers in followed.passed for one in in_linked(headers))
    return (*linked, *in_headers(followed.answer.response.headers))


def end(answer: Answer) -> None:
    """Gives the connection back where the answer was read to its end, and drops it otherwise."""
    if answer.is_read:
        answer.give_back()
    else:
        answer.drop()


@contextlib.contextmanager
def reading(followed: Followed) -> Iterator[Followed]:
    """A block that reads the answer, as far as it does."""
    try:
        yield followed
    finally:
        end(followed.answer)


def _kind_of(name: str) -> str:
    """The same for files whose names differ in numbers alone, as those of several ranks do."""
    return _NUMBERS.sub("#", name)
