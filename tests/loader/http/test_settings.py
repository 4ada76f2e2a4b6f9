"""What ``storage_options`` may say of http(s): honoured, without effect, or refused by name before any request."""

from __future__ import annotations

import ssl
from http.cookies import SimpleCookie
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from forward_proxy import forward_proxy
from http_server import Served, counting_server
from rankload.loader.errors import AccessError, OptionError
from rankload.loader.http.connections import Route
from rankload.loader.http.settings import HONOURED, Settings, settings_of
from rankload.loader.ranges.open import open_range_source
from rankload.loader.stores.base import ObjectInfo
from rankload.loader.stores.open import open_store

CONTEXT = ssl.create_default_context()
BASIC = "Basic bWU6cHc="

HONOURED_AS: list[tuple[dict[str, Any], Settings]] = [
    ({}, Settings()),
    ({"headers": {"X-A": "1"}}, Settings({"X-A": "1"})),
    ({"headers": {"X-A": 1, "user-agent": "me"}}, Settings({"X-A": "1", "User-Agent": "me"})),
    ({"headers": {"X-A": "1"}, "client_kwargs": {"headers": {"x-a": "0", "B": "2"}}}, Settings({"X-A": "1", "B": "2"})),
    ({"headers": {"Accept-Encoding": "gzip"}}, Settings()),
    ({"cookies": {"a": "1", "b": "2"}}, Settings({"Cookie": "a=1; b=2"})),
    ({"cookies": SimpleCookie("a=1"), "headers": {"cookie": "c=3"}}, Settings({"Cookie": "c=3; a=1"})),
    ({"auth": SimpleNamespace(encode=lambda: BASIC)}, Settings({"Authorization": BASIC})),
    ({"auth": ("me", "pw"), "headers": {"authorization": "other"}}, Settings({"Authorization": BASIC})),
    ({"auth": None, "cookies": None, "headers": None, "proxy": None, "timeout": None, "ssl": None}, Settings()),
    ({"ssl": True}, Settings()),
    ({"ssl": False}, Settings(route=Route(verify=False))),
    ({"ssl": CONTEXT}, Settings(route=Route(verify=CONTEXT))),
    ({"proxy": "http://h:1"}, Settings(route=Route(proxy="http://h:1"))),
    ({"trust_env": True}, Settings()),
    ({"trust_env": False}, Settings(route=Route(trust_env=False))),
    ({"encoded": True}, Settings(encoded=True)),
    ({"timeout": aiohttp.ClientTimeout()}, Settings()),
    (
        {"timeout": aiohttp.ClientTimeout(sock_connect=2, sock_read=9)},
        Settings(route=Route(connect_timeout_s=2, silence_timeout_s=9)),
    ),
    ({"block_size": 0, "cache_type": "none", "cache_options": {}, "skip_instance_cache": True}, Settings()),
    ({"simple_links": False, "same_scheme": False, "size_policy": None, "use_listings_cache": True}, Settings()),
    ({"asynchronous": False, "loop": None}, Settings()),
    ({"get_client": None, "connector": None, "cookie_jar": None, "proxy": ""}, Settings()),
    ({"allow_redirects": True, "verify_ssl": True}, Settings()),
    ({"verify_ssl": False}, Settings(route=Route(verify=False))),
]  # fmt: skip


