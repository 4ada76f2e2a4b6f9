"""An HTTP server that answers by a script of bytes: each answer right, or wrong in the way that the next bytes say.

    with scripted({"/a": b"..."}) as server:
        server.begin(script)       # four bytes for each answer: what is wrong with it, and by how much
        read(server.url("/a"))

After the script's end all answers are right. An answer that may leave a client waiting for more is followed by the end
of the connection, so that no time is lost.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

STATUSES = (
    200, 201, 202, 204, 205, 206, 207, 300, 301, 302, 303, 304, 307, 308, 400, 401, 403, 404, 407, 408, 409,
    410, 412, 416, 418, 429, 451, 500, 501, 502, 503, 504, 505, 511, 599, 999, 0, 100, 101, 103,
)  # fmt: skip
HEADERS = (
    "Content-Length", "Content-Range", "ETag", "Last-Modified", "Transfer-Encoding", "Content-Encoding",
    "Connection", "Location", "Accept-Ranges", "Retry-After", "Content-Type", "X-Linked-Size", "X-Linked-ETag",
    "x-amz-checksum-crc32", "x-amz-checksum-sha256", "x-goog-hash", "Content-MD5", "Repr-Digest", "Digest",
    "Content-Disposition", "Set-Cookie", "Date",
)  # fmt: skip
VALUES = (
    "", "0", "1", "-1", "+1", "1e3", "0x10", " 12 ", "12, 12", "99999999999999999999", "9" * 5000,
    "bytes 0-0/1", "bytes 0-/5", "bytes */9", "bytes 5-2/9", "bytes 0-3/*", "bytes 0-" + "9" * 4500 + "/*",
    "bytes " + "0" * 4500 + "-1/2", "bytes 18446744073709551615-18446744073709551616/2", "octets 0-1/2",
    "chunked", "gzip", "identity", "gzip, chunked", "chunked, chunked", "close", "keep-alive", '"v2"',
    'W/"v1"', '"' + "x" * 3000, "\xe9\xff", "text/html", "multipart/byteranges",
    "multipart/byteranges; boundary=x", "AAAAAA==", "crc32c=AAAAAA==,md5=" + "A" * 24, "sha-256=:AAAA:",
    "-1-2", "AAAAAA==-99999", "Thu, 01 Jan 1970 00:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 GMT",
    "Mon, 32 Foo 20000 99:99:99", "none", "bytes", "\t", "a\tb", "max-age=1; x=\"y\"",
)  # fmt: skip
LOCATIONS = (
    "/a", "", "?", "#", "//", "///", "/loop", "http://", "http://[::1", "http://[", "https://127.0.0.1:1/",
    "file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:x", "http://127.0.0.1:99999/x",
    "http://127.0.0.1:0/", "http:///x", "http://user:pw@127.0.0.1:{port}/a",
    "http://127.0.0.1:{port}/a?sig=planted", "//127.0.0.1:{port}/a", "/a" * 3000, "/\xe9\xff", "/%zz%00",
    "http://\x7f/", "http://xn--/a", "http://" + "a" * 300 + "/", "/a b", "\\\\x\\y",
    "http://127.0.0.1:{port}:5/a", "http://%31/",
)  # fmt: skip
CHUNK_SIZES = (
    "",
    "-1",
    "+5",
    "0x5",
    "5;x=y",
    "ffffffffffffffff",
    "f" * 5000,
    " 5",
    "5 ",
    "g",
    "0",
    "00000005",
    "\xe9",
)
_NO_HEADS = (
    b"HTTP/1.1\r\n\r\n",
    b"HTTP/9.9 200 OK\r\n\r\n",
    b"ICY 200\r\n\r\n",
    b"\0" * 300,
    b"HTTP/1.1 2OO OK\r\n\r\n",
    b"HTTP/1.1 " + b"2" * 70_000,
    b"<html>",
    b"\x16\x03\x01\x02\0",
    b"HTTP/1.1 -200 OK\r\n\r\n",
)
KINDS = 27


@dataclass
class _Answer:
    status: str
    headers: list[tuple[str, str]]
    body: bytes
    raw: bytes | None = None
    """In the place of everything else."""
    before: bytes = b""
    send: int | None = None
    """So many bytes of all of it."""
    closes: bool = False

    def encode(self) -> bytes:
        if self.raw is not None:
            return self.raw
        head = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        data = self.before + f"HTTP/1.1 {self.status}\r\n{head}\r\n".encode("latin-1", "replace") + self.body
        return data if self.send is None else data[: self.send]

    def put(self, name: str, value: str) -> None:
        self.headers = [(key, was) for key, was in self.headers if key != name] + [(name, value)]


@dataclass
class ScriptedServer:
    """Serves `objects` by their paths."""

    objects: Mapping[str, bytes]
    script: bytes = b""
    answers: int = 0
    """How many were given since the script began."""
    port: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ending: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def begin(self, script: bytes) -> None:
        with self._lock:
            self.script, self.answers = script, 0

    def serve(self, listener: socket.socket) -> None:
        while not self._ending.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connection, args=(connection,), daemon=True).start()

    def end(self) -> None:
        self._ending.set()

    def _connection(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            held = b""
            while not self._ending.is_set():
                while b"\r\n\r\n" not in held:
                    more = connection.recv(1 << 16)
                    if not more or len(held) > 1 << 20:
                        return
                    held += more
                head, _, held = held.partition(b"\r\n\r\n")
                answer = self._answer(head.decode("latin-1"))
                connection.sendall(answer.encode())
                if answer.closes:
                    return

    def _answer(self, head: str) -> _Answer:
        first, *lines = head.split("\r\n")
        method, target = first.split(" ")[:2]
        asked = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        path = target.partition("?")[0]
        answer = self._right(path, asked.get("range", ""))
        with self._lock:
            code, self.script = self.script[:4], self.script[4:]
            self.answers += 1
        if code:
            self._spoil(answer, *code.ljust(4, b"\0"))
        if method == "HEAD":
            answer.body = b""
        return answer

    def _right(self, path: str, asked: str) -> _Answer:
        body = self.objects.get(path)
        if body is None:
            return _Answer("404 Not Found", [("Content-Length", "0")], b"")
        headers = [
            ("ETag", f'"{len(body)}"'),
            ("Accept-Ranges", "bytes"),
            ("Content-Type", "application/octet-stream"),
        ]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        if match is None:
            return _Answer("200 OK", [*headers, ("Content-Length", str(len(body)))], body)
        start, stop = int(match[1]), min(int(match[2] or len(body)) + 1, len(body))
        if start >= len(body):
            return _Answer(
                "416 No", [("Content-Range", f"bytes */{len(body)}"), ("Content-Length", "0")], b""
            )
        place = f"bytes {start}-{stop - 1}/{len(body)}"
        part = body[start:stop]
        return _Answer(
            "206 Partial Content",
            [*headers, ("Content-Range", place), ("Content-Length", str(len(part)))],
            part,
        )

    def _spoil(self, answer: _Answer, kind: int, a: int, b: int, c: int) -> None:
        far = (b << 8 | c) % (len(answer.body) + 1)
        header, value = HEADERS[a % len(HEADERS)], VALUES[(b << 8 | c) % len(VALUES)]
        kind %= KINDS
        answer.closes = kind not in (0, 6, 10, 17, 18, 19, 22)
        if kind == 1:
            answer.status = f"{STATUSES[a % len(STATUSES)]} Said"
            if b & 1:
                answer.body = b"<Error><Code>SlowDown</Code></Error>" * c
                answer.put("Content-Length", str(len(answer.body)))
        elif kind == 2:
            del answer.headers[a % len(answer.headers)]
        elif kind == 3:
            answer.put(header, value)
        elif kind == 4:
            answer.headers.append((header, value))
        elif kind == 5:
            answer.body = answer.body[:far]
        elif kind == 6 and answer.body:
            at = (a << 16 | b << 8 | c) % len(answer.body)
            answer.body = answer.body[:at] + bytes([answer.body[at] ^ (1 << (a % 8))]) + answer.body[at + 1 :]
        elif kind in (7, 8):
            sizes = [f"{len(answer.body[:far]):x}", f"{len(answer.body[far:]):x}"]
            if kind == 8:
                sizes[a % 2] = CHUNK_SIZES[c % len(CHUNK_SIZES)]
            parts = zip(sizes, (answer.body[:far], answer.body[far:]), strict=True)
            chunked = b"".join(
                size.encode("latin-1") + b"\r\n" + part + b"\r\n" for size, part in parts if part
            )
            answer.body = chunked + (b"0\r\n\r\n" if a & 2 else b"0\r\nX: y\r\n\r\n" if a & 4 else b"")
            answer.headers = [one for one in answer.headers if one[0] != "Content-Length"]
            answer.put("Transfer-Encoding", "chunked")
        elif kind == 9:
            answer.body += bytes(c + 1)
        elif kind == 10:
            answer.status = f"{(301, 302, 303, 307, 308)[a % 5]} Moved"
            answer.body = b""
            answer.put("Location", LOCATIONS[c % len(LOCATIONS)].replace("{port}", str(self.port)))
            answer.put("Content-Length", "0")
        elif kind == 11:
            size = len(answer.body)
            answer.put("Content-Range", f"bytes {b}-{b + max(0, size - 1 + c % 3 - 1)}/{size + a}")
            answer.status = "206 Partial Content"
        elif kind == 12:
            answer.status = "200 OK"
            answer.headers = [one for one in answer.headers if one[0] != "Content-Range"]
        elif kind == 13:
            answer.raw = b""
        elif kind == 14:
            answer.send = (b << 8 | c) % 400
        elif kind == 15:
            answer.raw = _NO_HEADS[a % len(_NO_HEADS)]
        elif kind == 16:
            answer.body += answer.encode()
            answer.closes = bool(a & 1)
        elif kind == 17 and answer.status.startswith("206"):
            place = dict(answer.headers).get("Content-Range", "")
            answer.body = f"--x\r\nContent-Range: {place}\r\n\r\n".encode() + answer.body + b"\r\n--x--\r\n"
            answer.put("Content-Type", "multipart/byteranges; boundary=x")
            answer.put("Content-Length", str(len(answer.body)))
        elif kind == 18:
            answer.body = gzip.compress(answer.body, mtime=0)
            answer.put("Content-Encoding", "gzip")
            answer.put("Content-Length", str(len(answer.body)))
        elif kind == 19:
            answer.before = b"HTTP/1.1 %d Wait\r\nX: y\r\n\r\n" % (100, 102, 103)[a % 3] * (b % 12)
        elif kind == 20:
            answer.headers += [(f"X-{index}", "y" * c) for index in range(a)] + [("X", "z" * (b << 9))]
        elif kind == 21:
            answer.body = bytes(len(answer.body))
        elif kind == 22:
            answer.put("ETag", f'"other{a % 2}"')
        elif kind == 23:
            answer.put("Content-Length", str(max(0, len(answer.body) - far)))
        elif kind == 24:
            answer.put("Content-Length", str(len(answer.body) + far + 1))
        elif kind == 25:
            answer.headers.append((struct.pack("BBB", a, b, c).decode("latin-1"), value))
        elif kind == 26:
            answer.send = len(answer.encode()) - far


@contextlib.contextmanager
def scripted(objects: Mapping[str, bytes]) -> Iterator[ScriptedServer]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        server = ScriptedServer(objects, port=listener.getsockname()[1])
        thread = threading.Thread(target=server.serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.end()
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


Reader = Callable[[ScriptedServer], object]
