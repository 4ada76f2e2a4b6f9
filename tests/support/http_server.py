"""An HTTP server on loopback that counts what it is asked for and what it sends, and can misbehave.

    with counting_server({"/a.pt": Served(b"...")}) as server:
        fetch(server.url("/a.pt"))
        assert server.gets("/a.pt") == 1

It runs in threads of the test's process; ports are the system's choice.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROCESS_HEADER = "X-Process"


@dataclass
class Served:
    """One path's answer."""

    body: bytes = b""
    etag: str | None = '"v1"'
    status: int = 200
    head_status: int | None = None
    """Answer to HEAD, where it differs."""
    redirect: str | None = None
    chunk: int = 64 << 10
    pause_s: float = 0.0
    """Slept after each chunk."""
    truncate_to: int | None = None
    """Send so many bytes only, then hang up."""
    stall_after: int | None = None
    """Send so many bytes, then nothing, until the server ends."""
    failures: int = 0
    """Answer 503 so many times first."""
    retry_after: str | None = None
    """Told with each 503."""
    send_length: bool = True
    """Where false, the end of the connection is the end of the body."""
    chunked: bool = False
    content_type: str | None = None
    needs_query: str | None = None
    """403 for a request with any other query, to the letter."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    client_port: int
    process: str
    headers: dict[str, str] = field(default_factory=dict)
    target: str = ""
    """Path and query, as they came."""


class CountingServer:
    def __init__(self, served: dict[str, Served]) -> None:
        self.served = served
        self.missing = Served(status=404)
        """The answer to a path that is not served."""
        self.missing_pause_s = 0.0
        """Before that answer."""
        self.in_flight = 0
        self.most_in_flight = 0
        self.requests: list[Request] = []
        self.bytes_sent: dict[str, int] = {}
        self.ending = threading.Event()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._http.server_port}{path}"

    def gets(self, path: str) -> int:
        return sum(each.method == "GET" and each.path == path for each in self.requests)

    def processes(self, path: str) -> set[str]:
        """Who asked for `path`, by the process header, or by port where there is none."""
        return {each.process or str(each.client_port) for each in self.requests if each.path == path}

    def close(self) -> None:
        self.ending.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        yield
        with self._lock:
            self.in_flight -= 1

    def sent(self, path: str, n_bytes: int) -> None:
        with self._lock:
            self.bytes_sent[path] = self.bytes_sent.get(path, 0) + n_bytes


class _Handler(BaseHTTPRequestHandler):
    owner: CountingServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        with self.owner.answering():
            self._answer(with_body=False)

    def do_GET(self) -> None:
        with self.owner.answering():
            self._answer(with_body=True)

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.owner.note(
            Request(
                self.command,
                path,
                self.client_address[1],
                self.headers.get(PROCESS_HEADER, ""),
                dict(self.headers.items()),
                self.path,
            )
        )
        served = self.owner.served.get(path)
        if served is None:
            time.sleep(self.owner.missing_pause_s)
            served = self.owner.missing
        if served.needs_query is not None and served.needs_query != self.path.partition("?")[2]:
            return self._empty(403)
        if not with_body and served.head_status is not None:
            return self._empty(served.head_status)
        if with_body and served.failures > 0:
            served.failures -= 1
            told = {} if served.retry_after is None else {"Retry-After": served.retry_after}
            return self._empty(503, **told)
        if served.redirect is not None:
            return self._empty(302, Location=served.redirect)
        if served.status != 200:
            return self._empty(served.status)
        self.send_response(200)
        if served.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif served.send_length:
            self.send_header("Content-Length", str(len(served.body)))
        else:
            self.send_header("Connection", "close")
        if served.etag is not None:
            self.send_header("ETag", served.etag)
        if served.content_type is not None:
            self.send_header("Content-Type", served.content_type)
        self.end_headers()
        if with_body:
            with contextlib.suppress(OSError):
                self._send(path, served)
        return None

    def _send(self, path: str, served: Served) -> None:
        end = len(served.body) if served.truncate_to is None else served.truncate_to
        for start in range(0, end, served.chunk):
            if served.stall_after is not None and start >= served.stall_after:
                if served.chunked:
                    # In the middle of a chunk.
                    self.wfile.write(b"%x\r\n%b" % (served.chunk, served.body[start : start + 10]))
                self.owner.ending.wait()
                break
            data = served.body[start : min(start + served.chunk, end)]
            # Counted first: whoever has the bytes may read the count at once.
            self.owner.sent(path, len(data))
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if served.chunked else data)
            if served.pause_s:
                time.sleep(served.pause_s)
        if served.truncate_to is not None or not served.send_length:
            self.close_connection = True
        elif served.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _empty(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def counting_server(served: dict[str, Served] | None = None) -> Iterator[CountingServer]:
    server = CountingServer(served if served is not None else {})
    try:
        yield server
    finally:
        server.close()
