"""Serves one folder over HTTP on loopback, with byte ranges, and counts requests and bytes by file.

``python -m rankload.launch.demo_server FOLDER`` prints its port on the first line, serves until its standard
input ends, then prints the counts as one line of JSON: ``{name: {"gets": .., "heads": .., "bytes": ..}}``.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

CHUNK_BYTES = 1 << 20


@dataclass
class Counts:
    """Requests for one name, by method, and the bytes of it that were sent."""

    gets: int = 0
    heads: int = 0
    bytes: int = 0


@dataclass
class Ledger:
    """Counts by name, for many threads."""

    counts: dict[str, Counts] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, *, gets: int = 0, heads: int = 0, sent: int = 0) -> None:
        with self.lock:
            entry = self.counts.setdefault(name, Counts())
            entry.gets += gets
            entry.heads += heads
            entry.bytes += sent

    def as_dict(self) -> dict[str, dict[str, int]]:
        with self.lock:
            return {name: asdict(entry) for name, entry in sorted(self.counts.items())}


class CountingServer(ThreadingHTTPServer):
    """An HTTP server on a free port of the loopback interface, for the files directly in one folder."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.ledger = Ledger()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CountingServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Nothing: the counts are the log."""

    def _answer(self, *, with_body: bool) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.ledger.add(name, gets=int(with_body), heads=int(not with_body))
        path = self.server.folder / name
        if not name or "/" in name or not path.is_file():
            self.send_response(HTTPStatus.NOT_FOUND)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        facts = path.stat()
        size = facts.st_size
        wanted = byte_range(self.headers.get("Range"), size)
        if wanted is None:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, stop = wanted
        partial = self.headers.get("Range") is not None
        self.send_response(HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("ETag", f'"{facts.st_mtime_ns:x}-{size:x}"')
        self.end_headers()
        if with_body:
            self._send(name, path, start, stop)

    def _send(self, name: str, path: Path, start: int, stop: int) -> None:
        with path.open("rb") as file:
            file.seek(start)
            while start < stop:
                chunk = file.read(min(CHUNK_BYTES, stop - start))
                if not chunk:
                    break
                # Counted first, so that whoever has the bytes finds them in the ledger; taken back if they did not go.
                self.server.ledger.add(name, sent=len(chunk))
                try:
                    self.wfile.write(chunk)
                except OSError:
                    self.server.ledger.add(name, sent=-len(chunk))
                    raise
                start += len(chunk)


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Start and stop of the range in a ``Range`` header (RFC 9110, one range of bytes); of the whole file without a
    header; None where the file of `size` bytes has no such range."""
    if header is None:
        return 0, size
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    start, stop = int(first), min(int(last) + 1, size) if last else size
    return (start, stop) if start < stop else None


def main(folder: str) -> None:
    """Serves `folder` until standard input ends, so that it never outlives the process that started it."""
    server = CountingServer(Path(folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.port, flush=True)
    sys.stdin.read()
    server.shutdown()
    print(json.dumps(server.ledger.as_dict()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
