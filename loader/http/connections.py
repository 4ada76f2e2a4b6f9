"""Keeps connections to servers open between reads, direct or through a proxy; each read has one to itself."""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

from ..errors import AccessError
from ..redaction import redact_path
from .addresses import Origin, basic, proxy_for, proxy_parts

CONNECT_TIMEOUT_S = 10.0
MAX_IDLE_S = 15.0
"""A connection that was kept for longer is not used again."""
_BUNDLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""The environment's variables that may name a bundle of certificates; the first one that is set counts."""


@dataclass(frozen=True)
class Route:
    """How servers are reached."""

    verify: Any = None
    """Who is trusted, as for `trusted`."""
    proxy: str | None = field(default=None, repr=False)  # may have a password in it
    """An ``http://`` URL; None for what the environment sets."""
    trust_env: bool = True
    """Whether the environment's proxies and netrc file count."""
    connect_timeout_s: float | None = None
    """None for `CONNECT_TIMEOUT_S`."""
    silence_timeout_s: float | None = None
    """None for ``exchange.SILENCE_TIMEOUT_S``."""


class Connection:
    """One connection to `origin`, made when it is first used. Raises `AccessError` for a proxy that is not http."""

    def __init__(self, origin: Origin, context: ssl.SSLContext | None, route: Route) -> None:
        self.origin = origin
        self.is_used = False
        """Whether an answer has come over it: then the server may have closed it since."""
        self.headers: dict[str, str] = {}
        """Sent with every request, to a proxy."""
        self.idle_since = 0.0
        self.target_prefix = ""
        """Goes before path and query: scheme and host, which a proxy needs."""
        self.connect_timeout_s = route.connect_timeout_s or CONNECT_TIMEOUT_S
        self.silence_timeout_s = route.silence_timeout_s
        proxy = route.proxy or (proxy_for(origin) if route.trust_env else None)
        timeout_s = self.connect_timeout_s
        host, port, tunnel = origin.host, origin.port, None
        if proxy is not None:
            host, port, tunnel = self._through(proxy)
        self.http: http.client.HTTPConnection
        if origin.scheme == "https":
            self.http = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)
        else:
            self.http = http.client.HTTPConnection(host, port, timeout=timeout_s)
        if tunnel is not None:
            self.http.set_tunnel(origin.host, origin.port, tunnel)

    def connect(self) -> socket.socket:
        """The socket, connected. Raises OSError where that fails."""
        if self.http.sock is None:
            self.http.connect()
        sock: socket.socket = self.http.sock
        return sock

    def is_quiet(self) -> bool:
        """Whether the kept connection can be used again: not idle for too long, not closed, and nothing unread in it.

        What comes unasked would be taken for the next answer; networks drop idle connections without a word.
        """
        if self.http.sock is None or time.monotonic() - self.idle_since > MAX_IDLE_S:
            return False
        poll = select.poll()
        poll.register(self.http.sock, select.POLLIN)
        return not poll.poll(0)

    def interrupt(self) -> None:
        """Ends another thread's read; that thread closes the socket."""
        sock = self.http.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                # Not SSLSocket's own, which would take the session from under the reader.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def hang_up(self) -> None:
        """Closes the connection."""
        self.http.close()

    def _through(self, proxy: str) -> tuple[str, int, dict[str, str] | None]:
        """Host and port to connect to, and for https the headers of the request for a tunnel."""
        parts = proxy_parts(proxy)
        if parts is None or parts.hostname is None:
            raise AccessError(
                f"the proxy {redact_path(proxy)} is not of a kind that is known here: expected "
                "http://host:port"
            )
        headers = {}
        if parts.username is not None:
            user, password = unquote(parts.username), unquote(parts.password or "")
            headers["Proxy-Authorization"] = basic(user, password)
        if self.origin.scheme == "https":
            return parts.hostname, parts.port or 80, headers
        self.headers = headers
        host = f"[{self.origin.host}]" if ":" in self.origin.host else self.origin.host
        # As a client without a proxy would name it: signatures cover the name.
        self.target_prefix = f"http://{host}" + (f":{self.origin.port}" if self.origin.port != 80 else "")
        return parts.hostname, parts.port or 80, None


