"""As much of the Hugging Face Hub's API as ``HfFileSystem`` asks for to read the files of a model, on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository, ``repo``, with large files in it: the Hub keeps their SHA-256s."""

    repo: str
    files: dict[str, bytes]
    sha256: dict[str, str] = field(default_factory=dict)
    """What is told in the place of the right ones."""
    port: int = 0
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of each request."""
    token: str | None = None
    """What is let in; everybody where None."""
    elsewhere: str = ""
    """The URL of another server, which has the files: requests for them are redirected there."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        sha256 = self.sha256.get(name, hashlib.sha256(data).hexdigest())
        oid = hashlib.sha1(data).hexdigest()
        lfs = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return {"type": "file", "path": name, "size": len(data), "oid": oid, "lfs": lfs}


class _Handler(BaseHTTPRequestHandler):
    owner: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.owner, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._send(401, b"{}", {"X-Error-Message": "Invalid credentials"})
        api = f"/api/models/{hub.repo}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{REVISION}"):
            return self._json(
                {"id": hub.repo, "modelId": hub.repo, "sha": REVISION, "siblings": [], "tags": []}
            )
        if path.startswith(f"{api}/paths-info/"):
            return self._json([hub.entry(name) for name in self._paths(body) if name in hub.files])
        if path.startswith(f"{api}/tree/"):
            return self._json([hub.entry(name) for name in sorted(hub.files)])
        match = re.fullmatch(rf"/{hub.repo}/resolve/[^/]+/(.+)", path)
        if match is not None and match[1] in hub.files:
            return self._file(match[1])
        code = "EntryNotFound" if path.startswith((api, f"/{hub.repo}/")) else "RepoNotFound"
        return self._send(404, b"{}", {"X-Error-Code": code})

    def _paths(self, body: bytes) -> list[str]:
        if self.headers.get("Content-Type", "").startswith("application/json"):
            told = json.loads(body)["paths"]
            return [told] if isinstance(told, str) else list(told)
        return parse_qs(body.decode()).get("paths", [])

    def _file(self, name: str) -> None:
        data, entry = self.owner.files[name], self.owner.entry(name)
        headers = {
            "ETag": f'"{entry["lfs"]["oid"]}"',
            "X-Linked-ETag": f'"{entry["lfs"]["oid"]}"',
            "X-Linked-Size": str(len(data)),
            "X-Repo-Commit": REVISION,
            "Accept-Ranges": "bytes",
        }
        if self.owner.elsewhere:
            return self._send(302, b"", {**headers, "Location": f"{self.owner.elsewhere}/{name}"})
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return self._send(200, data, headers)
        start, stop = int(match[1]), min(int(match[2] or len(data) - 1) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._send(206, data[start:stop], headers)

    def _json(self, told: Any) -> None:
        self._send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def hub_server(repo: str, files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(repo, files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": hub}))
    server.daemon_threads = True
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
