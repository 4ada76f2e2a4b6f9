"""Sends byte ranges of files, even of files still being written, from one rank's process to others' over TCP.

`RangeServer` serves, `PeerConnection` asks. Our own protocol, big-endian. First each side proves that it knows the key
of the server, which the ranks exchange over the channel, and which never travels here:

    client    HELLO, then 32 random bytes
    server    32 random bytes, then HMAC-SHA256 by the key of "server" and both
    client    HMAC-SHA256 by the key of "client" and both

Then the client asks, as often as it likes:

    request   4-byte length, then as much JSON: key, start, stop
    answer    frames until all bytes have come: 1 byte of kind, an 8-byte number, and what the kind adds
              "d" data: the number of bytes, then the bytes of the file
              "w" the bytes are not there yet: a number that grows while the server's file does
              "e" an error: the number of bytes, then its text

Collectives are not used: one that waits for a peer that is gone blocks in native code. Here a reader hears from the
server twice a second, also while the bytes that it wants are not there yet, and may give up at any time.

A stranger gets nothing but the server's proof: its connection ends after `PROOF_S`, or after its first wrong byte, and
there are never more than `STRANGERS` of them. Not guaranteed: secrecy, nor that nobody on the way changes what follows
the proofs; nothing is encrypted, as between torch's own processes. What was fetched is compared with its checksums.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .interfaces import network_identity, own_addresses
from .printable import package_logger

_HELLO = b"rankload-ranges/2\n"
_NONCE_BYTES = 32
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
PROOF_S = 5.0
"""How long a connection may take until both sides have proved themselves."""
STRANGERS = 64
"""How many connections without a proof are open at once; more are closed at once."""
CONNECT_S = 10.0
"""How long all addresses of a server together are tried."""
_ANSWER_S = 2.0
"""How long one of them has to prove that it is that server."""
_NEXT_ADDRESS_S = 0.25
"""After how long without a connection the next address is tried too."""

_logger = package_logger()


class UnreachableError(OSError):
    """No address of a server leads to it from here."""


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
    """How to reach a rank's `RangeServer`, and the key by which both sides prove themselves."""

    host: str
    """For messages."""
    network: str
    """`interfaces.network_identity` of its process: where it is ours too, loopback leads there."""
    addresses: tuple[str, ...]
    """To try in order; at last its host name."""
    port: int
    key: str

    def __repr__(self) -> str:
        return f"PeerAddress({self.host!r}, {self.addresses!r}, {self.port})"  # without the key

    def as_record(self) -> Any:
        """As JSON types, for the channel."""
        return [self.host, self.network, list(self.addresses), self.port, self.key]

    @classmethod
    def from_record(cls, record: Any) -> PeerAddress:
        """What `as_record` made."""
        host, network, addresses, port, key = record
        return cls(host, network, tuple(addresses), port, key)


