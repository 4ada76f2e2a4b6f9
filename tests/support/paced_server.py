"""An HTTP server on loopback that serves a folder by ranges, answers late, and notes when it was asked for what.

    with paced_server(folder, delay_s=0.05) as server:
        load(server.url("model.pt"), state)
    assert server.answers_in_a_row() <= 3

In front of another server (`paced_front`) it does the same with what that one answers. It runs in threads of the test's
process. A connection costs no delay of its own.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BULK_BYTES = 512 << 10
"""An answer that brings more than this, or is one of several that bring parts of a file beyond its ends, is bulk."""
_PIECE = 256 << 10


@dataclass
class Asked:
    """One request, and its answer."""

    method: str
    path: str
    range: str
    begin: float
    """When it had come, in seconds of `time.monotonic`."""
    if_match: str | None = None
    answered: float = 0.0
    """When the head of its answer was sent."""
    end: float = 0.0
    """When all of its answer was sent."""
    status: int = 0
    start: int = 0
    n_bytes: int = 0
    """Of the body."""

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.range or 'whole'}: {self.status}, {self.n_bytes} bytes"


class PacedServer:
    """Answers each request `delay_s` after it has come."""

    def __init__(
        self, folder: Path, delay_s: float, *, suffixes: bool = True, ranges: bool = True, behind: str = ""
    ) -> None:
        self.folder = folder
        self.behind = behind
        """Host and port of the server that answers; empty where it serves `folder`."""
        self.delay_s = delay_s
        self.suffixes = suffixes
        """Whether it knows ranges of the last bytes; where not, it answers them with the whole object."""
        self.ranges = ranges
        self.asked: list[Asked] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/{path}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def forget(self) -> None:
        """Begins to count anew."""
        with self.lock:
            self.asked = []

    @property
    def sent_bytes(self) -> int:
        return sum(one.n_bytes for one in self.asked)

    def of(self, path: str) -> list[Asked]:
        """The requests for one object, in the order in which they came."""
        return sorted((one for one in self.asked if one.path == f"/{path}"), key=lambda one: one.begin)

    def answers_in_a_row(self, *, bulk_bytes: int = BULK_BYTES) -> int:
        """As `answers_in_a_row`."""
        return answers_in_a_row(self.asked, bulk_bytes)

    def told(self) -> str:
        """All requests, in order, for a message."""
        first = min((one.begin for one in self.asked), default=0.0)
        lines = sorted(self.asked, key=lambda one: one.begin)
        return "\n".join(f"{one.begin - first:7.3f}-{one.end - first:.3f} {one}" for one in lines)


def answers_in_a_row(every: Sequence[Asked], bulk_bytes: int = BULK_BYTES) -> int:
    """How many answers had to be waited for, one after another, before the first bulk bytes were asked for.

    That is the longest row of requests before the first one for more than `bulk_bytes`, of which each came after
    the answer to the one before.
    """
    bulk = min((one.begin for one in every if one.n_bytes > bulk_bytes), default=float("inf"))
    before = sorted((one for one in every if one.end <= bulk), key=lambda one: one.end)
    ends: list[float] = []
    longest: list[int] = []
    for one in before:
        at = bisect_right(ends, one.begin)
        row = 1 + (longest[at - 1] if at else 0)
        ends.append(one.end)
        longest.append(max(row, longest[-1] if longest else 0))
    return longest[-1] if longest else 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the play."""


class _Handler(BaseHTTPRequestHandler):
    owner: PacedServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        asked = Asked(
            self.command,
            self.path.partition("?")[0],
            self.headers.get("Range", ""),
            time.monotonic(),
            self.headers.get("If-Match"),
        )
        with self.owner.lock:
            self.owner.asked.append(asked)
        time.sleep(self.owner.delay_s)
        if self.owner.behind:
            try:
                with contextlib.suppress(OSError):
                    self._forward(asked, with_body=with_body)
            finally:
                asked.end = time.monotonic()
            return
        path = self.owner.folder / asked.path.lstrip("/")
        try:
            if not path.is_file():
                self._head(asked, 404, {"Content-Length": "0"})
                return
            with contextlib.suppress(OSError):
                self._serve(asked, path, with_body=with_body)
        finally:
            asked.end = time.monotonic()

    def _serve(self, asked: Asked, path: Path, *, with_body: bool) -> None:
        known = path.stat()
        size, status, headers = known.st_size, 200, {"ETag": f'"{known.st_mtime_ns:x}-{known.st_size:x}"'}
        if asked.if_match not in (None, headers["ETag"]):
            self._head(asked, 412, {"Content-Length": "0"})
            return
        start, stop = 0, size
        found = self._range(asked.range, size) if self.owner.ranges and with_body else None
        if found is not None:
            status, (start, stop) = 206, found
            if start >= stop:
                self._head(asked, 416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._head(asked, status, {**headers, "Content-Length": str(stop - start)})
        if not with_body:
            return
        asked.start = start
        with path.open("rb") as file:
            file.seek(start)
            while start < stop:
                data = file.read(min(_PIECE, stop - start))
                self.wfile.write(data)
                start += len(data)
                asked.n_bytes += len(data)

    def _forward(self, asked: Asked, *, with_body: bool) -> None:
        """What the server behind answers; the request stays as it is, since its signature covers it."""
        connection = http.client.HTTPConnection(self.owner.behind)
        try:
            connection.putrequest(asked.method, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "connection":
                    connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            data = answer.read() if with_body else b""
            kept = {
                name: value
                for name, value in answer.getheaders()
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date")
            }
            length = answer.headers.get("Content-Length", "0") if not with_body else str(len(data))
            self._head(asked, answer.status, {**kept, "Content-Length": length})
            asked.start = int((answer.headers.get("Content-Range") or "bytes 0-").split()[1].split("-")[0])
            for at in range(0, len(data), _PIECE):
                self.wfile.write(data[at : at + _PIECE])
            asked.n_bytes = len(data)
        finally:
            connection.close()

    def _range(self, text: str, size: int) -> tuple[int, int] | None:
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", text)
        if match is None or match[1] == match[2] == "":
            return None
        if not match[1]:
            return (max(0, size - int(match[2])), size) if self.owner.suffixes else None
        return int(match[1]), min(size, int(match[2]) + 1 if match[2] else size)

    def _head(self, asked: Asked, status: int, headers: Mapping[str, str]) -> None:
        asked.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        asked.answered = time.monotonic()


@contextlib.contextmanager
def paced_server(
    folder: Path, delay_s: float = 0.0, *, suffixes: bool = True, ranges: bool = True
) -> Iterator[PacedServer]:
    server = PacedServer(folder, delay_s, suffixes=suffixes, ranges=ranges)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def paced_front(endpoint: str, delay_s: float = 0.0) -> Iterator[PacedServer]:
    """One that answers what the server at `endpoint`, an http URL, answers; objects are named from its root on."""
    server = PacedServer(Path(), delay_s, behind=endpoint.partition("://")[2].rstrip("/"))
    try:
        yield server
    finally:
        server.close()
