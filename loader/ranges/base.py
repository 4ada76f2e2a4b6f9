"""The interface of a range source: one object at one version, of which any bytes can be read.

The version is fixed when the source is opened. Every answer that states one is compared with it, and `confirm` is for
backends whose answers state none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from ..http.answers import Arrived
from ..retries import Outages

READ_BYTES = 1 << 20
"""How much is read before `Arrived` is called again, at most (backends that hand out whole parts: 8 MiB)."""


class RangeSource(Protocol):
    """One object. Methods block, and may be called from several threads; each read has a connection to itself."""

    @property
    def size_bytes(self) -> int:
        """The size of the whole object."""

    @property
    def version(self) -> str | None:
        """Changes when the content does; None where the store has none, and only the size is compared."""

    @property
    def kind(self) -> str:
        """How it is read, for receipts: ``http``, ``signed http``, ``peer``, or the backend's protocol."""

    @property
    def has_ranges(self) -> bool:
        """Where false, every read must begin at 0: the object has to be streamed."""

    @property
    def max_connections(self) -> int:
        """How many reads at once are safe and of use."""

    @property
    def outages(self) -> Outages:
        """What the call that reads it knows of outages."""

    def describe(self) -> str:
        """What messages and receipts call the object; holds no secret."""

    def read_into(
        self, start: int, stop: int, views: Iterable[memoryview], arrived: Arrived = lambda n_bytes: None
    ) -> None:
        """Fills `views`, whose lengths add up to ``stop - start``, with bytes ``[start, stop)``, in order.

        The next view is taken when the one before is full. Raises `TryAgainError` where another attempt may help: the
        bytes counted by `arrived` are in place then, and the read can go on after them. Raises `CorruptError` where
        the object has changed, `NotFoundError`, `AccessError`, and whatever `arrived` raises.
        """

    def confirm(self) -> None:
        """Raises `CorruptError` where the object is no longer the one that was opened.

        To be called after the last read, since the answers of some backends state no version.
        """

    def close(self) -> None:
        """Closes its connections and ends reads under way; the source can be used again afterwards."""


def pieces(views: Iterable[memoryview], limit: int = READ_BYTES) -> Iterator[memoryview]:
    """`views` as byte views of at most `limit` bytes each, in order."""
    for view in views:
        flat = view.cast("B") if view.format != "B" or view.ndim != 1 else view
        for start in range(0, len(flat), limit):
            yield flat[start : start + limit]
