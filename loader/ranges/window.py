"""A member of an archive as an object of its own: a window on the archive's source."""

from __future__ import annotations

from collections.abc import Iterable

from ..http.answers import Arrived
from .base import RangeSource


class WindowSource:
    """Bytes ``[base, base + size_bytes)`` of `whole`, which stays open until whoever opened it closes it.

    Its version is the whole object's, so a window changes when anything of that object does.
    """

    def __init__(
        self, whole: RangeSource, base: int, size_bytes: int, *, object_name: str, described: str
    ) -> None:
        self.whole = whole
        self.base = base
        """Where it begins in the object."""
        self.object_name = object_name
        """The object's name in its store."""
        self.size_bytes = size_bytes
        self.kind = whole.kind
        self.has_ranges = whole.has_ranges
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
        """The whole object's connections are shared by its windows."""


def shared_source(source: RangeSource) -> RangeSource:
    """What `source` shares its connections with: of a window, the whole object."""
    return source.whole if isinstance(source, WindowSource) else source
