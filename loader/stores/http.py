"""The store of http(s) URLs: HEAD asks for an object's size, one GET downloads it.

What ``storage_options`` say is read once (``http.settings``), and holds for the ranges of an object too
(``ranges.open``). Each request is made in ``retries.until_done``.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ..errors import AccessError, CorruptError
from ..http import exchange
from ..http.addresses import Address, address_of, origin_of
from ..http.answers import (
    Arrived,
    Headers,
    Pin,
    check_expected,
    check_partial_answer,
    content_length,
    content_range,
    cut_short,
    pin_of,
    status_error,
)
from ..http.connections import Connections
from ..http.exchange import Answer, Method, Request
from ..http.redirects import Followed, follow
from ..http.settings import settings_of
from ..redaction import redact_path
from ..retries import Outages, TryAgainError, until_done
from .base import Entry, Heard, ObjectInfo, OnBytes, unheard
from .local import within_limit
from .names import child_of, url_link_targets
from .sums import StoredSum, in_headers, in_linked
from .transfer import Reports, receive, until_received

_WHOLE = frozenset({200, 203})
"""Answers to a GET that carry the object: any other says something else, or brings a part that was not asked for."""
_PAGES = ("text/html", "application/xhtml+xml")
_MOST_KEPT = 8
"""How many answers with whole objects are kept open for `HttpStore.download`: each has a connection of its own."""
_HEAD_REFUSED = frozenset({400, 403, 405, 406, 501})
"""Answers to HEAD that say nothing about GET: URLs signed for GET alone answer 403."""


T = TypeVar("T")


@dataclass(frozen=True)
class FirstBytes:
    """What the answers to the first requests for an object brought: its version, and bytes of it."""

    info: ObjectInfo
    pin: Pin
    url: str = field(repr=False)
    """Where redirects led, which may be signed; the object's own URL where there were none."""
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


