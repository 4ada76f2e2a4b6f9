"""What each rank knows of its node's files that come in parts: their names, where from, and what it read past them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from ..errors import CorruptError
from ..http.connections import Connections
from ..ranges.base import RangeSource
from ..ranges.open import open_range_source
from ..ranges.window import WindowSource
from ..store_errors import TryAgainError
from ..stores.base import ObjectInfo, Store
from .origin import Origin


class KnownParts:
    """Filled as files are fetched; `connections` gives those that all sources share."""

    def __init__(self, connections: Callable[[], Connections]) -> None:
        self._connections = connections
        self._known: dict[str, tuple[str, Origin]] = {}
        self._path_of: dict[str, str] = {}
        self._sources: dict[str, RangeSource] = {}
        self._own_bytes: dict[str, int] = {}
        self._lock = threading.Lock()

    def note(self, path: str, name: str, origin: Origin) -> None:
        """The node's file at `path` comes in parts. `name` is what the whole job calls it."""
        self._known[path] = (name, origin)
        self._path_of[name] = path

    def __contains__(self, path: str) -> bool:
        return path in self._known

    def name_of(self, path: str) -> str:
        """What the whole job calls the file at `path`."""
        return self._known[path][0]

    def path_of(self, name: str) -> str:
        """Where the file is on this node."""
        return self._path_of[name]

    def find(self, name: str) -> str | None:
        """The same; None where this node does not have it."""
        return self._path_of.get(name)

    def open_source(self, store: Store, path: str) -> RangeSource:
        """The bytes behind the node's file at `path`, for this rank to read itself.

        Raises as `open_range_source` does, and `CorruptError` where the object is another version by now.
        """
        name, origin = self._known[path]
        with self._lock:
            if origin.object_name not in self._sources:
                self._sources[origin.object_name] = self._open(store, name, origin)
            source = self._sources[origin.object_name]
        if origin.nbytes is None:
            return source
        return WindowSource(
            source, origin.base, origin.nbytes, object_name=origin.object_name, described=name
        )

    def add_fetched(self, by_path: Mapping[str, int]) -> None:
        """Notes what this rank read of files past the node's."""
        for path, n_bytes in by_path.items():
            self._own_bytes[path] = self._own_bytes.get(path, 0) + n_bytes

    def own_bytes(self, path: str) -> int:
        """What this rank read for itself alone of the file at `path`, or of the archive whose folder that is."""
        return sum(
            n_bytes
            for each, n_bytes in self._own_bytes.items()
            if path and (each == path or each.startswith(f"{path}/"))
        )

    def close(self) -> None:
        """Closes the sources."""
        for source in self._sources.values():
            source.close()

    def _open(self, store: Store, name: str, origin: Origin) -> RangeSource:
        info = ObjectInfo(origin.object_name, origin.size_bytes, origin.told_version)
        try:
            source = open_range_source(store, info, self._connections())
        except TryAgainError as error:
            raise error.error from error
        if source is None or (source.version, source.size_bytes) != (origin.version, origin.size_bytes):
            got = "nothing" if source is None else f"{source.size_bytes} bytes, version {source.version}"
            raise CorruptError(
                f"{name}: changed while it was loaded: expected {origin.size_bytes} bytes, version "
                f"{origin.version}, got {got}",
                path=name,
            )
        return source