@pytest.mark.parametrize(("options", "settings"), HONOURED_AS)
def test_honoured(options: dict[str, Any], settings: Settings) -> None:
    assert settings_of(options) == settings
    if "client_kwargs" not in options:
        assert settings_of({"client_kwargs": options}) == settings


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"connector": object()}, "connector"),
    ({"get_client": print}, "get_client"),
    ({"max_redirects": 3, "allow_redirects": False}, "allow_redirects, max_redirects"),
    ({"proxy_auth": ("me", "SECRET")}, "proxy_auth"),
    ({"cookie_jar": object()}, "cookie_jar"),
    ({"no_such_option": "SECRET"}, "no_such_option"),
    ({"timeout": 30}, "timeout.*total.*stall_timeout_s"),
    ({"timeout": aiohttp.ClientTimeout(total=30)}, "timeout.*total.*stall_timeout_s"),
    ({"timeout": "SECRET"}, "timeout is of type str"),
    ({"timeout": SimpleNamespace(total=None, sock_read="SECRET")}, "timeout is of type"),
    ({"auth": "SECRET"}, "auth is of type str"),
    ({"auth": ("me", "SECRET", "latin1")}, "auth is of type tuple"),
    ({"ssl": "SECRET"}, "ssl is of type str"),
    ({"proxy": "socks5://me:SECRET@h:1"}, "proxy.*http://host:port"),
    ({"headers": ["SECRET"]}, "headers is of type list"),
    ({"headers": {"Authorization": None}}, "headers.'Authorization'. is of type NoneType"),
    ({"headers": {"X-Key": b"SECRET"}}, "headers.'X-Key'. is of type bytes"),
    ({"proxy": "http://me:SECRET@h:abc"}, "proxy.*http://host:port"),
    ({"headers": {"X-Key": "SECRET\r\nX-Other: 1"}}, "X-Key"),
    ({"headers": {"X-Key": "SECRET\u20ac"}}, "X-Key"),
    ({"headers": {"X Key": "SECRET"}}, "headers have a name"),
    ({"cookies": "SECRET"}, "cookies is of type str"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_refused_by_name(options: dict[str, Any], says: str) -> None:
    for given in (options, {"client_kwargs": options}):
        with pytest.raises(OptionError, match=says) as caught:
            open_store("http://no-such-host.invalid/a", None, given)
        assert "SECRET" not in str(caught.value)


def test_what_is_honoured_is_listed() -> None:
    with pytest.raises(OptionError) as caught:
        settings_of({"connector": object()})
    assert ", ".join(HONOURED) in str(caught.value)
    with pytest.raises(OptionError, match="client_kwargs is of type str"):
        settings_of({"client_kwargs": "x"})


def test_they_hold_for_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For HEAD, a whole GET and a range."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login netrc password pw\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with counting_server({"/a": Served(b"abc"), "/a{b}": Served(b"abc")}) as server, forward_proxy() as proxy:
        for path, options in (
            ("/a", {"trust_env": False}),
            ("/a", {"proxy": proxy.url, "headers": {"X-Key": "1"}}),
            ("/a{b}", {"trust_env": False, "encoded": True}),
        ):
            server.requests.clear()
            proxy.asked.clear()
            store, name = open_store(server.url(path), None, options)
            info = store.stat(name)
            assert info == ObjectInfo(name, 3, '"v1"')
            store.download(name, str(tmp_path / "x"), lambda n_bytes: None, info)
            source = open_range_source(store, info)
            assert source is not None
            source.close()
            store.close()
            assert [one.method for one in server.requests] == ["HEAD", "GET", "GET"]
            assert {one.path for one in server.requests} == {path}
            assert {one.headers.get("X-Key") for one in server.requests} == {
                "1" if "proxy" in options else None
            }
            assert {"Authorization" in one.headers for one in server.requests} == {"proxy" in options}
            assert len(proxy.asked) == (3 if "proxy" in options else 0)
        store, name = open_store(server.url("/a"))
        with pytest.raises(AccessError, match="refused"):
            store.stat(name)


@pytest.mark.parametrize("path", ["/a b?sig=SECRET", "/\u00fc?sig=SECRET", "/a?sig=SECRET\r\nX: 1"])
def test_what_is_not_encoded_though_it_is_said_to_be(path: str) -> None:
    store, name = open_store(f"http://127.0.0.1:9{path}", None, {"encoded": True})
    with pytest.raises(AccessError, match="not a valid") as caught:
        store.stat(name)
    assert "SECRET" not in str(caught.value)