class HttpStore:
    """Names are whole URLs, with their query. Raises `OptionError` for options that are not known for http(s)."""

    is_local = False

    def __init__(
        self,
        storage_options: Mapping[str, Any] | None = None,
        heard: Heard = unheard,
        outages: Outages | None = None,
    ) -> None:
        self.heard = heard
        options = dict(storage_options or {})
        self.outages = outages or Outages()
        settings = settings_of(options)
        route = settings.route
        silence_s = self.outages.silence_s(route.silence_timeout_s or exchange.SILENCE_TIMEOUT_S)
        self.settings = replace(settings, route=replace(route, silence_timeout_s=silence_s))
        self._connections = Connections(self.settings.route)
        self._sums: dict[str, tuple[StoredSum, ...]] = {}
        self._ahead: dict[str, FirstBytes | None] = {}
        digest = hashlib.sha256(repr(sorted(options.items(), key=str)).encode()).hexdigest()
        self.identity = f"http-{digest[:16]}" if options else "http"

    def describe(self, name: str) -> str:
        return redact_path(name)

    def join(self, name: str, child: str) -> str:
        return child_of(name, child)

    def link_targets(self, link_name: str, text: str) -> list[str]:
        return url_link_targets(link_name, text)

    def address(self, name: str) -> Address:
        """Where `name` is asked for, with the user's headers. Raises `AccessError` for what is no http(s) URL."""
        settings = self.settings
        return address_of(
            name, settings.headers, encoded=settings.encoded, trust_env=settings.route.trust_env
        )

    def origin(self, name: str) -> Hashable:
        return origin_of(name)

    def ask_ahead(self, name: str, n_bytes: int, and_last: Callable[[bytes], bool]) -> None:
        """Asks for the first `n_bytes` of an object, instead of asking what there is of it.

        Where these show, to `and_last`, that the last as many are needed too, they are asked for next. Until `forget`,
        `stat` answers by what came. So do `peek`, `read_small` and `download` where it is enough; and a range source
        opens with it. Raises as `stat`; where the answer says nothing of the object, nothing is known afterwards.
        """
        if name not in self._ahead:
            self._until_done(name, lambda: self._ask_ahead(name, n_bytes))
        if name in self._ahead:
            self._until_done(name, lambda: self._ask_last(name, n_bytes, and_last))

    def first_bytes(self, name: str) -> FirstBytes | None:
        """What `ask_ahead` brought; None where it was not called, or nothing came."""
        return self._ahead.get(name)

    def forget(self, name: str) -> None:
        """Drops what `ask_ahead` brought: from now on, the server is asked."""
        first = self._ahead.pop(name, None)
        if first is not None and first.rest is not None:
            first.rest.answer.drop()

    def stat(self, name: str) -> ObjectInfo | None:
        if name in self._ahead:
            first = self._ahead[name]
            if first is None:
                self.forget(name)
            return None if first is None else first.info
        return self._until_done(name, lambda: self._head(name))

    def peek(self, name: str, n_bytes: int) -> bytes | None:
        first = self._ahead.get(name)
        if first is not None and first.parts and first.parts[0][0] == 0:
            start = first.parts[0][1]
            if len(start) >= min(n_bytes, first.info.size_bytes or n_bytes):
                return start[:n_bytes]
        return self._until_done(name, lambda: self._first(name, n_bytes))

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        described = self.describe(name)
        size = expected.size_bytes if expected is not None else None

        def attempt(reports: Reports) -> None:
            receive(target_path, described, size, lambda part: self._body(name, part, reports, expected))

        until_received(self.outages, described, on_bytes, attempt)

    def read_small(self, name: str, limit: int) -> bytes:
        first = self._ahead.get(name)
        data = None if first is None else first.all_bytes
        if data is not None:
            return within_limit(data, limit, self.describe(name))
        text = self._until_done(name, lambda: self._text(name, limit))
        return within_limit(text, limit, self.describe(name))

    def add_sums(self, name: str, sums: tuple[StoredSum, ...]) -> None:
        """Keeps checksums from an answer about a range, unless HEAD stated some already."""
        self._sums[name] = self._sums.get(name) or sums

    def stored_sums(self, info: ObjectInfo) -> tuple[StoredSum, ...]:
        if info.name not in self._sums:
            # Answers with a part of an object state some of its checksums only.
            with contextlib.suppress(AccessError, CorruptError):
                self._until_done(info.name, lambda: self._head(info.name))
        return self._sums.get(info.name, ())

    def entries(self, name: str) -> list[Entry] | None:
        return None

    def nearby(self, name: str) -> str:
        return ""  # such a store cannot list

    def close(self) -> None:
        for name in list(self._ahead):
            self.forget(name)
        self._connections.close()

    def local_path(self, name: str) -> str:
        raise NotImplementedError("not a local store")

    def _head(self, name: str) -> ObjectInfo | None:
        address = self.address(name)
        followed = self._ask("HEAD", name, address, self._waits(name))
        answer = followed.answer
        answer.give_back()
        status, headers = answer.response.status, answer.response.headers
        if status in _HEAD_REFUSED:
            return ObjectInfo(name=name, size_bytes=None, certain=False)
        if status in (404, 410):
            return None
        if not 200 <= status < 300:
            raise status_error(status, headers, b"", self.describe(name), address.credentials)
        self._sums[name] = _sums(followed)
        return self._info(name, headers, pin_of(headers, content_length(headers)))

    def _ask_ahead(self, name: str, n_bytes: int) -> None:
        described = self.describe(name)
        followed = self._ask("GET", name, self.address(name), self._waits(name), f"0-{n_bytes - 1}")
        answer = followed.answer
        with contextlib.ExitStack() as ending:
            ending.callback(_end, answer)
            status, headers = answer.response.status, answer.response.headers
            total = content_range(headers)[2]
            if status in (404, 410):
                self._ahead[name] = None
                return
            if status not in _WHOLE and total is None:
                error = status_error(status, headers, answer.error_body(), described, "")
                if isinstance(error, TryAgainError):
                    raise error
                return  # Other requests may say more.
            size = total if status not in _WHOLE else content_length(headers)
            pin, is_part = pin_of(headers, size), status == 206 and size != 0
            if is_part:
                check_partial_answer(headers, 0, min(n_bytes, size or 0), pin, described)
            # A server without ranges sends all of an object: it is taken where it is no longer than what was asked for.
            is_all = (status in _WHOLE and size is not None and size <= n_bytes) or (
                is_part and size == answer.n_bytes
            )
            data = self._received(followed, name) if is_part or is_all else b""
            sums = _sums(followed) if status in _WHOLE or is_all else in_headers(headers, whole=False)
            if sums or is_all:
                self._sums[name] = sums
            info = self._info(name, headers, pin)
            parts = ((0, data),) if data else ()
            first = FirstBytes(info, pin, followed.url, status not in _WHOLE, sums, parts)
            is_kept = (
                sum(one is not None and one.rest is not None for one in self._ahead.values()) < _MOST_KEPT
            )
            if status in _WHOLE and not is_all and is_kept:
                # `download` goes on with it.
                first = replace(first, rest=followed)
                ending.pop_all()
            self._ahead[name] = first

    def _ask_last(self, name: str, n_bytes: int, and_last: Callable[[bytes], bool]) -> None:
        first = self._ahead[name]
        size = 0 if first is None else first.info.size_bytes or 0
        if first is None or len(first.parts) != 1 or not first.has_ranges or not and_last(first.parts[0][1]):
            return
        begin = max(len(first.parts[0][1]), size - n_bytes)
        if begin < size:
            last = (begin, self._part(name, begin, size, first.pin))
            self._ahead[name] = replace(first, parts=(*first.parts, last))

    def _part(self, name: str, start: int, stop: int, pin: Pin) -> bytes:
        """The bytes ``[start, stop)`` of the object at the version of `pin`."""
        described = self.describe(name)
        with self._got(name, self._waits(name), f"{start}-{stop - 1}", frozenset({206})) as followed:
            headers = followed.answer.response.headers
            if check_partial_answer(headers, start, stop, pin, described) < stop - start:
                raise cut_short(described, start, stop - start, followed.answer.n_bytes or 0)
            return self._received(followed, name)

    def _received(self, followed: Followed, name: str) -> bytes:
        """The body of an answer, of which little comes."""
        data, arrived = bytearray(), self._waits(name)
        for piece in followed.answer.pieces(arrived, self.describe(name)):
            data += piece
            arrived(len(piece))
        return bytes(data)

    def _info(self, name: str, headers: Headers, pin: Pin) -> ObjectInfo:
        return ObjectInfo(
            name=name,
            size_bytes=pin.size_bytes,
            version=pin.version,
            may_be_page=headers.get("Content-Type", "").strip().lower().startswith(_PAGES),
            is_stream=pin.size_bytes is None and headers.get("Accept-Ranges", "").strip().lower() != "bytes",
        )

    def _body(self, name: str, part: str, reports: Reports, expected: ObjectInfo | None) -> None:
        """Writes the body of one GET into a new file at `part`."""
        described = self.describe(name)
        first = self._ahead.pop(name, None)
        data = None if first is None else first.all_bytes
        if first is not None and data is not None:
            self.heard(1, described)
            if expected is not None:
                check_expected(first.pin, expected.size_bytes, expected.version, described)
            with open(part, "xb") as file:
                file.write(data)
            reports(len(data))
            return
        rest = None if first is None else first.rest
        with _reading(rest) if rest is not None else self._got(name, reports) as followed:
            answer = followed.answer
            pin = pin_of(answer.response.headers, answer.n_bytes)
            size = pin.size_bytes
            if expected is not None:
                check_expected(pin, expected.size_bytes, expected.version, described)
                size = expected.size_bytes if size is None else size
            self._sums[name] = _sums(followed) or self._sums.get(name, ())
            got = 0
            # Its name is random, and its folder is private to this user.
            with open(part, "xb") as file:
                for piece in answer.pieces(reports, described):
                    file.write(piece)
                    got += len(piece)
                    reports(len(piece))
                    if size is not None and got > size:
                        break  # a body without a length: `receive` says that it is too long
            # A body in chunks says where it ends: what is shorter than expected then has changed.
            ends_itself = pin.size_bytes is None and answer.response.chunked
            if size is not None and got < size and not ends_itself:
                raise cut_short(described, 0, size, got)

    def _text(self, name: str, limit: int) -> bytes:
        """The body of one GET; of a longer one than `limit`, a byte more than that at least."""
        data, arrived = bytearray(), self._waits(name)
        with self._got(name, arrived) as followed:
            for piece in followed.answer.pieces(arrived, self.describe(name)):
                data += piece
                arrived(len(piece))
                if len(data) > limit:
                    break
        return bytes(data)

    def _first(self, name: str, n_bytes: int) -> bytes:
        """The first bytes, by one GET for a range, which a server may answer with the whole object."""
        data, arrived = bytearray(), self._waits(name)
        with self._got(name, arrived, f"0-{n_bytes - 1}", _WHOLE | {206, 416}) as followed:
            # 416: it has no byte.
            if followed.answer.response.status != 416:
                for piece in followed.answer.pieces(arrived, self.describe(name)):
                    data += piece
                    arrived(len(piece))
                    if len(data) >= n_bytes:
                        break
        return bytes(data[:n_bytes])

    @contextlib.contextmanager
    def _got(
        self, name: str, arrived: Arrived, span: str | None = None, statuses: frozenset[int] = _WHOLE
    ) -> Iterator[Followed]:
        """The answer to one GET, for the whole or for `span`, which must have one of `statuses`; the block reads it."""
        address = self.address(name)
        with _reading(self._ask("GET", name, address, arrived, span)) as followed:
            response = followed.answer.response
            if response.status not in statuses:
                raise status_error(
                    response.status,
                    response.headers,
                    followed.answer.error_body(),
                    self.describe(name),
                    address.credentials,
                )
            yield followed

    def _ask(
        self, method: Method, name: str, address: Address, arrived: Arrived, span: str | None = None
    ) -> Followed:
        headers = {} if span is None else {"Range": f"bytes={span}"}
        request = Request(method, address.url, self.describe(name), headers)
        followed = follow(self._connections, request, address, arrived)
        for url in (address.url, followed.url):
            self.outages.answered(origin_of(url))
        self.heard(1, request.described)  # the head of an answer, which may be all of it
        return followed

    def _waits(self, name: str) -> Arrived:
        """What is called while a small answer about `name` is waited for."""
        described = self.describe(name)
        return lambda n_bytes: self.heard(n_bytes, described)

    def _until_done(self, name: str, work: Callable[[], T]) -> T:
        waits = self._waits(name)
        return until_done(self.outages, self.describe(name), work, lambda: waits(0))


def _end(answer: Answer) -> None:
    if answer.is_read:
        answer.give_back()
    else:
        answer.drop()


@contextlib.contextmanager
def _reading(followed: Followed) -> Iterator[Followed]:
    """A block that reads the answer, as far as it does."""
    try:
        yield followed
    finally:
        _end(followed.answer)


def _sums(followed: Followed) -> tuple[StoredSum, ...]:
    linked = (one for headers in followed.passed for one in in_linked(headers))
    return (*linked, *in_headers(followed.answer.response.headers))
