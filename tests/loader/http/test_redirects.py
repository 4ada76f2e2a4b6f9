"""Redirects are followed by every method, and hand nothing that is the user's to another server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from http_server import CountingServer, Served, counting_server
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
