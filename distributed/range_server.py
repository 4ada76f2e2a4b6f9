"""Sends byte ranges of files, even of files still being written, from one rank's process to others' over TCP.

`RangeServer` serves, `PeerConnection` asks. Our own protocol, big-endian:

    request   4-byte length, then as much JSON: token, key, start, stop
    answer    frames until all bytes have come: 1 byte of kind, an 8-byte number, and what the kind adds
              "d" data: the number of bytes, then the bytes of the file
              "w" the bytes are not there yet: a number that grows while the server's file does
              "e" an error: the number of bytes, then its text

Collectives are not used: one that waits for a peer that is gone blocks in native code. Here a reader hears from the
server twice a second, also while the bytes that it wants are not there yet, and may give up at any time.

Only requests with the server's token are answered; the ranks exchange tokens over the channel. Nothing is encrypted,
as between torch's own processes.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_REQUEST = struct.Struct("!I")
_FRAME = struct.Struct("!cQ")
_MAX_REQUEST_BYTES = 64 << 10
_POLL_S = 0.005
_WAIT_FRAME_S = 0.5
"""Between two "w" frames; also after what silence a reader calls `on_wait`."""
_DATA_BYTES = 64 << 20
"""Of the file, in one frame at most."""
PATIENCE_S = 30.0
"""After what silence of the other side a connection breaks."""


@dataclass(frozen=True, slots=True)
class Served:
    """A file that the server serves, which may still grow."""

    path: str
    reach: Callable[[int, int], int]
    """``reach(start, stop)``: the end of the bytes that are there by now from `start` on, `stop` at most."""
    progress: Callable[[], int]
    """A number that grows as long as the file does."""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """How to reach a rank's `RangeServer`: host name, addresses to try in order, port, and the token to show."""

    host: str
    addresses: tuple[str, ...]
    port: int
    token: str

    def as_record(self) -> Any:
        """As JSON types, for the channel."""
        return [self.host, list(self.addresses), self.port, self.token]

    @classmethod
    def from_record(cls, record: Any) -> PeerAddress:
        """What `as_record` made."""
        host, addresses, port, token = record
        return cls(host, tuple(addresses), port, token)