class Connections:
    """The connections of one or several sources. Threads may share it; a forked child makes its own."""

    def __init__(self, route: Route | None = None) -> None:
        """`route` says how servers are reached; certificates are read for the first connection that is encrypted."""
        self.route = route or Route()
        self._context: ssl.SSLContext | None = None
        self._others: dict[Route, Connections] = {}
        self._lock = threading.Lock()
        self._idle: dict[Origin, list[Connection]] = {}
        self._busy: set[Connection] = set()
        self._pid = os.getpid()

    def take(self, origin: Origin, *, fresh: bool = False) -> Connection:
        """A connection to `origin` that no other read uses, a new one if `fresh`. Give it back, or drop it.

        Raises `AccessError` as `trusted` and `Connection` do.
        """
        if self._pid != os.getpid():
            # Another thread of the parent may have held it.
            self._lock = threading.Lock()
        with self._lock:
            if self._pid != os.getpid():
                self._idle, self._busy, self._pid = {}, set(), os.getpid()
            idle = self._idle.get(origin, [])
            connection = None
            while idle and not fresh and connection is None:
                connection = idle.pop()
                if not connection.is_quiet():
                    connection.hang_up()
                    connection = None
            if connection is None:
                if origin.scheme == "https" and self._context is None:
                    self._context = trusted(self.route.verify)
                connection = Connection(origin, self._context, self.route)
            self._busy.add(connection)
        return connection

    def trusting(self, verify: Any) -> Connections:
        """Connections that trust as `verify` says (see `trusted`): these for None, else others, closed with these."""
        return self if verify is None else self.by(replace(self.route, verify=verify))

    def by(self, route: Route) -> Connections:
        """Connections that reach servers by `route`: these where it is their own, else others, closed with these."""
        if route == self.route:
            return self
        with self._lock:
            return self._others.setdefault(route, Connections(route))

    def give_back(self, connection: Connection) -> None:
        """Keeps `connection`, whose last answer was read to its end, for the next read."""
        connection.is_used = True
        connection.idle_since = time.monotonic()
        with self._lock:
            if connection in self._busy and connection.http.sock is not None:
                self._busy.discard(connection)
                self._idle.setdefault(connection.origin, []).append(connection)
                return
        self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """Closes `connection`, whose last answer was not read to its end."""
        with self._lock:
            self._busy.discard(connection)
        connection.hang_up()

    def close(self) -> None:
        """Closes all connections; reads under way fail. `take` makes new ones afterwards."""
        with self._lock:
            ours = self._pid == os.getpid()
            busy, idle = self._busy, [one for many in self._idle.values() for one in many]
            self._busy, self._idle = set(), {}
            others = list(self._others.values())
        for other in others:
            other.close()
        if ours:
            for connection in busy:
                connection.interrupt()
            for connection in idle:
                connection.hang_up()


def trusted(verify: Any = None) -> ssl.SSLContext:
    """A TLS context that trusts the system's authorities, or the bundle that `verify` or the environment names.

    `verify` may be a context (taken as it is), the path of a bundle or of a folder of certificates, or False, to trust
    any server. Raises `AccessError` for a path that holds no certificates.
    """
    if isinstance(verify, ssl.SSLContext):
        return verify
    if verify is False:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    named = verify if isinstance(verify, str) else None
    path = named or next((os.environ[name] for name in _BUNDLES if os.environ.get(name)), None)
    if path is None:
        return ssl.create_default_context()
    try:
        if os.path.isdir(path):
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise AccessError(f"{path}: not a bundle of certificates: {error}", path=path) from error
