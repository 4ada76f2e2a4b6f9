"""The store of http(s) URLs: bodies of every kind, silence, what is tried again, and what it costs in requests."""

from __future__ import annotations

import multiprocessing
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from bad_server import Behaviour, bad_server
from certificates import Certificate
from http_server import Served, counting_server
from rankload.loader import retries
from rankload.loader.errors import AccessError, CorruptError
from rankload.loader.http import exchange
from rankload.loader.stores.base import ObjectInfo
from rankload.loader.stores.http import HttpStore
from rankload.loader.stores.open import open_store

BODY = os.urandom(3_000_000)


def nothing(n_bytes: int) -> None:
    pass


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_S", 0.01)
    monkeypatch.setattr(retries, "DEFAULT_STALL_TIMEOUT_S", 2.0)


def served(kind: str, **more: object) -> Served:
    kinds = {"length": {}, "chunked": {"chunked": True}, "until it closes": {"send_length": False}}
    return Served(BODY, **{**kinds[kind], **more})


KINDS = pytest.mark.parametrize("kind", ["length", "chunked", "until it closes"])


@KINDS
def test_bodies(kind: str, tmp_path: Path) -> None:
    with counting_server({"/a": served(kind)}) as server:
        store, name = open_store(server.url("/a"))
        info = store.stat(name)
        assert info == ObjectInfo(name, len(BODY) if kind == "length" else None, '"v1"')
        seen: list[int] = []
        store.download(name, str(tmp_path / "x"), seen.append, info)
        assert (tmp_path / "x").read_bytes() == BODY
        assert sum(seen) == len(BODY)
        with pytest.raises(CorruptError, match="at most 5"):
            store.read_small(name, 5)
        store.download(name, str(tmp_path / "y"), nothing, ObjectInfo(name, len(BODY), '"v1"'))
        store.close()
        assert [one.method for one in server.requests] == ["HEAD", "GET", "GET", "GET"]
        assert {one.headers["Accept-Encoding"] for one in server.requests} == {"identity"}
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_over_tls(
    chunked: bool,
    encrypted: ssl.SSLContext,
    certificate: Certificate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.bundle))
    with bad_server({"/a": Behaviour(BODY, chunked=chunked)}, encrypted) as server:
        store, name = open_store(server.url("/a"))
        for _ in range(2):
            store.download(name, str(tmp_path / "x"), nothing, store.stat(name))
            assert (tmp_path / "x").read_bytes() == BODY
        store.close()
        assert len(server.asked) == 2
        assert len({one.client_port for one in server.asked}) == 1


@KINDS
@pytest.mark.parametrize("size", [len(BODY) - 1, len(BODY) + 1])
def test_bodies_of_another_length(kind: str, size: int, tmp_path: Path) -> None:
    with counting_server({"/a": served(kind)}) as server:
        store, name = open_store(server.url("/a"))
        with pytest.raises(CorruptError, match=f"expected {size:,} bytes"):
            store.download(name, str(tmp_path / "x"), nothing, ObjectInfo(name, size))
        store.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["length", "chunked"])
def test_bodies_that_end_early_are_begun_anew(kind: str, tmp_path: Path) -> None:
    with counting_server({"/a": served(kind, truncate_to=100_000, chunk=30_000)}) as server:
        store, name = open_store(server.url("/a"))
        seen: list[int] = []
        with pytest.raises(CorruptError, match=r"the body ended early: expected .*, got 100,000 bytes"):
            store.download(name, str(tmp_path / "x"), seen.append)
        assert server.gets("/a") > 2
        assert (sum(seen), sum(seen[seen.index(-100_000) + 1 :])) == (100_000, 100_000)
        server.served["/a"].truncate_to = None
        store.download(name, str(tmp_path / "x"), nothing)
        store.close()
        assert (tmp_path / "x").read_bytes() == BODY


@KINDS
def test_a_body_that_stalls_is_ended_by_the_callback(kind: str, tmp_path: Path) -> None:
    with counting_server({"/a": served(kind, stall_after=40_000, chunk=20_000)}) as server:
        store, name = open_store(server.url("/a"))
        threads: set[int] = set()
        calls: list[int] = []
        begin = time.monotonic()

        def give_up(n_bytes: int) -> None:
            threads.add(threading.get_ident())
            calls.append(n_bytes)
            if calls.count(0) > 3:
                raise ConnectionResetError("enough")

        with pytest.raises(ConnectionResetError, match="enough"):
            store.download(name, str(tmp_path / "x"), give_up)
        assert time.monotonic() - begin < 5
        assert sum(calls) == 40_000 + 10 * (kind == "chunked")
        assert threads == {threading.get_ident()}
        assert server.gets("/a") == 1
        store.close()
    assert os.listdir(tmp_path) == []


