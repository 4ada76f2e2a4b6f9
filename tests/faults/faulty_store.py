"""An HTTP store that turns faulty once it is told to, for the clients and the objects that it is told.

    with faulty_store("127.0.0.1", {"/a.pt": b"..."}) as store:
        store.plan(StoreFault("stalls"))
        ... GET /.arm ...                  # the rank that is at the stage says so
        assert store.fired_at is not None

It answers ranges and If-Match as object stores do, and counts what it did wrong.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ARM = "/.arm"
CHUNK_BYTES = 64 << 10


@dataclass(frozen=True)
class StoreFault:
    """What the store does wrong from the moment on when it is armed."""

    kind: str
    """``refuses``, ``stalls``, ``resets``, ``cuts`` bodies short, ``overstates`` lengths, ``flips`` a bit of each body,
    ``changes`` the object, ``loses`` it, ``shrinks`` it, or a status: ``503``."""
    clients: frozenset[str] = frozenset()
    """Addresses that see it; all, where there are none."""
    objects: frozenset[str] = frozenset()
    """Paths that have it; all, where there are none."""
    lasts_s: float | None = None
    """For how long; for ever, where that is None."""
    times: int | None = None
    """How many answers have it at most."""
    at_once: bool = False
    """Whether it is armed from the beginning."""


class FaultyStore:
    def __init__(self, address: str, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.address = address
        self.fault: StoreFault | None = None
        self.armed_at: float | None = None
        self.fired = 0
        self.fired_at: float | None = None
        """By `time.monotonic`, as all times here: when the first answer was wrong."""
        self.requests: list[str] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._connections: set[socket.socket] = set()
        self._server: _Server | None = None
        self.port = 0
        self._open()

    def url(self, path: str) -> str:
        return f"http://{self.address}:{self.port}{path}"

    def plan(self, fault: StoreFault | None) -> None:
        """Is well again, and will have `fault`."""
        self._over.set()
        self._over = threading.Event()
        with self._lock:
            self.fault, self.armed_at, self.fired, self.fired_at = fault, None, 0, None
            self.requests.clear()
        if self._server is None:
            self._open()
        if fault is not None and fault.at_once:
            self.arm()

    def arm(self, asking: socket.socket | None = None) -> None:
        """Has the fault from now on, for all but the connection `asking`."""
        fault = self.fault
        if fault is None or self.armed_at is not None:
            return
        self.armed_at = time.monotonic()
        if fault.kind == "refuses":
            # Each refusal is the kernel's, so that closing the port counts as the fault.
            self._shut(all_but=asking)
            with self._lock:
                self._fire(time.monotonic())
            if fault.lasts_s is not None:
                threading.Thread(
                    target=self._open_after, args=(fault.lasts_s, self._over), daemon=True
                ).start()

    def close(self) -> None:
        self._over.set()
        if self._server is not None:
            self._shut()

    def wrong(self, client: str, path: str) -> StoreFault | None:
        """The fault that this answer has; it counts as fired."""
        fault, now = self.fault, time.monotonic()
        if fault is None or self.armed_at is None or fault.kind == "refuses":
            return None
        if (fault.clients and client not in fault.clients) or (fault.objects and path not in fault.objects):
            return None
        with self._lock:
            if fault.lasts_s is not None and now > self.armed_at + fault.lasts_s:
                return None
            if fault.times is not None and self.fired >= fault.times:
                return None
            self._fire(now)
        return fault

    def note(self, line: str) -> None:
        with self._lock:
            self.requests.append(line)

    def wait(self) -> None:
        """Until this case is over."""
        self._over.wait()

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _fire(self, now: float) -> None:
        self.fired += 1
        self.fired_at = self.fired_at or now

    def _open(self) -> None:
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = _Server((self.address, self.port), handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _shut(self, all_but: socket.socket | None = None) -> None:
        server, self._server = self._server, None
        assert server is not None
        server.shutdown()
        server.server_close()
        with self._lock:
            connections = [one for one in self._connections if one is not all_but]
        for connection in connections:
            reset(connection)

    def _open_after(self, seconds: float, over: threading.Event) -> None:
        if not over.wait(seconds):
            self._open()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that end are part of the play."""


class _Handler(BaseHTTPRequestHandler):
    store: FaultyStore
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.store.opened(self.connection)

    def finish(self) -> None:
        self.store.closed(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        if self.path == ARM:
            self.store.arm(self.connection)
            return self._head(204, {})
        return self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path, asked = self.path.partition("?")[0], self.headers.get("Range", "")
        self.store.note(f"{self.client_address[0]} {self.command} {path} {asked}".strip())
        body = self.store.objects.get(path)
        fault = self.store.wrong(self.client_address[0], path) if body is not None else None
        kind, etag = "" if fault is None else fault.kind, '"v1"'
        if kind == "stalls":
            self.close_connection = True
            return self.store.wait()
        if kind == "resets":
            self.close_connection = True
            return reset(self.connection)
        if kind.isdigit():
            return self._head(int(kind), {"Content-Length": "0"})
        if body is None or kind == "loses":
            return self._head(404, {"Content-Length": "0"})
        if kind == "changes":
            body, etag = body[:-1] + bytes([body[-1] ^ 1]), '"v2"'
        if kind == "shrinks":
            body = body[: len(body) // 2]
        wanted = self.headers.get("If-Match")
        if wanted is not None and wanted != etag:
            return self._head(412, {"Content-Length": "0"})
        return self._serve(body, etag, asked, kind, with_body)

    def _serve(self, body: bytes, etag: str, asked: str, kind: str, with_body: bool) -> None:
        status, start, stop = 200, 0, len(body)
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if match:
            status, start, stop = 206, int(match[1]), min(int(match[2]) + 1, stop)
            if start >= len(body):
                return self._head(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})
            total = len(body) + (1000 if kind == "overstates" else 0)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
        length = stop - start
        self._head(status, {**headers, "Content-Length": str(length + (10 if kind == "overstates" else 0))})
        if not with_body:
            return None
        part = body[start:stop]
        if kind == "flips":
            middle = length // 2
            part = part[:middle] + bytes([part[middle] ^ 0x10]) + part[middle + 1 :]
        if kind == "cuts":
            part = part[: length // 2]
        with contextlib.suppress(OSError):
            for at in range(0, len(part), CHUNK_BYTES):
                self.wfile.write(part[at : at + CHUNK_BYTES])
        if kind in ("cuts", "overstates"):
            self.close_connection = True
        return None

    def _head(self, status: int, headers: dict[str, str]) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()


def reset(connection: socket.socket) -> None:
    """Ends a connection as a process does that crashes."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Threads that read from it have their own descriptor of it, so that closing it alone does nothing.
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()


@contextlib.contextmanager
def faulty_store(address: str, objects: dict[str, bytes]) -> Iterator[FaultyStore]:
    store = FaultyStore(address, objects)
    try:
        yield store
    finally:
        store.close()