class RangeServer:
    """Serves this rank's files until it is closed, in threads of its own.

    `find(key)` returns the file for a key, or None where there is none; it is called in the server's threads.
    """

    def __init__(self, find: Callable[[str], Served | None], host: str) -> None:
        self._find = find
        self._token = secrets.token_hex(16)
        self._listener = _listen()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._serving: dict[socket.socket, threading.Thread] = {}
        self.address = PeerAddress(host, _own_addresses(), self._listener.getsockname()[1], self._token)
        self._acceptor = threading.Thread(target=self._accept, name="rankload-ranges", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Ends every answer under way, and the threads."""
        self._closed.set()
        # Closing alone does not wake a thread that accepts.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            serving = dict(self._serving)
        for connection in serving:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in (self._acceptor, *serving.values()):
            thread.join(5)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed.is_set():
                    return
                time.sleep(_POLL_S)
                continue
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="rankload-ranges-answer", daemon=True
            )
            with self._lock:
                if self._closed.is_set():
                    connection.close()
                    return
                self._serving[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(PATIENCE_S)
                while not self._closed.is_set():
                    length = _REQUEST.unpack(_receive(connection, _REQUEST.size))[0]
                    if length > _MAX_REQUEST_BYTES:
                        return
                    # Once its length has come, the rest of a request comes at once.
                    asked = json.loads(_receive(connection, length))
                    if not hmac.compare_digest(str(asked["token"]), self._token):
                        return
                    self._answer(connection, str(asked["key"]), int(asked["start"]), int(asked["stop"]))
        finally:
            with self._lock:
                self._serving.pop(connection, None)

    def _answer(self, connection: socket.socket, key: str, start: int, stop: int) -> None:
        served = self._find(key)
        if served is None:
            text = f"this rank has no file {key}".encode()
            connection.sendall(_FRAME.pack(b"e", len(text)) + text)
            return
        last_frame = time.monotonic()
        with open(served.path, "rb") as file:
            while start < stop and not self._closed.is_set():
                reach = min(served.reach(start, stop), start + _DATA_BYTES)
                if reach > start:
                    connection.sendall(_FRAME.pack(b"d", reach - start))
                    connection.sendfile(file, start, reach - start)
                    start = reach
                elif time.monotonic() - last_frame > _WAIT_FRAME_S:
                    connection.sendall(_FRAME.pack(b"w", served.progress()))
                    last_frame = time.monotonic()
                else:
                    time.sleep(_POLL_S)


class PeerConnection:
    """One connection to another rank's server; used by one thread at a time."""

    def __init__(self, address: PeerAddress, own_host: str) -> None:
        """Connects; over loopback where the server is on this host. Raises OSError where no address answers."""
        self._token = address.token
        places = ("127.0.0.1", *address.addresses) if address.host == own_host else address.addresses
        failure: OSError | None = None
        for place in dict.fromkeys(places):
            try:
                self._socket = socket.create_connection((place, address.port), timeout=5)
                break
            except OSError as error:
                failure = error
        else:
            raise failure or OSError("no address")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(_WAIT_FRAME_S)
        self._left = 0

    def ask(self, key: str, start: int, stop: int) -> None:
        """Asks for bytes ``[start, stop)`` of a file, which `receive` then gets in order."""
        request = json.dumps({"token": self._token, "key": key, "start": start, "stop": stop}).encode()
        self._socket.sendall(_REQUEST.pack(len(request)) + request)

    def receive(self, view: memoryview, on_wait: Callable[[int | None], None]) -> int:
        """Puts the next bytes into `view`; returns how many, at least one.

        `on_wait` is called about twice a second while none come, with the number of a "w" frame or, while the server
        is silent, None; it may raise. Raises OSError where the connection breaks or stays silent for `PATIENCE_S`, and
        ValueError with the server's text where it refuses.
        """
        if not self._left:
            self._left = self._next(on_wait)
        count = self._patient(view[: self._left], on_wait)
        self._left -= count
        return count

    def close(self) -> None:
        self._socket.close()

    def _next(self, on_wait: Callable[[int | None], None]) -> int:
        """The number of bytes in the next "d" frame."""
        while True:
            frame = memoryview(bytearray(_FRAME.size))
            done = 0
            while done < len(frame):
                done += self._patient(frame[done:], on_wait)
            kind, number = _FRAME.unpack(frame)
            if kind == b"d":
                return int(number)
            if kind == b"e":
                raise ValueError(_receive(self._socket, min(number, _MAX_REQUEST_BYTES)).decode())
            on_wait(number)

    def _patient(self, view: memoryview, on_wait: Callable[[int | None], None]) -> int:
        """Receives into `view` and returns how many bytes; calls `on_wait` with None while none come."""
        since = time.monotonic()
        while True:
            try:
                count = self._socket.recv_into(view)
            except TimeoutError:
                if time.monotonic() - since > PATIENCE_S:
                    raise
                on_wait(None)
                continue
            if count == 0:
                raise ConnectionResetError("the other rank closed the connection")
            return count


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    return socket.create_server(("", 0), backlog=128)


def _own_addresses() -> tuple[str, ...]:
    """The address from which this machine sends to MASTER_ADDR, where there is one, and its host name."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: it only asks which way a packet would go.
        probe.connect((os.environ.get("MASTER_ADDR", ""), 9))
        address = probe.getsockname()[0]
        if not address.startswith("127."):
            found.append(address)
    return (*found, socket.gethostname())


def _receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if got == 0:
            raise ConnectionResetError("the connection ended")
        view = view[got:]
    return bytes(data)
