"""The range source over another rank's file, so that what several nodes need is fetched from the store once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from ...distributed.range_server import PeerAddress, PeerConnection, UnreachableError
from ..errors import AccessError
from ..http.answers import Arrived
from ..retries import Outages, TryAgainError
from .base import pieces


class PeerUnreachableError(AccessError):
    """No address of the rank leads to it, so that its node's files cannot be had. Internal: the store has them too."""


class PeerSource:
    """The object that the rank at `address` fetches and hands out (``distributed.range_server``), by the name `key`.

    `moved` is called while no bytes come but that rank's own file grows, so that this is no stall. `rank` is that
    rank, for messages.
    """

    kind = "peer"
    has_ranges = True
    version = None
    max_connections = 4

    def __init__(
        self,
        address: PeerAddress,
        key: str,
        size_bytes: int,
        *,
        rank: int,
        moved: Callable[[], None],
        outages: Outages,
    ) -> None:
        self.size_bytes = size_bytes
        self.outages = outages
        self._address = address
        self._key = key
        self._rank = rank
        self._moved = moved
        self._seen = -1
        self._was_reached = False
        self._lock = threading.Lock()
        self._idle: list[PeerConnection] = []

    def describe(self) -> str:
        return f"{self._key}, from rank {self._rank} (host {self._address.host})"

    def read_into(
        self, start: int, stop: int, views: Iterable[memoryview], arrived: Arrived = lambda n_bytes: None
    ) -> None:
        def on_wait(progress: int | None) -> None:
            if progress is not None and progress != self._seen:
                self._seen = progress
                self._moved()
            arrived(0)

        connection: PeerConnection | None = None
        try:
            connection = self._take()
            self.outages.answered(self._address)
            connection.ask(self._key, start, stop)
            for view in pieces(views):
                left = view
                while left:
                    count = connection.receive(left, on_wait)
                    left = left[count:]
                    arrived(count)
            with self._lock:
                self._idle.append(connection)
            connection = None
        except ValueError as error:
            raise AccessError(f"{self.describe()}: {error}", path=self._key) from error
        except UnreachableError as error:
            failure = f"{self.describe()}: {error}"
            if not self._was_reached:
                raise PeerUnreachableError(failure, path=self._key) from error
            raise TryAgainError(AccessError(failure, path=self._key)) from error
        except OSError as error:
            # Mostly that rank failed; the channel will say why.
            raise TryAgainError(
                AccessError(f"{self.describe()}: {error}", path=self._key),
                origin=self._address,
                is_there=connection is not None,
            ) from error
        finally:
            if connection is not None:
                connection.close()

    def confirm(self) -> None:
        """Does nothing: the rank that fetches the object compares versions."""

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> PeerConnection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        connection = PeerConnection(self._address)
        self._was_reached = True
        return connection
