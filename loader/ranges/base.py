"""What ranges of bytes are read from: one interface over http(s), signed URLs, fsspec's reads and local files.

A source stands for one object at one version, fixed when it is opened and compared in every answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from ..http.answers import Arrived

READ_BYTES = 1 << 20
"""How much is read before `Arrived` is called again, at most (backends that hand out whole parts: 8 MiB)."""


class RangeSource(Protocol):
    """One object. Methods block, and may be called from several threads; each read has a connection of its own."""

    @property
    def size_bytes(self) -> int:
        """Of the whole object."""

    @property
    def version(self) -> str | None:
        """Changes when the content does; None where the store has none, and only the size is compared."""

    @property
    def kind(self) -> str:
        """How it is read, for receipts: ``http``, ``signed http``, ``file``, or the backend's protocol."""

    @property
    def has_ranges(self) -> bool:
        """Where false, every read must begin at 0: stream the object once."""

    @property
    def max_connections(self) -> int:
        """More reads at once are of no use, or not safe."""

    def describe(self) -> str:
        """The object for messages and receipts; holds no secret."""

    def read_into(
        self, start: int, stop: int, views: Iterable[memoryview], arrived: Arrived = lambda n_bytes: None
    ) -> None:
        """Fills `views`, whose lengths add up to ``stop - start``, with bytes ``[start, stop)``, in order.

        The next view is asked for when the one before is full. Raises `TryAgainError` (what `arrived` was told
        of is in place then, and the read can go on behind it), `CorruptError` where the object has changed,
        `NotFoundError`, or `AccessError`.
        """

    def confirm(self) -> None:
        """Raises `CorruptError` where the object is no longer the one that was opened.

        To be called after the last read: some backends' answers do not tell.
        """

    def close(self) -> None:
        """Gives back connections and ends reads under way; the source can be used again afterwards."""


def pieces(views: Iterable[memoryview], limit: int = READ_BYTES) -> Iterator[memoryview]:
    """`views` as byte views of at most `limit` bytes each, in order."""
    for view in views:
        flat = view.cast("B") if view.format != "B" or view.ndim != 1 else view
        for start in range(0, len(flat), limit):
            yield flat[start : start + limit]