@KINDS
def test_silence_is_not_waited_for_for_ever(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "GLANCE_S", 0.05)
    monkeypatch.setattr(exchange, "SILENCE_TIMEOUT_S", 0.2)
    with counting_server({"/a": served(kind, stall_after=40_000, chunk=20_000)}) as server:
        store, name = open_store(server.url("/a"))
        with pytest.raises(AccessError, match=r"/a: the server sent nothing for 0\.2 s"):
            store.download(name, str(tmp_path / "x"), nothing)
        assert server.gets("/a") > 2
        store.close()


def test_a_connection_that_is_not_made_is_ended_by_the_callback(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # Accepted by the kernel, and never answered: TLS waits for a greeting.
        store, name = open_store(f"https://127.0.0.1:{listening.getsockname()[1]}/a")
        calls: list[int] = []
        begin = time.monotonic()

        def give_up(n_bytes: int) -> None:
            calls.append(n_bytes)
            if len(calls) > 2:
                raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            store.download(name, str(tmp_path / "x"), give_up)
        assert time.monotonic() - begin < 5
        assert set(calls) == {0}
        store.close()


def test_a_server_that_is_busy_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []
    monkeypatch.setattr(retries, "DEFAULT_STALL_TIMEOUT_S", 120.0)
    monkeypatch.setattr(retries, "pause", lambda seconds, idle: paused.append(seconds))
    with counting_server({"/a": Served(b"abc", failures=2, retry_after="7")}) as server:
        store, name = open_store(server.url("/a"))
        store.download(name, str(tmp_path / "x"), nothing)
        store.close()
        assert (tmp_path / "x").read_bytes() == b"abc"
        assert server.gets("/a") == 3
    assert [7 <= seconds < 7.1 for seconds in paused] == [True, True]


def test_pauses_are_ended_by_the_callback(tmp_path: Path) -> None:
    with counting_server({"/a": Served(b"abc", failures=1, retry_after="50")}) as server:
        store, name = open_store(server.url("/a"))
        begin = time.monotonic()

        def give_up(n_bytes: int) -> None:
            if time.monotonic() - begin > 0.3:
                raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            store.download(name, str(tmp_path / "x"), give_up)
        assert time.monotonic() - begin < 5


def test_connections_are_kept_and_closed(tmp_path: Path) -> None:
    with counting_server({f"/{i}": Served(b"x" * 9) for i in range(5)}) as server:
        store = HttpStore()
        for i in range(5):
            name = server.url(f"/{i}")
            store.download(name, str(tmp_path / "x"), nothing, store.stat(name))
            assert store.stat(server.url("/none")) is None
        assert len({one.client_port for one in server.requests}) == 1
        store.close()
        assert store.stat(server.url("/0")) is not None
        assert len({one.client_port for one in server.requests}) == 2
        store.close()


def _download_in_child(store: HttpStore, name: str, target: str) -> None:
    store.download(name, target, nothing, store.stat(name))
    store.close()
    os._exit(0 if os.path.getsize(target) == 3 else 1)


def test_a_forked_child_makes_its_own_connections(tmp_path: Path) -> None:
    with counting_server({"/a": Served(b"abc")}) as server:
        store, name = HttpStore(), server.url("/a")
        assert store.stat(name) is not None
        child = multiprocessing.get_context("fork").Process(
            target=_download_in_child, args=(store, name, str(tmp_path / "y"))
        )
        child.start()
        child.join(20)
        assert child.exitcode == 0
        assert store.stat(name) is not None
        store.close()
        ports = [one.client_port for one in server.requests]
        assert ports[0] == ports[-1] != ports[1] == ports[2]


def test_what_the_disk_refuses_is_no_failure_of_the_server(tmp_path: Path) -> None:
    with counting_server({"/a": Served(BODY)}) as server:
        store, name = open_store(server.url("/a"))
        with pytest.raises(FileNotFoundError):
            store.download(name, str(tmp_path / "none" / "x"), nothing)
        assert server.gets("/a") == 1
        store.close()


def test_neither_fsspec_nor_aiohttp_is_needed(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["aiohttp"] = sys.modules["fsspec"] = None
from rankload.loader.stores.open import open_store
store, name = open_store(sys.argv[1])
store.download(name, {str(tmp_path / "x")!r}, lambda n_bytes: None, store.stat(name))
"""
    with counting_server({"/a": Served(b"abc")}) as server:
        subprocess.run([sys.executable, "-c", code, server.url("/a")], check=True, timeout=60)
    assert (tmp_path / "x").read_bytes() == b"abc"
