"""Opens the range source of a store's object, with the store's own options and credentials.

http(s)  →  a URL that the backend signs (S3, GCS, Azure)  →  the backend's own ranged reads

`RangeServers` remembers during a load which servers do ranges.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from ssl import SSLContext
from typing import Any

from ..http.addresses import Origin, address_of, origin_of
from ..http.connections import Connections
from ..stores.base import ObjectInfo, Store
from ..stores.fsspec import FsspecStore
from ..stores.http import HttpStore
from .base import RangeSource
from .fsspec import open_fsspec_source
from .http import HttpSource
from .signed import open_signed

_KNOWN_OPTIONS = frozenset({"headers", "cookies", "auth", "ssl", "trust_env", "timeout", "block_size"})
"""Options of fsspec's http file system and its client that are honoured here, or make no difference."""


def open_range_source(
    store: Store, info: ObjectInfo, connections: Connections | None = None
) -> RangeSource | None:
    """The source of the object that `info` (from ``store.stat``) describes; None where only whole objects can be had.

    Sends an http(s) server one request, for the version and whether it does ranges (`RangeSource.has_ranges`). Sources
    may share `connections`, which they do not close. Raises `NotFoundError`, `AccessError`, `TryAgainError`, or
    `CorruptError` where the object is not the one in `info`.
    """
    if isinstance(store, HttpStore):
        return _open_http(store, info, connections)
    if isinstance(store, FsspecStore):
        return open_signed(store, info, connections) or open_fsspec_source(store, info)
    return None


class RangeServers:
    """Which http(s) servers do ranges, as one load finds out from their first objects. Threads may share it."""

    def __init__(self) -> None:
        self.streamed: list[str] = []
        """Objects that cannot be read in ranges, as messages call them."""
        self._has_ranges: dict[Origin, bool] = {}
        self._asking: dict[Origin, threading.Lock] = {}
        self._lock = threading.Lock()

    def open(
        self, store: Store, info: ObjectInfo, open_source: Callable[[], RangeSource | None]
    ) -> RangeSource | None:
        """The source that `open_source` opens; None where ranges of the object cannot be had. Raises as that does.

        While the first object of a server is opened, others of that server wait.
        """
        if not isinstance(store, HttpStore):
            return self._with_ranges(store, info, open_source())
        server = origin_of(info.name)
        with self._lock:
            asking = self._asking.setdefault(server, threading.Lock())
        with asking:
            if server not in self._has_ranges:
                source = open_source()
                if source is not None and source.size_bytes:
                    self._has_ranges[server] = source.has_ranges
                return self._with_ranges(store, info, source)
        if not self._has_ranges[server]:
            self._note(store.describe(info.name))
            return None
        return self._with_ranges(store, info, open_source())

    def _with_ranges(self, store: Store, info: ObjectInfo, source: RangeSource | None) -> RangeSource | None:
        if source is None or source.has_ranges:
            return source
        source.close()
        self._note(store.describe(info.name))
        return None

    def _note(self, described: str) -> None:
        with self._lock:
            if described not in self.streamed:
                self.streamed.append(described)


def _open_http(store: HttpStore, info: ObjectInfo, connections: Connections | None) -> RangeSource | None:
    """None where the store has options that only its own client honours."""
    settings = _settings(store.options)
    if settings is None:
        return None
    headers, verify = settings
    owns = connections is None
    connections = (connections or Connections()).trusting(verify)
    source = HttpSource(
        lambda: address_of(info.name, headers), connections, owns_connections=owns, expected=info
    )
    store.add_sums(info.name, source.stored_sums)
    return source


def _settings(options: Mapping[str, Any]) -> tuple[dict[str, str], Any] | None:
    """Headers, and `verify` as for `Connections.trusting`, in fsspec's http `options`; None where they hold more."""
    client = dict(options.get("client_kwargs") or {})
    given = {**client, **{name: value for name, value in options.items() if name != "client_kwargs"}}
    if set(given) - _KNOWN_OPTIONS:
        return None
    headers = {**(client.get("headers") or {}), **(options.get("headers") or {})}
    if given.get("cookies"):
        headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in dict(given["cookies"]).items())
    if given.get("auth") is not None:
        if not callable(getattr(given["auth"], "encode", None)):
            return None
        headers["Authorization"] = given["auth"].encode()
    verify = given.get("ssl")
    if verify is not None and not isinstance(verify, bool | SSLContext):
        return None
    return {str(name): str(value) for name, value in headers.items()}, None if verify is True else verify
