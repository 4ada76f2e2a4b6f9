"""The store of http(s) URLs: HEAD asks for an object's size, one GET downloads it.

What ``storage_options`` say is read once (``http.settings``), and holds for the ranges of an object too
(``ranges.open``). Each request is made in ``retries.until_done``.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from ..errors import AccessError, CorruptError
from ..http import exchange
from ..http.addresses import Address, address_of, origin_of
from ..http.answers import (
    Arrived,
    check_expected,
    content_length,
    cut_short,
    pin_of,
    status_error,
)
from ..http.connections import Connections
from ..http.exchange import Method, Request
from ..http.redirects import Followed, follow
from ..http.settings import settings_of
from ..redaction import redact_path
from ..retries import Outages
from .base import Entry, Heard, ObjectInfo, OnBytes, unheard
from .first_answers import WHOLE, AsksFirst, FirstAnswers, info_of, reading, sums_of
from .local import within_limit
from .names import child_of, url_link_targets
from .sums import StoredSum
from .transfer import Reports, receive, until_received

_HEAD_REFUSED = frozenset({400, 403, 405, 406, 501})
"""Answers to HEAD that say nothing about GET: URLs signed for GET alone answer 403."""


T = TypeVar("T")


class HttpStore(AsksFirst):
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
        self._first = FirstAnswers(self)
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
        if name in self._first:
            return self.first_info(name)
        return self.until_done(name, lambda: self._head(name))

    def peek(self, name: str, n_bytes: int) -> bytes | None:
        first = self._first.get(name)
        start = None if first is None else first.beginning(n_bytes)
        return self.until_done(name, lambda: self._beginning(name, n_bytes)) if start is None else start

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        described = self.describe(name)
        size = expected.size_bytes if expected is not None else None

        def attempt(reports: Reports) -> None:
            receive(target_path, described, size, lambda part: self._body(name, part, reports, expected))

        until_received(self.outages, described, on_bytes, attempt)

    def read_small(self, name: str, limit: int) -> bytes:
        first = self._first.get(name)
        data = None if first is None else first.all_bytes
        if data is not None:
            return within_limit(data, limit, self.describe(name))
        text = self.until_done(name, lambda: self._text(name, limit))
        return within_limit(text, limit, self.describe(name))

    def add_sums(self, name: str, sums: tuple[StoredSum, ...], *, of_whole: bool = False) -> None:
        """Keeps checksums from an answer about a range, unless HEAD stated some already.

        `of_whole`: it was an answer with the whole object, or stated some, so that HEAD says no more.
        """
        self._sums[name] = sums if of_whole else self._sums.get(name) or sums

    def stored_sums(self, info: ObjectInfo) -> tuple[StoredSum, ...]:
        if info.name not in self._sums:
            # Answers with a part of an object state some of its checksums only.
            with contextlib.suppress(AccessError, CorruptError):
                self.until_done(info.name, lambda: self._head(info.name))
        return self._sums.get(info.name, ())

    def entries(self, name: str) -> list[Entry] | None:
        return None

    def nearby(self, name: str) -> str:
        return ""  # such a store cannot list

    def close(self) -> None:
        self._first.close()
        self._connections.close()

    def local_path(self, name: str) -> str:
        raise NotImplementedError("not a local store")

    def _head(self, name: str) -> ObjectInfo | None:
        address = self.address(name)
        followed = self._ask("HEAD", name, address, self.waits(name))
        answer = followed.answer
        answer.give_back()
        status, headers = answer.response.status, answer.response.headers
        if status in _HEAD_REFUSED:
            return ObjectInfo(name=name, size_bytes=None, certain=False)
        if status in (404, 410):
            return None
        if not 200 <= status < 300:
            raise status_error(status, headers, b"", self.describe(name), address.credentials)
        self._sums[name] = sums_of(followed)
        return info_of(name, headers, pin_of(headers, content_length(headers)))

    def _body(self, name: str, part: str, reports: Reports, expected: ObjectInfo | None) -> None:
        """Writes the body of one GET into a new file at `part`."""
        described = self.describe(name)
        first = self._first.take(name)
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
        with reading(rest) if rest is not None else self._got(name, reports) as followed:
            answer = followed.answer
            pin = pin_of(answer.response.headers, answer.n_bytes)
            size = pin.size_bytes
            if expected is not None:
                check_expected(pin, expected.size_bytes, expected.version, described)
                size = expected.size_bytes if size is None else size
            self._sums[name] = sums_of(followed) or self._sums.get(name, ())
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
        data, arrived = bytearray(), self.waits(name)
        with self._got(name, arrived) as followed:
            for piece in followed.answer.pieces(arrived, self.describe(name)):
                data += piece
                arrived(len(piece))
                if len(data) > limit:
                    break
        return bytes(data)

    def _beginning(self, name: str, n_bytes: int) -> bytes:
        """The first bytes, by one GET for a range, which a server may answer with the whole object."""
        data, arrived = bytearray(), self.waits(name)
        with self._got(name, arrived, f"0-{n_bytes - 1}", WHOLE | {206, 416}) as followed:
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
        self, name: str, arrived: Arrived, span: str | None = None, statuses: frozenset[int] = WHOLE
    ) -> Iterator[Followed]:
        """The answer to one GET, for the whole or for `span`, which must have one of `statuses`; the block reads it."""
        address = self.address(name)
        with reading(self._ask("GET", name, address, arrived, span)) as followed:
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

    def get(self, name: str, span: str) -> Followed:
        """The answer to one GET for the bytes `span`, whatever its status. Raises as `follow`."""
        return self._ask("GET", name, self.address(name), self.waits(name), span)

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
