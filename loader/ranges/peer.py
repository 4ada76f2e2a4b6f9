"""Ranges from another rank's file: what several nodes need leaves the store once, and travels between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from ...distributed.range_server import PeerAddress, PeerConnection
from ..errors import AccessError
from ..http.answers import Arrived
from ..store_errors import TryAgainError
from .base import pieces


class PeerSource:
    """The object as another rank's node has it, while that fetches it. `key` is its name there.

    `moved` is called while nothing comes, and that rank is known to go on.
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
        own_host: str,
        rank: int,
        moved: Callable[[], None],
    ) -> None:
        self.size_bytes = size_bytes
        self._address = address
        self._key = key
        self._own_host = own_host
        self._rank = rank
        self._moved = moved
        self._seen = -1
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
        except OSError as error:
            # Mostly that rank failed: why is on its way over the channel.
            raise TryAgainError(AccessError(f"{self.describe()}: {error}", path=self._key)) from error
        finally:
            if connection is not None:
                connection.close()

    def confirm(self) -> None:
        """The rank that fetches compares versions."""

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> PeerConnection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return PeerConnection(self._address, self._own_host)
