"""The store of http(s) URLs, through fsspec's HTTPFileSystem: HEAD asks for an object's size, one GET downloads it.

`HttpStore._attempt` tries each request again where that may help. Ranges are read by ``ranges.http``, through another
client, and tried again as ``ranges.retries`` decides.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections.abc import Callable, Mapping
from ssl import SSLContext
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit, urlunsplit

from ..errors import AccessError, CorruptError, NotFoundError, OptionError, RankloadError, UnsafeError
from ..http.answers import WORTH_RETRYING
from ..http.connections import trusted
from ..store_errors import TryAgainError, redact_url, refused
from .base import ObjectInfo, OnBytes
from .http_errors import SILENCE_TIMEOUT_S, client_error, is_cut_short, is_transient
from .local import within_limit
from .sums import StoredSum, in_headers, in_linked
from .transfer import Meter, await_watched, receive

DOWNLOAD_ATTEMPTS = 3
DOWNLOAD_BACKOFF_S = 0.25
"""The longest pause before the second attempt; doubled with each."""
CONNECT_TIMEOUT_S = 20

_CHUNK = 1 << 20
_HEAD_REFUSED = frozenset({400, 403, 405, 406, 501})
"""Answers to HEAD that say nothing about GET: URLs signed for GET alone answer 403."""

T = TypeVar("T")


class HttpStore:
    """Names are whole URLs, with their query."""

    is_local = False

    def __init__(self, storage_options: Mapping[str, Any] | None = None) -> None:
        self.options = dict(storage_options or {})
        self._filesystem: Any = None
        self._pid = 0
        self._trusted: SSLContext | None = None
        self._sums: dict[str, tuple[StoredSum, ...]] = {}
        digest = hashlib.sha256(repr(sorted(self.options.items(), key=str)).encode()).hexdigest()
        self.identity = f"http-{digest[:16]}" if self.options else "http"

    def describe(self, name: str) -> str:
        return redact_url(name)

    def join(self, name: str, child: str) -> str:
        parts = urlsplit(name)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{child}"))

    def link_targets(self, link_name: str, text: str) -> list[str]:
        link = urlsplit(link_name)
        if "://" in text:
            target = urlsplit(text)
            if (target.scheme, target.netloc) != (link.scheme, link.netloc):
                raise UnsafeError(
                    f"{redact_url(link_name)}: the link names another server, {redact_url(text)}",
                    path=redact_url(link_name),
                )
            return [text]
        paths = [urljoin(link.path, text), f"/{text.lstrip('/')}"]
        return [urlunsplit(link._replace(path=path)) for path in dict.fromkeys(paths)]

    def stat(self, name: str) -> ObjectInfo | None:
        info: ObjectInfo | None = self._attempt(
            name, lambda: self._await(self._head(name), Meter(lambda n: None))
        )
        return info

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        meter = Meter(on_bytes)

        def attempt() -> None:
            meter.restart()
            # The body's length is compared with the response's own while it is read.
            receive(target_path, self.describe(name), None, write)

        def write(part: str) -> None:
            self._await(self._body(name, part, meter, expected), meter)

        self._attempt(name, attempt, lambda: meter.report())

    def read_small(self, name: str, limit: int) -> bytes:
        data = self._attempt(name, lambda: self._await(self._text(name, limit), Meter(lambda n: None)))
        return within_limit(data, limit, self.describe(name))

    def add_sums(self, name: str, sums: tuple[StoredSum, ...]) -> None:
        """Keeps checksums from an answer that another client got, unless HEAD stated some already."""
        self._sums[name] = self._sums.get(name) or sums

    def stored_sums(self, info: ObjectInfo) -> tuple[StoredSum, ...]:
        return self._sums.get(info.name, ())

    def close(self) -> None:
        filesystem, self._filesystem = self._filesystem, None
        session = getattr(filesystem, "_session", None)
        if session is None or self._pid != os.getpid():
            return
        asyncio.run_coroutine_threadsafe(session.close(), filesystem.loop).result(timeout=5)
        # So that fsspec does not close it once more, later.
        filesystem._session = None

    def local_path(self, name: str) -> str:
        raise NotImplementedError("not a local store")

    def _files(self) -> Any:
        """The file system, made anew in a forked child, whose connections would be the parent's."""
        if self._filesystem is None or self._pid != os.getpid():
            import aiohttp
            from fsspec.implementations.http import HTTPFileSystem

            options = dict(self.options)
            # aiohttp's own limit is 300 s for a whole body, whatever moves.
            client = {
                "timeout": aiohttp.ClientTimeout(
                    total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S
                ),
                "auto_decompress": False,
                "trust_env": True,
                **options.pop("client_kwargs", {}),
            }
            try:
                self._filesystem = HTTPFileSystem(client_kwargs=client, skip_instance_cache=True, **options)
            except TypeError as error:
                raise OptionError(f"storage_options do not fit http: {error}") from error
            self._pid = os.getpid()
        return self._filesystem

    def _await(self, work: Any, meter: Meter) -> Any:
        return await_watched(work, self._files().loop, meter)

    def _attempt(self, name: str, work: Callable[[], T], idle: Callable[[], None] | None = None) -> T:
        """What `work` returns, in up to `DOWNLOAD_ATTEMPTS` attempts; `idle` is called in between, and may raise."""
        described = self.describe(name)
        for attempt in range(DOWNLOAD_ATTEMPTS):
            try:
                return work()
            except TryAgainError as retry:
                if attempt == DOWNLOAD_ATTEMPTS - 1:
                    raise retry.error from None
            except RankloadError:
                raise
            except Exception as error:
                mapped = client_error(error, described, DOWNLOAD_ATTEMPTS)
                if attempt == DOWNLOAD_ATTEMPTS - 1 or not is_transient(error):
                    # The cause is set, or left out, by the mapping.
                    raise mapped  # noqa: B904
            _sleep(random.uniform(0, DOWNLOAD_BACKOFF_S * 2**attempt), idle)  # noqa: S311
        raise AssertionError("unreachable")

    def _request(self, name: str) -> dict[str, Any]:
        """The arguments of every request but its method and URL."""
        request = dict(self._files().kwargs)
        if name.startswith("https:") and "connector" not in self.options.get("client_kwargs", {}):
            # aiohttp itself honours one of the environment's variables, and reads it when it is imported.
            if self._trusted is None:
                self._trusted = trusted()
            request.setdefault("ssl", self._trusted)
        request["headers"] = {**request.get("headers", {}), "Accept-Encoding": "identity"}
        return request

    async def _head(self, name: str) -> ObjectInfo | None:
        files = self._files()
        session = await files.set_session()
        described = self.describe(name)
        async with session.head(
            files.encode_url(name), allow_redirects=True, **self._request(name)
        ) as response:
            if response.status in _HEAD_REFUSED:
                return ObjectInfo(name=name, size_bytes=None, certain=False)
            if response.status in (404, 410):
                return None
            _check_status(response.status, described)
            self._sums[name] = _sums(response)
            return ObjectInfo(name=name, size_bytes=_length(response), version=_version(response))

    async def _body(self, name: str, part: str, meter: Meter, expected: ObjectInfo | None) -> None:
        files = self._files()
        session = await files.set_session()
        described = self.describe(name)
        async with session.get(files.encode_url(name), **self._request(name)) as response:
            _check_status(response.status, described)
            size = _length(response)
            _check_unchanged(response, size, expected, described)
            self._sums[name] = _sums(response) or self._sums.get(name, ())
            if size is None and expected is not None:
                size = expected.size_bytes
            arrived = 0
            # Its name is random, and its folder is private to this user.
            with open(part, "xb") as file:
                try:
                    async for chunk in response.content.iter_chunked(_CHUNK):
                        file.write(chunk)
                        arrived += len(chunk)
                        meter.add(len(chunk))
                except Exception as error:
                    if not is_cut_short(error):
                        raise
            if (size is not None and arrived != size) or (size is None and not response.content.at_eof()):
                raise TryAgainError(
                    CorruptError(
                        f"{described}: the body ended early: expected {size} bytes, got {arrived} "
                        f"({DOWNLOAD_ATTEMPTS} attempts)",
                        path=described,
                    )
                )

    async def _text(self, name: str, limit: int) -> bytes:
        files = self._files()
        session = await files.set_session()
        async with session.get(files.encode_url(name), **self._request(name)) as response:
            _check_status(response.status, self.describe(name))
            data = bytearray()
            async for chunk in response.content.iter_chunked(limit + 1):
                data += chunk
                if len(data) > limit:
                    break
            return bytes(data)