class RangeServer:
    """Serves this rank's files until it is closed, in threads of its own.

    `find(key)` returns the file for a key, or None where there is none; it is called in the server's threads. `host` is
    for messages. It listens on the interface that `interface` names (`interfaces.own_addresses`), on all by default.
    Raises `TopologyError` where there is no such interface.
    """

    def __init__(self, find: Callable[[str], Served | None], host: str, interface: str | None = None) -> None:
        self._find = find
        self._key = secrets.token_bytes(32)
        addresses = own_addresses(interface)
        self._listener = _listen(addresses[0] if interface is not None else "")
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._serving: dict[socket.socket, threading.Thread] = {}
        self._strangers: set[socket.socket] = set()
        self.address = PeerAddress(
            host,
            network_identity(),
            addresses[:1] if interface is not None else addresses,
            self._listener.getsockname()[1],
            self._key.hex(),
        )
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
                if self._closed.is_set() or len(self._strangers) >= STRANGERS:
                    connection.close()
                    continue
                self._strangers.add(connection)
                self._serving[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                if not self._knows_key(connection):
                    return
                with self._lock:
                    self._strangers.discard(connection)
                while not self._closed.is_set():
                    length = _REQUEST.unpack(_receive(connection, _REQUEST.size))[0]
                    if length > _MAX_REQUEST_BYTES:
                        return
                    # Once its length has come, the rest of a request comes at once.
                    asked = json.loads(_receive(connection, length))
                    self._answer(connection, str(asked["key"]), int(asked["start"]), int(asked["stop"]))
        except OSError:
            pass  # the other side has left, mostly because it has what it wanted
        except Exception as error:
            # What came here was no request. Nothing that is sent to this port may end more than its connection.
            _logger.debug("a connection for byte ranges was ended: %s", type(error).__name__)
        finally:
            with self._lock:
                self._strangers.discard(connection)
                self._serving.pop(connection, None)

    def _knows_key(self, connection: socket.socket) -> bool:
        """Proves this server to the client, and says whether that did as much, in `PROOF_S` altogether."""
        until = time.monotonic() + PROOF_S
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hello = _receive(connection, len(_HELLO) + _NONCE_BYTES, until, begins=_HELLO)
        theirs, ours = hello[len(_HELLO) :], secrets.token_bytes(_NONCE_BYTES)
        connection.sendall(ours + _proof(self._key, b"server", theirs, ours))
        proved = _receive(connection, _NONCE_BYTES, until)
        connection.settimeout(PATIENCE_S)
        return hmac.compare_digest(proved, _proof(self._key, b"client", theirs, ours))

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

    def __init__(self, address: PeerAddress) -> None:
        """Connects, and has the server prove that it is the one meant.

        Over loopback where that is the server's too; else its addresses are tried, each a moment after the one before,
        and the first that leads to the server is taken. Raises `UnreachableError` where none does within `CONNECT_S`.
        """
        near = address.network != "" and address.network == network_identity()
        places = ("127.0.0.1", *address.addresses) if near else address.addresses
        self._socket = _connect(places, address.port, bytes.fromhex(address.key))
        self._socket.settimeout(_WAIT_FRAME_S)
        self._left = 0

    def ask(self, key: str, start: int, stop: int) -> None:
        """Asks for bytes ``[start, stop)`` of a file, which `receive` then gets in order."""
        request = json.dumps({"key": key, "start": start, "stop": stop}).encode()
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


def _proof(key: bytes, role: bytes, theirs: bytes, ours: bytes) -> bytes:
    """What the side of `role` proves itself with; `theirs` are the client's random bytes, `ours` the server's."""
    return hmac.digest(key, role + b"\0" + theirs + ours, "sha256")


def _connect(places: tuple[str, ...], port: int, key: bytes) -> socket.socket:
    """A connection to the server that knows `key`, at one of `places`. Raises `UnreachableError`."""
    until = time.monotonic() + CONNECT_S
    failures: dict[str, str] = {}
    while True:
        busy = False
        for place, connection in _connections(places, port, until, failures):
            try:
                _prove(connection, key, until)
                return connection
            except OSError as error:
                # Another server's, or this one's with too many strangers.
                connection.close()
                failures[place] = f"{error}"
                busy = True
        if not busy or time.monotonic() > until - _NEXT_ADDRESS_S:
            tried = "; ".join(f"{place}: {failure}" for place, failure in failures.items())
            raise UnreachableError(
                f"none of its addresses leads to it (port {port}): {tried or 'none known'}"
            )
        time.sleep(_NEXT_ADDRESS_S)


def _connections(
    places: tuple[str, ...], port: int, until: float, failures: dict[str, str]
) -> Iterator[tuple[str, socket.socket]]:
    """Each connection that could be made to one of `places`, as soon as it is; those not taken are closed.

    The next place is tried where the one before has failed, or has not answered for `_NEXT_ADDRESS_S`.
    """
    waiting = list(dict.fromkeys(places))
    trying: dict[socket.socket, str] = {}
    start_next = 0.0
    try:
        while (waiting or trying) and time.monotonic() < until:
            if waiting and (time.monotonic() >= start_next or not trying):
                place = waiting.pop(0)
                start_next = time.monotonic() + _NEXT_ADDRESS_S
                try:
                    trying |= dict.fromkeys(_begun(place, port, until), place)
                except OSError as error:
                    failures[place] = str(error.strerror or error)
                    continue
            left = min(until, start_next if waiting else until) - time.monotonic()
            for connection in _writable(trying, max(0.0, left)):
                place = trying.pop(connection)
                number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number:
                    connection.close()
                    failures[place] = os.strerror(number)
                    start_next = 0.0
                else:
                    yield place, connection
        for place in [*trying.values(), *waiting]:
            failures[place] = f"no answer within {CONNECT_S:g} s"
    finally:
        for connection in trying:
            connection.close()


def _writable(connections: Iterable[socket.socket], seconds: float) -> list[socket.socket]:
    """Those that are connected, or have failed to, as soon as there are some, or none after so many `seconds`."""
    by_number = {one.fileno(): one for one in connections}
    poll = select.poll()
    for number in by_number:
        poll.register(number, select.POLLOUT)
    return [by_number[number] for number, _ in poll.poll(1000 * seconds)]


def _begun(place: str, port: int, until: float) -> list[socket.socket]:
    """Sockets that connect to `place`, one for each address of it; a host name is looked up by a thread."""
    found: list[Any] = []
    failed: list[OSError] = []

    def look_up() -> None:
        try:
            found.extend(socket.getaddrinfo(place, port, type=socket.SOCK_STREAM))
        except OSError as error:
            failed.append(error)

    if place[:1].isdigit() or ":" in place:
        look_up()
    else:
        thread = threading.Thread(target=look_up, name="rankload-look-up", daemon=True)
        thread.start()
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            raise TimeoutError("the name server has not answered")
    if failed:
        raise failed[0]
    begun = []
    for family, kind, protocol, _, where in list(found):
        with contextlib.suppress(OSError):
            connection = socket.socket(family, kind, protocol)
            connection.setblocking(False)
            if connection.connect_ex(where) in (0, errno.EINPROGRESS):
                begun.append(connection)
            else:
                connection.close()
    if not begun:
        raise OSError("no way leads there")
    return begun


def _prove(connection: socket.socket, key: bytes, until: float) -> None:
    """Has the server prove itself, and proves this side. Raises OSError where it cannot."""
    connection.setblocking(True)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    until = min(until, time.monotonic() + _ANSWER_S)
    connection.settimeout(max(0.01, until - time.monotonic()))
    ours = secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(_HELLO + ours)
    answer = _receive(connection, 2 * _NONCE_BYTES, until)
    theirs, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, b"server", ours, theirs)):
        raise ConnectionRefusedError("another server answers there")
    connection.sendall(_proof(key, b"client", ours, theirs))


def _listen(address: str) -> socket.socket:
    if ":" in address:
        return socket.create_server((address, 0), family=socket.AF_INET6, backlog=128)
    if not address and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    return socket.create_server((address, 0), backlog=128)


def _receive(connection: socket.socket, count: int, until: float | None = None, begins: bytes = b"") -> bytes:
    """So many bytes, until a time where that is given. ConnectionError where they end, or begin in another way."""
    data = bytearray(count)
    view = memoryview(data)
    got = 0
    while got < count:
        if until is not None:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError("the other side has not proved itself in time")
            connection.settimeout(left)
        new = connection.recv_into(view[got:])
        if new == 0:
            raise ConnectionResetError("the connection ended")
        got += new
        shown = min(got, len(begins))
        if data[:shown] != begins[:shown]:
            raise ConnectionRefusedError("what came is not this protocol")
    return bytes(data)
