"""Sends one request over one connection and receives its answer; a caller can end the wait for a silent server.

`exchange` sends the request and returns the head of the answer, an `Answer`. `Answer.receive` receives a body of known
length into the caller's memory, `Answer.pieces` any body to its end. All call `Arrived`, which ends them by raising.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import AccessError, RankloadError
from ..retries import TryAgainError
from ..store_errors import store_error
from .addresses import Origin, origin_of, request_target
from .answers import Arrived, cut_short
from .connections import Connection, Connections

Method = Literal["GET", "HEAD"]
SILENCE_TIMEOUT_S = 60.0
"""Without a byte for so long, a connection is given up. A slow one never is."""
GLANCE_S = 0.5
"""How often `Arrived` is called while nothing comes."""
GATHER_BYTES = 1 << 20
"""How much of an encrypted answer is received before `Arrived` is called: it comes in records of 16 KiB at most, and a
call for each takes about as long as deciphering it."""
GATHER_S = 0.02
"""How long it is gathered at most, where less comes."""
PIECE_BYTES = 1 << 20
"""The memory that `Answer.pieces` receives into: small enough to be in the processor's cache still when it is read."""
_CHUNK_BYTES = 256 << 10
_ERROR_BODY_BYTES = 4096

_INTERIM = frozenset({102, 103})
_MOST_INTERIM = 8
"""Answers that come before the answer (RFC 9110, 15.2): more of them are taken for a mistake."""

_BROKEN_OFF = (ConnectionError, http.client.IncompleteRead, ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""How a connection ends that the other side breaks off; what is no HTTP at all is none of it."""

_ReceiveOnce = Callable[[socket.socket, memoryview], int]
_Receive = Callable[[memoryview], int]
"""Receives bytes into the beginning of some memory, and returns how many: 0 where there are no more."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a server is asked for."""

    method: Method
    url: str = field(repr=False)
    described: str
    """What messages call the object."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def exchange(connections: Connections, request: Request, arrived: Arrived) -> Answer:
    """Sends `request`, and returns the head of the answer, whatever its status.

    The answer is the caller's to `Answer.give_back` or to `Answer.drop`. A kept connection that the server has closed
    is replaced once. Raises `TryAgainError` or `AccessError` as `network_error` does, and whatever `arrived` raises.
    """
    origin, described = origin_of(request.url), request.described
    sent = {"Accept-Encoding": "identity", "Accept": "*/*", "User-Agent": "rankload", **request.headers}
    connection = connections.take(origin)
    while True:
        silence_s = connection.silence_timeout_s or SILENCE_TIMEOUT_S
        is_connected = False
        try:
            sock = _connected(connection, arrived)
            is_connected = True
            sock.settimeout(connection.connect_timeout_s)
            target = connection.target_prefix + request_target(request.url)
            connection.http.request(request.method, target, headers={**sent, **connection.headers})
            waiting = _Waiting(_receive_once, sock, arrived, silence_s)
            response = _head(connection, waiting)
            _check_transfer_encoding(response, described)
            return Answer(connections, connection, sock, response, waiting)
        except BaseException as error:
            connections.drop(connection)
            if connection.is_used and isinstance(error, ConnectionError | http.client.BadStatusLine):
                connection = connections.take(origin, fresh=True)
                continue
            if isinstance(error, OSError | http.client.HTTPException):
                raise network_error(error, described, origin, silence_s, is_connected=is_connected) from None
            raise


@dataclass
class Answer:
    """The head of an answer, and the connection over which its body comes."""

    connections: Connections
    connection: Connection
    sock: socket.socket
    response: http.client.HTTPResponse
    waiting: _Waiting
    """What `response` is read through; says after how long a silence the body is given up."""
    is_read: bool = False
    """Whether `pieces` has come to the end of the body."""

    @property
    def n_bytes(self) -> int | None:
        """How long the body is, before any of it is read; None where its end alone tells that."""
        length: int | None = self.response.length
        return length

    def error_body(self) -> bytes:
        """The first bytes of an answer that carries an error; the connection is of no use afterwards."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            self.waiting.silence_s = GLANCE_S
            return self.response.read1(_ERROR_BODY_BYTES)
        return b""

    def receive(
        self,
        start: int,
        n_bytes: int,
        view: memoryview,
        targets: Iterator[memoryview],
        arrived: Arrived,
        described: str,
    ) -> memoryview:
        """Fills `view`, then `targets`, with `n_bytes` of the body; returns what is left of the last one.

        `start` is where the body begins in the object, for messages. Raises `TryAgainError` where it ends early, the
        connection's own errors where it broke before anything came, and whatever `arrived` raises.
        """
        receive = _receiver(self, arrived)
        got = 0
        while got < n_bytes:
            if not view:
                view = next(targets)
            try:
                n_new = receive(view[: n_bytes - got])
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException) as error:
                if got or isinstance(error, http.client.IncompleteRead):
                    raise cut_short(described, start, n_bytes, got) from None
                raise
            if not n_new:
                raise cut_short(described, start, n_bytes, got)
            got += n_new
            view = view[n_new:]
            arrived(n_new)
        return view

    def pieces(self, arrived: Arrived, described: str) -> Iterator[memoryview]:
        """The body to its end, piece by piece, each in the same memory as the one before.

        `arrived` is called with 0 while nothing comes, and never with more. Raises `TryAgainError` where the body ends
        before the length that the server told, or without its last chunk, and for what `network_error` says; and
        whatever `arrived` raises.
        """
        n_bytes = self.n_bytes
        got = 0
        memory = memoryview(bytearray(PIECE_BYTES))
        receive = None
        while got != n_bytes:
            try:
                receive = receive or _receiver(self, arrived)
                n_new = receive(memory if n_bytes is None else memory[: n_bytes - got])
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, http.client.IncompleteRead) or (
                    got and not isinstance(error, TimeoutError)
                ):
                    raise cut_short(described, 0, n_bytes, got) from None
                raise network_error(
                    error, described, self.connection.origin, self.waiting.silence_s
                ) from None
            if not n_new:
                if n_bytes is None:
                    break
                raise cut_short(described, 0, n_bytes, got)
            got += n_new
            yield memory[:n_new]
        self.is_read = True

    def give_back(self) -> None:
        """Ends an answer that was read to its end: its connection is kept where the server keeps it."""
        self.response.close()
        if self.response.will_close:
            self.connections.drop(self.connection)
        else:
            self.connections.give_back(self.connection)

    def drop(self) -> None:
        """Ends an answer that was not read to its end, and its connection with it."""
        self.response.close()
        self.connections.drop(self.connection)


