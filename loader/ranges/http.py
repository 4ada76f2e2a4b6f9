"""The range source over http(s): each read is one GET on a connection of its own, received into the caller's memory.

`HttpSource` remembers where redirects lead, and has a signed URL signed anew when it expires. Every answer is compared
with the version that the first one stated.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..errors import AccessError
from ..http.addresses import Address, origin_of
from ..http.answers import (
    Arrived,
    Pin,
    check_expected,
    check_partial_answer,
    check_whole_answer,
    content_length,
    content_range,
    pin_of,
    status_error,
)
from ..http.connections import Connections
from ..http.exchange import Answer, Request, network_error
from ..http.redirects import follow
from ..redaction import redact_path
from ..retries import Outages
from ..stores.base import Heard, ObjectInfo, unheard
from ..stores.first_answers import FirstBytes
from ..stores.sums import StoredSum, in_headers
from .base import pieces

_MAY_HAVE_EXPIRED = frozenset({400, 401, 403, 404, 410})
"""What a server may answer where a signature, or the target of a redirect, has expired."""


@dataclass(frozen=True)
class _Place:
    """The URL that is asked for now: as given, as signed, or the target of a redirect."""

    address: Address
    url: str = field(repr=False)
    is_redirected: bool = False
    until: float = float("inf")
    """When it is to be renewed, by `time.monotonic`."""


class NoSizeError(AccessError):
    """The server tells no size of an object, which can be had as one stream only."""


class HttpSource:
    """The object at the address that `make_address` returns: always the same one, or a newly signed URL each time.

    The constructor asks the server for the first byte, which fixes the version, unless the answers in `first` have
    fixed it; it raises `NotFoundError`,
    `NoSizeError`, `AccessError`, `TryAgainError`, or `CorruptError` where the object is not the one in `expected`,
    whose version must be an ETag or a Last-Modified. `signed_for_s` is for how many seconds an address is signed, where
    it is. `heard` is called while the constructor waits; `outages` are those of the call that reads it.
    """

    max_connections = 32

    def __init__(
        self,
        make_address: Callable[[], Address],
        connections: Connections,
        *,
        owns_connections: bool = True,
        expected: ObjectInfo | None = None,
        signed_for_s: float | None = None,
        described: str | None = None,
        heard: Heard = unheard,
        outages: Outages | None = None,
        first: FirstBytes | None = None,
    ) -> None:
        self.outages = outages or Outages()
        self._make_address = make_address
        self._connections = connections
        self._owns = owns_connections
        self._signed_for_s = signed_for_s
        self._lock = threading.Lock()
        self._address = make_address()
        self._place = self._first_place()
        self._described = described or redact_path(self._address.url)
        self._sends_if_match = True
        self._pin = Pin()
        self.stored_sums: tuple[StoredSum, ...] = ()
        """Checksums of the whole object in the first answer."""
        self.has_ranges = True
        if first is None:
            self._open(heard)
        else:
            self._open_with(first)
        if expected is not None:
            check_expected(self._pin, expected.size_bytes, expected.version, self._described)

    @property
    def size_bytes(self) -> int:
        return self._pin.size_bytes or 0

    @property
    def version(self) -> str | None:
        return self._pin.version

    @property
    def kind(self) -> str:
        return "http" if self._signed_for_s is None else "signed http"

    def describe(self) -> str:
        return self._described

    def confirm(self) -> None:
        """Does nothing: every answer was compared."""

    def close(self) -> None:
        if self._owns:
            self._connections.close()

    def read_into(
        self, start: int, stop: int, views: Iterable[memoryview], arrived: Arrived = lambda n_bytes: None
    ) -> None:
        targets = pieces(views)
        position = start
        left = memoryview(b"")
        while position < stop:
            answer = self._ask({"Range": f"bytes={position}-{stop - 1}"} if self.has_ranges else {}, arrived)
            with self._reading(answer):
                n_bytes = self._check(answer.response, position, stop)
                left = answer.receive(position, n_bytes, left, targets, arrived, self._described)
                position += n_bytes

    def _open_with(self, first: FirstBytes) -> None:
        if first.pin.size_bytes is None:
            raise NoSizeError(f"{self._described}: the server does not tell its size", path=self._described)
        self._pin, self.has_ranges, self.stored_sums = first.pin, first.has_ranges, first.sums
        if first.url is not None:
            self._place = replace(self._place, url=first.url, is_redirected=True)

    def _open(self, heard: Heard) -> None:
        answer = self._ask(
            {"Range": "bytes=0-0"},
            lambda n_bytes: heard(n_bytes, self._described),
            any_of=frozenset({200, 206, 416}),
        )
        heard(1, self._described)
        headers, status = answer.response.headers, answer.response.status
        start, stop, total = content_range(headers)
        if status == 206:
            with self._reading(answer):
                if (start, stop) != (0, 1) or total is None:
                    stated = headers.get("Content-Range") or "none"
                    raise AccessError(
                        f"{self._described}: expected Content-Range bytes 0-0/SIZE, got {stated}",
                        path=self._described,
                    )
                check_partial_answer(headers, 0, 1, Pin(), self._described)
                answer.response.read(1)
        else:
            # The body is the whole object, or of no use.
            answer.drop()
            self.has_ranges = status == 416
            total = content_length(headers) if status == 200 else total
        if total is None or (status == 416 and total != 0):
            raise NoSizeError(f"{self._described}: the server does not tell its size", path=self._described)
        self._pin = pin_of(headers, total)
        self.stored_sums = in_headers(headers, whole=status == 200)

    def _check(self, response: http.client.HTTPResponse, start: int, stop: int) -> int:
        """How many bytes from `start` on the body holds."""
        if response.status == 206 and self.has_ranges:
            return check_partial_answer(response.headers, start, stop, self._pin, self._described)
        check_whole_answer(response.headers, self._pin, self._described)
        if start == 0 and (stop == self.size_bytes or not self.has_ranges):
            return stop
        raise AccessError(
            f"{self._described}: the server answered a request for bytes {start}-{stop - 1} with the whole "
            "object (HTTP 200), though it answered ranges before"
            if self.has_ranges
            else f"{self._described}: the server does no ranges, bytes from {start} on were asked for",
            path=self._described,
        )

    def _ask(
        self, headers: Mapping[str, str], arrived: Arrived, any_of: frozenset[int] = frozenset({200, 206})
    ) -> Answer:
        """The answer to one GET, redirects followed, an expired address renewed once."""
        is_renewed = False
        place = self._current()
        is_moved = False
        while True:
            sent = dict(headers)
            if self._pin.strong is not None and self._sends_if_match:
                sent["If-Match"] = self._pin.strong
            request = Request("GET", place.url, self._described, sent)
            followed = follow(self._connections, request, place.address, arrived)
            for url in (place.url, followed.url):
                self.outages.answered(origin_of(url))
            answer = followed.answer
            if followed.passed:
                is_moved, place = True, replace(place, url=followed.url)
            status = answer.response.status
            if status in any_of:
                if is_moved:
                    self._place = replace(place, is_redirected=True)
                return answer
            body = answer.error_body()
            answer.drop()
            if status == 412 and "If-Match" in sent:
                # Some servers compare wrongly: the next answer's own ETag shows whether it changed.
                self._sends_if_match = False
                continue
            was_remembered = self._signed_for_s is not None or place.is_redirected
            if status in _MAY_HAVE_EXPIRED and was_remembered and not is_renewed:
                is_renewed, is_moved = True, False
                place = self._renewed(place)
                continue
            if status in (401, 403) and not is_renewed and self._pin != Pin():
                # It was let in before: the netrc file may have other credentials by now.
                is_renewed, before = True, place.address
                place = self._renewed(place)
                if place.address != before:
                    continue
            raise status_error(
                status, answer.response.headers, body, self._described, place.address.credentials
            )

    @contextlib.contextmanager
    def _reading(self, answer: Answer) -> Iterator[None]:
        """Gives the connection back where the block read its answer to the end."""
        try:
            yield
        except BaseException as error:
            answer.drop()
            if isinstance(error, OSError | http.client.HTTPException):
                raise network_error(
                    error, self._described, answer.connection.origin, answer.waiting.silence_s
                ) from None
            raise
        response = answer.response
        is_whole = response.status == 206 or content_length(response.headers) == self.size_bytes
        # Of a chunked body, the last chunk was not read, which is empty.
        if response.chunked or not is_whole or not self.has_ranges:
            answer.drop()
        else:
            answer.give_back()

    def _first_place(self) -> _Place:
        life = float("inf") if self._signed_for_s is None else self._signed_for_s * 0.8
        return _Place(self._address, self._address.url, until=time.monotonic() + life)

    def _current(self) -> _Place:
        place = self._place
        return place if time.monotonic() < place.until else self._renewed(place)

    def _renewed(self, place: _Place) -> _Place:
        """The address made anew, unless another thread has done so since `place` was taken."""
        with self._lock:
            if self._place is place or self._place.url == place.url:
                self._address = self._make_address()
                self._place = self._first_place()
            return self._place
