"""Makes a range source of a member of an archive: a window on the archive's own source."""

from __future__ import annotations

from collections.abc import Iterable

from ..http.answers import Arrived
from .base import RangeSource


class WindowSource:
    """Bytes ``[base, base + size_bytes)`` of `whole`, which the window does not close.

    Its version is the whole object's, so a window changes when anything of that object does.
    """

    def __init__(
        self, whole: RangeSource, base: int, size_bytes: int, *, object_name: str, described: str
    ) -> None:
        self.whole = whole
        self.base = base
        """Where the window begins in the whole object."""
        self.object_name = object_name
        """The name of the whole object in its store."""
        self.size_bytes = size_bytes
        self.kind = whole.kind
        self.has_ranges = whole.has_ranges
        self.outages = whole.outages
        self._described = described

    @property
    def version(self) -> str | None:
        return self.whole.version

    @property
    def max_connections(self) -> int:
        return self.whole.max_connections

    def describe(self) -> str:
        return self._described

    def read_into(
        self, start: int, stop: int, views: Iterable[memoryview], arrived: Arrived = lambda n_bytes: None
    ) -> None:
        self.whole.read_into(self.base + start, self.base + stop, views, arrived)

    def confirm(self) -> None:
        self.whole.confirm()

    def close(self) -> None:
        """Does nothing: all windows share the connections of the whole object."""


def shared_source(source: RangeSource) -> RangeSource:
    """The source whose connections `source` uses: the whole object's for a window, itself otherwise."""
    return source.whole if isinstance(source, WindowSource) else source
