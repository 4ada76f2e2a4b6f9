"""Redirects are followed by every method, and hand nothing that is the user's to another server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import aiohttp
import fsspec
import pytest
from http_server import CountingServer, Request, Served, counting_server
from rankload.loader.errors import AccessError
from rankload.loader.ranges.open import open_range_source
from rankload.loader.stores.base import ObjectInfo, Store
from rankload.loader.stores.open import open_store

NAMES = ("X-Api-Key", "PRIVATE-TOKEN", "Cookie", "Authorization")
SECRETS = {"headers": dict.fromkeys(NAMES, "SECRET")}
BODY = b"x" * 1000


@pytest.fixture(autouse=True)
def _no_netrc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", "/nowhere")


def head(store: Store, name: str, folder: Path) -> None:
    info = store.stat(name)
    assert info is not None
    assert info.size_bytes == len(BODY)


def whole(store: Store, name: str, folder: Path) -> None:
    store.download(name, str(folder / "x"), lambda n_bytes: None)
    assert (folder / "x").read_bytes() == BODY


def small(store: Store, name: str, folder: Path) -> None:
    assert store.read_small(name, 4096) == BODY


def by_ranges(store: Store, name: str, folder: Path) -> None:
    source = open_range_source(store, ObjectInfo(name, None))
    assert source is not None
    assert source.size_bytes == len(BODY)
    source.close()


Way = Callable[[Store, str, Path], None]
WAYS = [head, whole, small, by_ranges]


def asked_with(server: CountingServer) -> list[bool]:
    """Of each request, whether it had all the user's headers; none may have had some."""
    had = [[name for name in NAMES if name in one.headers] for one in server.requests]
    assert all(len(each) in (0, len(NAMES)) for each in had), had
    return [bool(each) for each in had]


@pytest.mark.parametrize("way", WAYS)
def test_headers_are_for_the_users_own_server(way: Way, tmp_path: Path) -> None:
    with counting_server({"/a": Served(BODY)}) as other:
        moved = {"/first": Served(redirect="/second"), "/second": Served(redirect=other.url("/a"))}
        with counting_server(moved) as own:
            store, name = open_store(own.url("/first"), None, SECRETS)
            way(store, name, tmp_path)
            store.close()
            assert asked_with(own) == [True, True]
            assert asked_with(other) == [False]


@pytest.mark.parametrize("way", WAYS)
def test_the_way_back_has_the_headers_again(way: Way, tmp_path: Path) -> None:
    with counting_server() as other, counting_server({"/a": Served(BODY)}) as own:
        other.served["/away"] = Served(redirect=own.url("/a"))
        own.served["/first"] = Served(redirect=other.url("/away"))
        store, name = open_store(own.url("/first"), None, SECRETS)
        way(store, name, tmp_path)
        store.close()
        assert asked_with(own) == [True, True]
        assert asked_with(other) == [False]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("target", "says"), [("/a", "more than 10 redirects"), ("ftp://h/a", "no http")])
def test_redirects_that_lead_nowhere(way: Way, target: str, says: str, tmp_path: Path) -> None:
    with counting_server({"/a": Served(redirect=target)}) as server:
        store, name = open_store(server.url("/a?sig=SECRET"))
        with pytest.raises(AccessError, match=says) as caught:
            way(store, name, tmp_path)
        store.close()
        assert "SECRET" not in str(caught.value)
        assert len(server.requests) in (1, 11)


CHAINED: dict[str, Callable[[], dict[str, object]]] = {
    "headers": lambda: SECRETS,
    "client's headers": lambda: {"client_kwargs": SECRETS},
    "cookies": lambda: {"cookies": {"session": "SECRET"}},
    "client's cookies": lambda: {"client_kwargs": {"cookies": {"session": "SECRET"}}},
    "client's auth": lambda: {"client_kwargs": {"auth": aiohttp.BasicAuth("user", "SECRET")}},
    "auth": lambda: {"auth": aiohttp.BasicAuth("user", "SECRET")},
}


@pytest.mark.parametrize("option", CHAINED)
@pytest.mark.parametrize("chain", ["simplecache", "filecache"])
def test_headers_of_a_chain_are_for_the_users_own_server(chain: str, option: str, tmp_path: Path) -> None:
    """fsspec's http is aiohttp's, which hands all but Authorization to whoever it is redirected to."""
    with counting_server({"/a": Served(BODY)}) as other, counting_server() as own:
        own.served |= {"/first": Served(redirect="/second"), "/second": Served(redirect=other.url("/a"))}
        given = {"http": CHAINED[option](), chain: {"cache_storage": str(tmp_path / "cache")}}
        store, name = open_store(
            f"{chain}::{own.url('/first')}", None, {**given, "skip_instance_cache": True}
        )
        for way in (whole, small):
            way(store, name, tmp_path)
        store.close()
        assert own.requests
        assert other.requests
        users = {"x-api-key", "private-token", "cookie", "authorization"}

        def has(one: Request) -> bool:
            return bool(users & {name.lower() for name in one.headers})

        assert all(map(has, own.requests)), own.requests
        assert not any(map(has, other.requests)), [one.headers for one in other.requests]
        assert "SECRET" not in str(other.requests)


def test_a_file_system_for_http_that_the_user_passes_leaks_nothing(tmp_path: Path) -> None:
    files = fsspec.filesystem("http", client_kwargs=SECRETS, skip_instance_cache=True)
    with counting_server({"/a": Served(BODY)}) as other, counting_server() as own:
        own.served["/first"] = Served(redirect=other.url("/a"))
        store, name = open_store(own.url("/first"), files)
        for way in (head, whole, small):
            way(store, name, tmp_path)
        store.close()
        assert set(asked_with(own)) == {True}
        assert set(asked_with(other)) == {False}