def _check_status(status: int, described: str) -> None:
    if status in (404, 410):
        raise NotFoundError(f"{described}: not there (HTTP {status})", path=described)
    if status in (401, 403):
        raise refused(described, f"HTTP {status}")
    if status in WORTH_RETRYING:
        raise TryAgainError(
            AccessError(
                f"{described}: the server answered HTTP {status}, {DOWNLOAD_ATTEMPTS} times", path=described
            )
        )
    if not 200 <= status < 300:
        raise AccessError(f"{described}: the server answered HTTP {status}", path=described)


def _check_unchanged(response: Any, size: int | None, expected: ObjectInfo | None, described: str) -> None:
    if expected is None:
        return
    version = _version(response)
    if expected.version and version and version != expected.version:
        raise CorruptError(
            f"{described}: changed while it was loaded: expected version {expected.version}, got {version}",
            path=described,
        )
    if expected.size_bytes is not None and size is not None and size != expected.size_bytes:
        raise CorruptError(
            f"{described}: changed while it was loaded: expected {expected.size_bytes} bytes, "
            f"the server now offers {size}",
            path=described,
        )


def _length(response: Any) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _sums(response: Any) -> tuple[StoredSum, ...]:
    linked = (one for each in response.history for one in in_linked(each.headers))
    return (*linked, *in_headers(response.headers))


def _version(response: Any) -> str | None:
    tag: str | None = response.headers.get("ETag")
    if tag is None:
        modified: str | None = response.headers.get("Last-Modified")
        return modified
    # Servers mark the same tag as weak in one answer and strong in another.
    return tag.removeprefix("W/")


def _sleep(seconds: float, idle: Callable[[], None] | None) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if idle is not None:
            idle()
        time.sleep(min(left, 0.1))
