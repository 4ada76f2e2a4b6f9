"""Sends one GET over one connection and receives its answer; a caller can end the wait for a silent server.

`exchange` sends the request and returns the head of the answer, an `Answer`; `Answer.receive` receives the body.
Both call `Arrived`, which ends them by raising.
"""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import AccessError, RankloadError
from ..store_errors import TryAgainError, store_error
from .addresses import origin_of, request_target
from .answers import Arrived, cut_short
from .connections import CONNECT_TIMEOUT_S, Connection, Connections

SILENCE_TIMEOUT_S = 60.0
"""Without a byte for so long, a connection is given up. A slow one never is."""
GLANCE_S = 0.5
"""How often `Arrived` is called while nothing comes."""
GATHER_BYTES = 1 << 20
"""How much of an encrypted answer is received before `Arrived` is called: it comes in records of 16 KiB at most, and a
call for each takes about as long as deciphering it."""
GATHER_S = 0.02
"""How long it is gathered at most, where less comes."""
_ERROR_BODY_BYTES = 4096


def exchange(
    connections: Connections, url: str, headers: Mapping[str, str], arrived: Arrived, described: str
) -> Answer:
    """Sends a GET for `url` with `headers`, and returns the head of the answer, whatever its status.

    The answer's connection is the caller's to give back or to drop. A kept connection that the server has closed is
    replaced once. Raises `TryAgainError` or `AccessError` as `network_error` does, and whatever `arrived` raises.
    """
    origin = origin_of(url)
    sent = {"Accept-Encoding": "identity", "Accept": "*/*", "User-Agent": "rankload", **headers}
    connection = connections.take(origin)
    while True:
        try:
            sock = connection.connect()
            sock.settimeout(CONNECT_TIMEOUT_S)
            target = connection.target_prefix + request_target(url)
            connection.http.request("GET", target, headers={**sent, **connection.headers})
            _await_readable(sock, arrived)
            sock.settimeout(SILENCE_TIMEOUT_S)
            return Answer(connection, sock, connection.http.getresponse())
        except BaseException as error:
            connections.drop(connection)
            if connection.is_used and isinstance(error, ConnectionError | http.client.BadStatusLine):
                connection = connections.take(origin, fresh=True)
                continue
            if isinstance(error, OSError | http.client.HTTPException):
                raise network_error(error, described) from None
            raise


@dataclass
class Answer:
    """The head of an answer, and the connection over which its body comes."""

    connection: Connection
    sock: socket.socket
    response: http.client.HTTPResponse

    def error_body(self) -> bytes:
        """The first bytes of an answer that carries an error; the connection is of no use afterwards."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.sock.settimeout(GLANCE_S)
            return self.response.read(_ERROR_BODY_BYTES)
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
        connection's own errors where nothing came at all, and whatever `arrived` raises.
        """
        response, sock = self.response, self.sock
        receive = _receive_records if isinstance(sock, ssl.SSLSocket) else _receive_once
        # A chunked body has to be taken apart; of any other, only the beginning is with the parser.
        sock.settimeout(SILENCE_TIMEOUT_S if response.chunked else GLANCE_S)
        buffered = 0
        if not response.chunked:
            with contextlib.suppress(TimeoutError):
                buffered = len(response.fp.peek(1))
        got = 0
        heard = time.monotonic()
        while got < n_bytes:
            if not view:
                view = next(targets)
            wanted = view[: n_bytes - got]
            try:
                if response.chunked:
                    n_new = response.readinto(wanted)
                elif buffered:
                    n_new = response.fp.readinto(wanted[:buffered])
                    buffered -= n_new
                else:
                    n_new = receive(sock, wanted)
            except TimeoutError:
                if time.monotonic() - heard >= SILENCE_TIMEOUT_S:
                    raise
                arrived(0)
                continue
            except (OSError, http.client.HTTPException):
                if got:
                    raise cut_short(described, start, n_bytes, got) from None
                raise
            if not n_new:
                raise cut_short(described, start, n_bytes, got)
            got += n_new
            heard = time.monotonic()
            view = view[n_new:]
            arrived(n_new)
        return view


def network_error(error: Exception, described: str) -> RankloadError | TryAgainError:
    """The error for a failure of the connection: a `TryAgainError`, unless it will last.

    A name that does not resolve, a certificate that does not verify and a URL that is not valid stay so.
    """
    if isinstance(error, TimeoutError):
        text = f"{described}: the server sent nothing for {SILENCE_TIMEOUT_S:g} s, or took no connection"
        return TryAgainError(AccessError(text, path=described))
    mapped = store_error(error, described)
    lasting = isinstance(error, ssl.SSLCertVerificationError | http.client.InvalidURL) or (
        isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN
    )
    return mapped if lasting else TryAgainError(mapped)


def _await_readable(sock: socket.socket, arrived: Arrived) -> None:
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    end = time.monotonic() + SILENCE_TIMEOUT_S
    while not poll.poll(GLANCE_S * 1000):
        if time.monotonic() >= end:
            raise TimeoutError
        arrived(0)


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
