"""Opens the range source of a store's object, with the store's own options and credentials.

http(s)  →  a URL that the backend signs (S3, GCS, Azure)  →  the backend's own ranged reads

`RangeServers` remembers during a load which servers do ranges.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..http.addresses import Origin, origin_of
from ..http.connections import Connections
from ..stores.base import ObjectInfo, Store
from ..stores.fsspec import FsspecStore
from ..stores.http import HttpStore
from .base import RangeSource
from .fsspec import open_fsspec_source
from .http import HttpSource, NoSizeError
from .signed import open_signed


def open_range_source(
    store: Store, info: ObjectInfo, connections: Connections | None = None
) -> RangeSource | None:
    """The source of the object that `info` (from ``store.stat``) describes; None where only whole objects can be had.

    Sends an http(s) server one request, for the version and whether it does ranges (`RangeSource.has_ranges`); none
    where `HttpStore.ask_ahead` has asked for both, or it is known to send one stream of unknown length. Sources may
    share `connections`, which they do not close. Raises `NotFoundError`, `AccessError`, `TryAgainError`, or
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
        if source is None and not isinstance(store, HttpStore):
            return None
        if source is not None:
            if source.has_ranges:
                return source
            source.close()
        self._note(store.describe(info.name))
        return None

    def _note(self, described: str) -> None:
        with self._lock:
            if described not in self.streamed:
                self.streamed.append(described)


def _open_http(store: HttpStore, info: ObjectInfo, connections: Connections | None) -> RangeSource | None:
    if info.is_stream:
        return None
    owns = connections is None
    try:
        source = HttpSource(
            lambda: store.address(info.name),
            (connections or Connections()).by(store.settings.route),
            owns_connections=owns,
            expected=info,
            heard=store.heard,
            outages=store.outages,
            first=store.first_bytes(info.name),
        )
    except NoSizeError:
        return None
    if source.stored_sums:
        store.add_sums(info.name, source.stored_sums)
    return source