def network_error(
    error: Exception,
    described: str,
    origin: Origin,
    silence_s: float | None = None,
    *,
    is_connected: bool = True,
) -> RankloadError | TryAgainError:
    """The error for a failure of the connection to `origin`: a `TryAgainError`, unless it will last.

    A certificate that does not verify and a URL that is not valid stay so, and a name that does not resolve does unless
    it did before. `silence_s` is how long the server was waited for, `is_connected` whether it had taken the
    connection: then it is there, where it is what broke it off.
    """
    if isinstance(error, TimeoutError):
        waited_s = SILENCE_TIMEOUT_S if silence_s is None else silence_s
        text = f"{described}: the server sent nothing for {waited_s:g} s"
        if not is_connected:
            text = f"{described}: the server took no connection in time"
        return TryAgainError(AccessError(text, path=described), origin=origin, is_there=False)
    if isinstance(error, http.client.InvalidURL):
        # Its own text has the URL, whose query may be a signature.
        return AccessError(f"{described}: not a valid http(s) URL", path=described)
    mapped = store_error(error, described)
    if isinstance(error, ssl.SSLCertVerificationError):
        return mapped
    return TryAgainError(
        mapped,
        origin=origin,
        is_there=is_connected and isinstance(error, _BROKEN_OFF),
        lasting=isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN,
    )


def _connected(connection: Connection, arrived: Arrived) -> socket.socket:
    """The connection's socket. What makes it blocks (names, TLS, proxies), so it is made by a thread, and awaited."""
    if connection.http.sock is not None:
        return connection.connect()
    made: list[socket.socket] = []
    failed: list[BaseException] = []
    ended, given_up = threading.Event(), threading.Event()

    def connect() -> None:
        try:
            made.append(connection.connect())
        except BaseException as error:
            failed.append(error)
        ended.set()
        if given_up.is_set():
            connection.hang_up()

    threading.Thread(target=connect, name="rankload-connect", daemon=True).start()
    try:
        while not ended.wait(GLANCE_S):
            arrived(0)
    except BaseException:
        given_up.set()
        raise
    if failed:
        raise failed[0]
    return made[0]


