"""The source that a store's object is read from, with the store's own options and credentials.

local path  →  http(s)  →  a URL that the backend signs (S3, GCS, Azure)  →  the backend's own ranged reads
"""

from __future__ import annotations

from collections.abc import Mapping
from ssl import SSLContext
from typing import Any

from ..http.addresses import address_of
from ..http.connections import Connections
from ..stores.base import ObjectInfo, Store
from ..stores.fsspec import FsspecStore
from ..stores.http import HttpStore
from .base import RangeSource
from .fsspec import open_fsspec_source
from .http import HttpSource
from .local import LocalSource
from .signed import open_signed

_KNOWN_OPTIONS = frozenset({"headers", "cookies", "auth", "ssl", "trust_env", "timeout", "block_size"})
"""Of fsspec's http file system and its client: those that are honoured here, or make no difference."""


def open_range_source(
    store: Store, info: ObjectInfo, connections: Connections | None = None
) -> RangeSource | None:
    """The source of the object that `info` (from ``store.stat``) tells of; None where only whole objects are had.

    Asks an http(s) server once, for the version and whether it can do ranges. `connections` may be shared by
    sources; whoever made them closes them. Raises `NotFoundError`, `AccessError`, `TryAgainError`, or
    `CorruptError` where the object is not the one in `info`.
    """
    if store.is_local:
        return LocalSource(store.local_path(info.name), info)
    if isinstance(store, HttpStore):
        return _open_http(store, info, connections)
    if isinstance(store, FsspecStore):
        return open_signed(store, info, connections) or open_fsspec_source(store, info)
    return None


def _open_http(store: HttpStore, info: ObjectInfo, connections: Connections | None) -> RangeSource | None:
    """None where the store's options ask for what only its own client does."""
    settings = _settings(store.options)
    if settings is None:
        return None
    headers, verify = settings
    owns = connections is None
    connections = (connections or Connections()).trusting(verify)
    source = HttpSource(
        lambda: address_of(info.name, headers), connections, owns_connections=owns, expected=info
    )
    store.hear(info.name, source.stored_sums)
    return source


def _settings(options: Mapping[str, Any]) -> tuple[dict[str, str], Any] | None:
    """Headers and whom to trust, as fsspec's http options tell them; None where they tell of more."""
    client = dict(options.get("client_kwargs") or {})
    told = {**client, **{name: value for name, value in options.items() if name != "client_kwargs"}}
    if set(told) - _KNOWN_OPTIONS:
        return None
    headers = {**(client.get("headers") or {}), **(options.get("headers") or {})}
    if told.get("cookies"):
        headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in dict(told["cookies"]).items())
    if told.get("auth") is not None:
        if not callable(getattr(told["auth"], "encode", None)):
            return None
        headers["Authorization"] = told["auth"].encode()
    verify = told.get("ssl")
    if verify is not None and not isinstance(verify, bool | SSLContext):
        return None
    return {str(name): str(value) for name, value in headers.items()}, None if verify is True else verify
