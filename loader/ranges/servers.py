"""Which http(s) servers do ranges, as the first object of each told: one that does not is not asked again."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..http.addresses import Origin, origin_of
from ..stores.base import ObjectInfo, Store
from ..stores.http import HttpStore
from .base import RangeSource


class RangeServers:
    """What one load learns. Threads may share it."""

    def __init__(self) -> None:
        self.streamed: list[str] = []
        """Objects of servers without ranges, as messages call them."""
        self._does: dict[Origin, bool] = {}
        self._asking: dict[Origin, threading.Lock] = {}
        self._lock = threading.Lock()

    def open(
        self, store: Store, info: ObjectInfo, open_source: Callable[[], RangeSource | None]
    ) -> RangeSource | None:
        """What `open_source` opens; None where ranges of the object cannot be had. Raises as that does.

        The first object of a server is opened while others of it wait.
        """
        if not isinstance(store, HttpStore):
            return self._with_ranges(store, info, open_source())
        server = origin_of(info.name)
        with self._lock:
            asking = self._asking.setdefault(server, threading.Lock())
        with asking:
            if server not in self._does:
                source = open_source()
                if source is not None and source.size_bytes:
                    self._does[server] = source.has_ranges
                return self._with_ranges(store, info, source)
        if not self._does[server]:
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