def _head(connection: Connection, waiting: _Waiting) -> http.client.HTTPResponse:
    """The head of the answer, read through `waiting`; ConnectionError where it is cut short."""
    waiting.sock.settimeout(GLANCE_S)
    raws: list[_Raw] = []

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *arguments: Any, **keywords: Any) -> None:
            super().__init__(sock, *arguments, **keywords)
            raws.append(_Raw(waiting, self.fp))
            self.fp = io.BufferedReader(raws[0])

        def _read_status(self) -> tuple[str, int, str]:
            # http.client passes over 100 alone.
            for _ in range(_MOST_INTERIM):
                found: tuple[str, int, str] = getattr(super(), "_read_status")()  # noqa: B009
                if found[1] not in _INTERIM:
                    break
                http.client.parse_headers(self.fp)
            return found

    connection.http.response_class = Response
    response = connection.http.getresponse()
    # http.client takes the end of the connection for the end of the head. Nothing is read past a head that is whole.
    if raws[0].is_at_end:
        response.close()
        raise ConnectionResetError("the connection ended within the head of an answer")
    return response


def _check_transfer_encoding(response: http.client.HTTPResponse, described: str) -> None:
    """Raises `AccessError` for a body in a form that http.client would hand on as it is, framing included."""
    stated = ", ".join(response.headers.get_all("Transfer-Encoding", []))
    if not response.chunked and stated.strip().lower() not in ("", "identity"):
        raise AccessError(
            f"{described}: the server sends it with Transfer-Encoding {stated!r}: expected chunked, or none",
            path=described,
        )


class _Waiting:
    """`once`, tried until something comes. Meanwhile it calls `arrived`; TimeoutError after `silence_s`."""

    def __init__(self, once: _ReceiveOnce, sock: socket.socket, arrived: Arrived, silence_s: float) -> None:
        self._once, self._arrived = once, arrived
        self.sock, self.silence_s = sock, silence_s

    def __call__(self, view: memoryview) -> int:
        heard = time.monotonic()
        while True:
            try:
                return self._once(self.sock, view)
            except TimeoutError:
                if time.monotonic() - heard >= self.silence_s:
                    raise
                self._arrived(0)


def _receiver(answer: Answer, arrived: Arrived) -> _Receive:
    """What receives the answer's body. While nothing comes it calls `arrived`, and raises TimeoutError in the end."""
    response, sock = answer.response, answer.sock
    # Of a chunked body little is asked for at a time: records would be gathered for longer than they take.
    gathers = isinstance(sock, ssl.SSLSocket) and not response.chunked
    wait = _Waiting(_receive_records if gathers else _receive_once, sock, arrived, answer.waiting.silence_s)
    sock.settimeout(GLANCE_S)
    # The beginning of the body is with the parser already.
    beginning = bytes(response.fp.peek(1))

    def receive(view: memoryview) -> int:
        nonlocal beginning
        if beginning:
            n_new = min(len(view), len(beginning))
            view[:n_new] = beginning[:n_new]
            beginning = beginning[n_new:]
            return n_new
        return wait(view)

    if not response.chunked:
        return receive

    # http.client takes a chunked body apart, and reads it through `receive`, which can be ended in the middle.
    response.fp = io.BufferedReader(_Raw(receive, response.fp))

    def receive_of_chunk(view: memoryview) -> int:
        data = response.read1(min(len(view), _CHUNK_BYTES))
        if (response.chunk_left or 0) < 0:
            # Of a chunk of negative size http.client reads whatever comes next, and more than was asked for.
            raise http.client.IncompleteRead(b"")
        view[: len(data)] = data
        return len(data)

    return receive_of_chunk


class _Raw(io.RawIOBase):
    """The bytes that `receive` receives, as a raw file. Closes `held` too, without which the socket would close."""

    def __init__(self, receive: _Receive, held: Any) -> None:
        super().__init__()
        self._receive = receive
        self._held = held
        self.is_at_end = False
        """Whether there was an attempt to read where nothing more comes."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n_new = self._receive(memoryview(buffer))
        self.is_at_end |= not n_new
        return n_new

    def close(self) -> None:
        self._held.close()
        super().close()


def _receive_once(sock: socket.socket, view: memoryview) -> int:
    return sock.recv_into(view)


def _receive_records(sock: socket.socket, view: memoryview) -> int:
    """As ``recv_into``, but many records at a time. An error after the first one is met by the next call."""
    view = view[:GATHER_BYTES]
    end = time.monotonic() + GATHER_S
    got = 0
    while got < len(view):
        try:
            n_new = sock.recv_into(view[got:])
        except OSError:
            if got:
                break
            raise
        got += n_new
        if not n_new or time.monotonic() >= end:
            break
    return got
