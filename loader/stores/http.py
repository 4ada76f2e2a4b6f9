"""The store of http(s) URLs: HEAD asks for an object's size, one GET downloads it.

What ``storage_options`` say is read once (``http.settings``), and holds for the ranges of an object too
(``ranges.open``). Each request is made in ``retries.until_done``.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from ..http import exchange
from ..http.addresses import Address, address_of, origin_of
from ..http.answers import Arrived, check_expected, content_length, cut_short, pin_of, status_error
from ..http.connections import Connections
from ..http.exchange import Method, Request
from ..http.redirects import Followed, follow
from ..http.settings import settings_of
from ..redaction import redact_path
from ..retries import Outages, until_done
from .base import Entry, Heard, ObjectInfo, OnBytes, unheard
from .local import within_limit
from .names import child_of, url_link_targets
from .sums import StoredSum, in_headers, in_linked
from .transfer import Reports, receive, until_received

_WHOLE = frozenset({200, 203})
"""Answers to a GET that carry the object: any other says something else, or brings a part that was not asked for."""
_PAGES = ("text/html", "application/xhtml+xml")
_HEAD_REFUSED = frozenset({400, 403, 405, 406, 501})
"""Answers to HEAD that say nothing about GET: URLs signed for GET alone answer 403."""


T = TypeVar("T")


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

    def stat(self, name: str) -> ObjectInfo | None:
        return self._until_done(name, lambda: self._head(name))

    def peek(self, name: str, n_bytes: int) -> bytes | None:
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
        text = self._until_done(name, lambda: self._text(name, limit))
        return within_limit(text, limit, self.describe(name))

    def add_sums(self, name: str, sums: tuple[StoredSum, ...]) -> None:
        """Keeps checksums from an answer about a range, unless HEAD stated some already."""
        self._sums[name] = self._sums.get(name) or sums

    def stored_sums(self, info: ObjectInfo) -> tuple[StoredSum, ...]:
        return self._sums.get(info.name, ())

    def entries(self, name: str) -> list[Entry] | None:
        return None

    def nearby(self, name: str) -> str:
        return ""  # such a store cannot list

    def close(self) -> None:
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
        pin = pin_of(headers, content_length(headers))
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
        with self._got(name, reports) as followed:
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
        with self._got(name, arrived, n_bytes) as followed:
            # 416: it has no byte.
            if followed.answer.response.status != 416:
                for piece in followed.answer.pieces(arrived, self.describe(name)):
                    data += piece
                    arrived(len(piece))
                    if len(data) >= n_bytes:
                        break
        return bytes(data[:n_bytes])

    @contextlib.contextmanager
    def _got(self, name: str, arrived: Arrived, n_first: int | None = None) -> Iterator[Followed]:
        """The answer to one GET, for the whole or for the first bytes; the block reads it."""
        address = self.address(name)
        followed = self._ask("GET", name, address, arrived, n_first)
        answer = followed.answer
        try:
            status = answer.response.status
            if status not in (_WHOLE if n_first is None else _WHOLE | {206, 416}):
                raise status_error(
                    status,
                    answer.response.headers,
                    answer.error_body(),
                    self.describe(name),
                    address.credentials,
                )
            yield followed
        finally:
            if answer.is_read:
                answer.give_back()
            else:
                answer.drop()

    def _ask(
        self, method: Method, name: str, address: Address, arrived: Arrived, n_first: int | None = None
    ) -> Followed:
        headers = {} if n_first is None else {"Range": f"bytes=0-{n_first - 1}"}
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


def _sums(followed: Followed) -> tuple[StoredSum, ...]:
    linked = (one for headers in followed.passed for one in in_linked(headers))
    return (*linked, *in_headers(followed.answer.response.headers))
