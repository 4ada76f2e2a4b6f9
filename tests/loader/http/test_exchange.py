"""Answers that are cut, framed strangely or late, from a server that says exactly what it is told to."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rankload.loader import retries
from rankload.loader.errors import AccessError, CorruptError, RankloadError
from rankload.loader.http import connections, exchange
from rankload.loader.ranges.open import open_range_source
from rankload.loader.retries import TryAgainError
from rankload.loader.stores.base import ObjectInfo
from rankload.loader.stores.http import HttpStore


class Script:
    """Sends the next of `answers` for each request, and closes the connection where that ends with None."""

    def __init__(self, answers: list[list[bytes | float | None]]) -> None:
        self.answers = answers
        self.accepted = 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/a"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                self.accepted += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while True:
                head = b""
                while b"\r\n\r\n" not in head:
                    got = connection.recv(65536)
                    if not got:
                        return
                    head += got
                for part in self.answers.pop(0) if self.answers else [None]:
                    if part is None:
                        return
                    if isinstance(part, float):
                        time.sleep(part)
                    else:
                        connection.sendall(part)


@contextlib.contextmanager
def scripted(*answers: list[bytes | float | None]) -> Iterator[tuple[Script, HttpStore]]:
    script, store = Script(list(answers)), HttpStore()
    try:
        yield script, store
    finally:
        store.close()
        script.socket.close()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_S", 0.01)
    monkeypatch.setattr(retries, "DEFAULT_STALL_TIMEOUT_S", 2.0)
    monkeypatch.setattr(exchange, "GLANCE_S", 0.1)


GOOD: list[bytes | float | None] = [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"]
HEADS = [
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1",
    b"HTTP/1.1 404 N",
    b"HTTP/1.1 200 OK\r\nA: b\r\n",
]


def fetched(store: HttpStore, url: str, folder: Path) -> bytes:
    store.download(url, str(folder / "x"), lambda n_bytes: None)
    return (folder / "x").read_bytes()


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_is_cut_is_no_answer(head: bytes, tmp_path: Path) -> None:
    with scripted([head, None], GOOD) as (script, store):
        assert fetched(store, script.url, tmp_path) == b"abc"
    with scripted([head, None], GOOD) as (script, store):
        assert store.read_small(script.url, 10) == b"abc"
    with scripted([head, None], [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"]) as (script, store):
        found = store.stat(script.url)
        assert found is not None
        assert found.size_bytes == 3
    with (
        scripted(*[[head, None]] * 200) as (script, store),
        pytest.raises(RankloadError, match="within the head"),
    ):
        store.read_small(script.url, 10)


@pytest.mark.parametrize(
    "encoding",
    ["gzip, chunked", "identity\r\nTransfer-Encoding: chunked", "gzip"],
)
def test_a_framing_that_is_not_understood_is_refused(encoding: str, tmp_path: Path) -> None:
    answer = f"HTTP/1.1 200 OK\r\nTransfer-Encoding: {encoding}\r\n\r\n3\r\nabc\r\n0\r\n\r\n".encode()
    with scripted([answer, None]) as (script, store), pytest.raises(AccessError, match="Transfer-Encoding"):
        fetched(store, script.url, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "status", ["206 Partial Content\r\nContent-Range: bytes 0-2/100", "204 No Content", "202 Accepted"]
)
def test_only_an_answer_with_the_object_is_taken_for_it(status: str, tmp_path: Path) -> None:
    body = b"" if status.startswith("204") else b"Content-Length: 3\r\n\r\nabc"
    with (
        scripted([f"HTTP/1.1 {status}\r\n".encode() + (body or b"\r\n")]) as (script, store),
        pytest.raises(AccessError, match=f"HTTP {status[:3]}"),
    ):
        fetched(store, script.url, tmp_path)


def test_answers_before_the_answer_are_passed_over(tmp_path: Path) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    with scripted([early, *GOOD]) as (script, store):
        assert fetched(store, script.url, tmp_path) == b"abc"


def test_a_head_that_comes_slowly_is_ended_by_the_callback(tmp_path: Path) -> None:
    calls = 0

    def give_up(n_bytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt

    begin = time.monotonic()
    with (
        scripted([b"HTTP/1.1 200 OK\r\nContent-", 20.0]) as (script, store),
        pytest.raises(KeyboardInterrupt),
    ):
        store.download(script.url, str(tmp_path / "x"), give_up)
    assert time.monotonic() - begin < 10


def test_an_answer_that_carries_an_error_and_no_body_is_not_waited_for(tmp_path: Path) -> None:
    begin = time.monotonic()
    with (
        scripted([b"HTTP/1.1 403 Forbidden\r\nContent-Length: 100\r\n\r\n", 20.0]) as (script, store),
        pytest.raises(AccessError, match="HTTP 403"),
    ):
        fetched(store, script.url, tmp_path)
    assert time.monotonic() - begin < 10


def test_what_came_unasked_is_not_taken_for_the_next_answer(tmp_path: Path) -> None:
    with scripted([*GOOD, 0.1, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"], GOOD) as (
        script,
        store,
    ):
        assert fetched(store, script.url, tmp_path) == b"abc"
        time.sleep(0.4)
        assert fetched(store, script.url, tmp_path) == b"abc"
        assert script.accepted == 2


def test_a_connection_that_was_idle_for_long_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(GOOD, GOOD, GOOD) as (script, store):
        fetched(store, script.url, tmp_path)
        fetched(store, script.url, tmp_path)
        assert script.accepted == 1
        monkeypatch.setattr(connections, "MAX_IDLE_S", 0.0)
        fetched(store, script.url, tmp_path)
        assert script.accepted == 2


@pytest.mark.parametrize("location", ["http://[bad/", "http://h:abc/", "ftp://h/a"])
def test_a_redirect_to_no_url_says_so(location: str, tmp_path: Path) -> None:
    answer = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
    with scripted([answer]) as (script, store), pytest.raises(AccessError, match="redirects to what is no"):
        fetched(store, script.url, tmp_path)


@pytest.mark.parametrize("chunk", [b"-5\r\nabcde\r\n0\r\n\r\n", b"zz\r\nabc\r\n0\r\n\r\n", b"5\r\nabc"])
def test_chunks_that_cannot_be_are_no_body(chunk: bytes, tmp_path: Path) -> None:
    answer: list[bytes | float | None] = [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk,
        None,
    ]
    with scripted(*[answer] * 3) as (script, store), pytest.raises((CorruptError, AccessError)):
        fetched(store, script.url, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_chunk_of_negative_size_is_no_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_S", 0.001)
    head = 'HTTP/1.1 206 Partial Content\r\nETag: "a"\r\n'
    probe = f"{head}Content-Range: bytes 0-0/100\r\nContent-Length: 1\r\n\r\nx".encode()
    begin = f"{head}Content-Range: bytes 0-9/100\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with scripted([probe], *[[begin, b"-5\r\n" + b"x" * 5000, None]] * 3) as (script, store):
        source = open_range_source(store, ObjectInfo(script.url, 100))
        assert source is not None
        with contextlib.closing(source), pytest.raises((TryAgainError, OSError)):
            source.read_into(0, 10, [memoryview(bytearray(10))], lambda _: None)


def test_a_url_that_is_none_says_so() -> None:
    with pytest.raises(AccessError, match="not a valid"):
        HttpStore().stat("http://[bad/a")
