"""An HTTP server on loopback that answers ranges, and lies, stalls, hangs up or refuses where it is told to.

    with bad_server({"/a": Behaviour(b"...", faults=[Fault(status=500)])}) as server:
        read(server.url("/a"))

Each fault is spent on one GET that asks for more than one byte (the first byte is how a source is opened).
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fault:
    """What one answer does wrong."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    """Put in the place of the right ones."""
    body: bytes = b""
    """Of an answer with a `status` of its own."""
    send_only: int | None = None
    """So many bytes of the body, then the end: a reset, a close, or a stall until the server ends."""
    ending: str = "reset"
    whole: bool = False
    """The whole object with status 200."""
    new_etag: str | None = None
    """The object's own from now on."""


@dataclass
class Behaviour:
    """One path's object."""

    body: bytes = b""
    etag: str | None = '"v1"'
    modified: str | None = None
    has_ranges: bool = True
    redirect: str | None = None
    redirect_status: int = 302
    chunked: bool = False
    closes: bool = False
    """Ends the connection after each answer."""
    needs: Callable[[dict[str, str], str], bool] | None = None
    """Whether headers and query let one in; 403 otherwise."""
    checks_if_match: bool = True
    faults: list[Fault] = field(default_factory=list)
    fault_of: Callable[[int, int], Fault | None] | None = None
    """The fault of a GET of bytes ``[start, stop)``, in place of the next of `faults`; it may wait first."""
    headers: dict[str, str] = field(default_factory=dict)
    """Told with every answer, to HEAD too."""
    head_status: int = 200
    """What HEAD is answered with."""
    flips: dict[int, int] = field(default_factory=dict)
    """Positions of bytes that are sent damaged, and how many times more."""


@dataclass(frozen=True)
class Asked:
    path: str
    query: str
    range: str
    headers: dict[str, str]
    client_port: int


class BadServer:
    def __init__(self, objects: dict[str, Behaviour], context: ssl.SSLContext | None = None) -> None:
        self.objects = objects
        self.asked: list[Asked] = []
        self.sent_bytes = 0
        self.sent: dict[str, int] = {}
        """Bytes of bodies, by path."""
        self.pause_s = 0.0
        """Slept after each 64 KiB."""
        self.ending = threading.Event()
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _Quiet(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.scheme = "http"
        if context is not None:
            self.scheme = "https"
            self._http.socket = context.wrap_socket(
                self._http.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self._http.server_port
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def url(self, path: str) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}{path}"

    def close(self) -> None:
        self.ending.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the play."""


class _Handler(BaseHTTPRequestHandler):
    owner: BadServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        served = self.owner.objects.get(self.path.partition("?")[0])
        if served is None:
            return self._head(404, {"Content-Length": "0"})
        headers = served.headers if served.head_status == 200 else {}
        return self._head(served.head_status, {"Content-Length": str(len(served.body)), **headers})

    def do_GET(self) -> None:
        # As a proxy is asked, or as a server.
        path, _, query = re.sub(r"^http://[^/]*", "", self.path).partition("?")
        headers = dict(self.headers.items())
        asked = self.headers.get("Range", "")
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        with self.owner.lock:
            self.owner.asked.append(Asked(path, query, asked, headers, self.client_address[1]))
            served = self.owner.objects.get(path)
            fault = Fault()
            if served is not None and served.faults and asked != "bytes=0-0":
                fault = served.faults.pop(0)
                served.etag = fault.new_etag or served.etag
        if served is not None and served.fault_of is not None and match is not None:
            fault = served.fault_of(int(match[1]), int(match[2]) + 1) or fault
            served.etag = fault.new_etag or served.etag
        if served is None:
            return self._head(404, {"Content-Length": "0"})
        if fault.status is not None:
            self._head(fault.status, {"Content-Length": str(len(fault.body)), **fault.headers})
            self.wfile.write(fault.body)
            return None
        if served.redirect is not None:
            return self._head(served.redirect_status, {"Location": served.redirect, "Content-Length": "0"})
        if served.needs is not None and not served.needs(headers, query):
            return self._head(403, {"Content-Length": "0"})
        wanted = self.headers.get("If-Match")
        if served.checks_if_match and wanted is not None and wanted != served.etag:
            return self._head(412, {"Content-Length": "0"})
        return self._serve(path, served, fault, match)

    def _serve(self, path: str, served: Behaviour, fault: Fault, match: re.Match[str] | None) -> None:
        status, start, stop = 200, 0, len(served.body)
        headers = {"ETag": served.etag, "Last-Modified": served.modified, **served.headers}
        if match is not None and served.has_ranges and not fault.whole:
            status, start, stop = 206, int(match[1]), min(int(match[2]) + 1, stop)
            if start >= len(served.body):
                headers |= {"Content-Range": f"bytes */{len(served.body)}", "Content-Length": "0"}
                return self._head(416, headers)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(served.body)}"
        if served.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(stop - start)
        if served.closes:
            headers["Connection"] = "close"
        self._head(status, {**headers, **fault.headers})
        end = stop if fault.send_only is None else start + fault.send_only
        with contextlib.suppress(OSError):
            # The answer to a question is not read to its end where there are no ranges.
            body = served.body[start:end] if asked_one_byte(match) else self._flipped(served, start, end)
            self._send(path, body, served.chunked and fault.send_only is None)
        if fault.send_only is not None:
            self._end(fault.ending)
        return None

    def _flipped(self, served: Behaviour, start: int, end: int) -> bytes:
        body = bytearray(served.body[start:end])
        with self.owner.lock:
            for position in served.flips:
                if start <= position < end and served.flips[position]:
                    served.flips[position] -= 1
                    body[position - start] ^= 0x40
        return bytes(body)

    def _send(self, path: str, body: bytes, chunked: bool) -> None:
        for start in range(0, len(body), 64 << 10):
            part = body[start : start + (64 << 10)]
            # Counted first: whoever has the bytes may read the count at once.
            with self.owner.lock:
                self.owner.sent_bytes += len(part)
                self.owner.sent[path] = self.owner.sent.get(path, 0) + len(part)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
            if self.owner.pause_s:
                self.owner.ending.wait(self.owner.pause_s)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _end(self, ending: str) -> None:
        self.close_connection = True
        if ending == "stall":
            self.owner.ending.wait()
        elif ending == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            # What was sent must be read before it is reset, or it is lost.
            self.owner.ending.wait(0.05)

    def _head(self, status: int, headers: dict[str, str | None]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()


def asked_one_byte(match: re.Match[str] | None) -> bool:
    return match is not None and (match[1], match[2]) == ("0", "0")


@contextlib.contextmanager
def bad_server(objects: dict[str, Behaviour], context: ssl.SSLContext | None = None) -> Iterator[BadServer]:
    """With a `context`, over TLS."""
    server = BadServer(objects, context)
    try:
        yield server
    finally:
        server.close()
