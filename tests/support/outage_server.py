"""A `bad_server` that is down for a while from the first request of a kind on: 503 to everything, or resets.

    with outage_server({"/a": Behaviour(b"...")}, {"latest": Outage("HEAD", "/latest", 1.0)}) as server:
        urlopen(server.url("/.begin?latest"))     # of the next request that fits
        ... load ...
        assert server.refused["latest"]

It keeps when it refused, so that a test can tell the truth from what it is told.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from urllib.parse import unquote

from bad_server import BadServer, Behaviour, _Handler

BEGIN = "/.begin?"


@dataclass(frozen=True)
class Outage:
    """When the server goes down, how, and for how long."""

    method: str
    path: str
    """The end of the path of the request that it begins with."""
    seconds: float
    kind: str = "503"
    """``503``, or ``reset``: of every connection, and of a body in its middle."""
    range: str = ""
    """What the request's ``Range`` has to match; "" for any."""
    nth: int = 1
    """It begins with so many requests that fit."""


class OutageServer(BadServer):
    """Its outages by name; one at a time is armed."""

    def __init__(self, objects: dict[str, Behaviour], outages: Mapping[str, Outage]) -> None:
        super().__init__(objects)
        self.outages = outages
        self.armed = ""
        self.refused: dict[str, list[float]] = {}
        """By outage, when a request was refused, by `time.monotonic`."""
        self._seen = 0
        self._until: float | None = None
        self._arming = threading.Lock()
        assert isinstance(self._http, ThreadingHTTPServer)
        self._http.RequestHandlerClass = type("Handler", (_Failing,), {"owner": self})

    def arm(self, name: str) -> None:
        with self._arming:
            self.armed, self._seen, self._until = name, 0, None

    def refuses(self, method: str, path: str, asked: str) -> Outage | None:
        """The outage that meets this request."""
        with self._arming:
            outage, now = self.outages.get(self.armed), time.monotonic()
            if outage is None:
                return None
            if self._until is None:
                fits = method == outage.method and path.endswith(outage.path)
                self._seen += fits and bool(re.search(outage.range, asked))
                if self._seen < outage.nth:
                    return None
                self._until = now + outage.seconds
            if now >= self._until:
                return None
            self.refused.setdefault(self.armed, []).append(now)
            return outage


class _Failing(_Handler):
    owner: OutageServer

    def do_HEAD(self) -> None:  # noqa: N802
        if not self._fails():
            super().do_HEAD()

    def do_GET(self) -> None:  # noqa: N802
        if self.path.startswith(BEGIN):
            self.owner.arm(unquote(self.path.removeprefix(BEGIN)))
            self._head(200, {"Content-Length": "0"})
        elif not self._fails():
            super().do_GET()

    def _fails(self) -> bool:
        path, asked = self.path.partition("?")[0], self.headers.get("Range", "")
        outage = self.owner.refuses(self.command, path, asked)
        if outage is None:
            return False
        if outage.kind == "503":
            self._head(503, {"Content-Length": "0"})
            return True
        self.close_connection = True
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        served = self.owner.objects.get(path)
        if match is not None and served is not None and len(self.owner.refused[self.owner.armed]) == 1:
            # The first one breaks off in the middle of its body.
            start, stop = int(match[1]), min(int(match[2]) + 1, len(served.body))
            size = len(served.body)
            told = {"Content-Range": f"bytes {start}-{stop - 1}/{size}", "Content-Length": str(stop - start)}
            self._head(206, {**told, "ETag": served.etag})
            with contextlib.suppress(OSError):
                self.wfile.write(served.body[start : start + (stop - start) // 2])
            self.owner.ending.wait(0.05)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return True


@contextlib.contextmanager
def outage_server(objects: dict[str, Behaviour], outages: Mapping[str, Outage]) -> Iterator[OutageServer]:
    server = OutageServer(objects, outages)
    try:
        yield server
    finally:
        server.close()
