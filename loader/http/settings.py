"""Reads what ``storage_options`` say of http(s), once for all requests of a store. Pure.

The names are those of fsspec's file system for http(s), and of the client that it is built on. What is not known here
is refused by its name: a setting that is passed over in silence may be a credential, or a limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import Any

from ..errors import OptionError
from .addresses import basic, proxy_parts
from .connections import Route

HONOURED = ("headers", "cookies", "auth", "ssl", "proxy", "timeout", "trust_env", "encoded")
"""Options that are honoured, whether they are given themselves or in ``client_kwargs``."""
_NO_DIFFERENCE = frozenset(
    {
        "block_size", "cache_type", "cache_options", "simple_links", "same_scheme", "size_policy", "asynchronous",
        "loop", "use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache", "auto_decompress",
        "raise_for_status", "read_bufsize", "json_serialize", "verify_ssl",
    }
)  # fmt: skip
"""Options for listings, caches and event loops, which a download has none of."""
_OURS = frozenset({"accept-encoding", "range", "if-match"})
"""Headers that a request has by what it asks for; the user's own are left out."""
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_USUAL = {"user-agent": "User-Agent", "accept": "Accept"}
"""Headers that every request has, and how they are written there."""


@dataclass(frozen=True)
class Settings:
    """What a user sets for http(s)."""

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """For the user's own server alone: cookies and credentials are among them."""
    encoded: bool = False
    """Whether URLs are sent as they are, without percent-encoding what no URL may hold."""
    route: Route = field(default_factory=Route, repr=False)


def settings_of(storage_options: Mapping[str, Any]) -> Settings:
    """The settings in `storage_options`. Messages name options and types, never values: they may be secrets.

    Raises `OptionError` for an option that is not known, or has a value that does not fit.
    """
    client = storage_options.get("client_kwargs") or {}
    if not isinstance(client, Mapping):
        raise _unfit("client_kwargs", client, "a mapping")
    given = {**client, **{name: value for name, value in storage_options.items() if name != "client_kwargs"}}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("allow_redirects") is True:
        del given["allow_redirects"]
    if given.get("verify_ssl") is False:
        given.setdefault("ssl", False)
    unknown = sorted(set(given) - set(HONOURED) - _NO_DIFFERENCE)
    if unknown:
        raise OptionError(
            f"storage_options hold {', '.join(unknown)}, which is not known for http(s): expected some of "
            f"{', '.join(HONOURED)}, or client_kwargs with these"
        )
    connect_s, silence_s = _timeouts(given.get("timeout"))
    return Settings(
        headers=headers_of(client, storage_options, given.get("auth")),
        encoded=bool(given.get("encoded")),
        route=Route(
            verify=_verify(given.get("ssl")),
            proxy=_proxy(given.get("proxy")),
            trust_env=given.get("trust_env") is not False,
            connect_timeout_s=connect_s,
            silence_timeout_s=silence_s,
        ),
    )


def headers_of(client: Mapping[str, Any], options: Mapping[str, Any], auth: Any) -> dict[str, str]:
    """The headers of requests, cookies and `auth` among them; the `options`' take the place of the `client`'s.

    Raises `OptionError` for what is no header, cookie or login.
    """
    found: dict[str, tuple[str, str]] = {}
    cookies: dict[str, str] = {}
    for given in (client, options):
        for name, value in _pairs("headers", given.get("headers")):
            if not _NAME.fullmatch(name):
                raise OptionError("storage_options: headers have a name that HTTP does not allow")
            found[name.lower()] = (_USUAL.get(name.lower(), name), value)
        cookies |= _pairs("cookies", given.get("cookies"))
    if cookies:
        before = [found["cookie"][1]] if "cookie" in found else []
        told = [f"{name}={value}" for name, value in cookies.items()]
        found["cookie"] = ("Cookie", "; ".join([*before, *told]))
    if auth is not None:
        found["authorization"] = ("Authorization", _authorization(auth))
    for name, value in found.values():
        if not _VALUE.fullmatch(value):
            raise OptionError(
                f"storage_options: the value of the header {name} holds what HTTP does not allow"
            )
    return {name: value for key, (name, value) in found.items() if key not in _OURS}


def _pairs(option: str, value: Any) -> Iterator[tuple[str, str]]:
    try:
        pairs = dict(value or {}).items()
    except (TypeError, ValueError):
        raise _unfit(option, value, "a mapping") from None
    for name, each in pairs:
        # Cookies may come as http.cookies.Morsel.
        value = getattr(each, "value", each)
        if not isinstance(value, str | int):
            raise _unfit(f"{option}[{name!r}]", value, "a string")
        yield str(name), str(value)


def _authorization(auth: Any) -> str:
    encode = getattr(auth, "encode", None)
    if callable(encode) and not isinstance(auth, str):
        value = encode()
        if isinstance(value, str):
            return value
    elif isinstance(auth, tuple | list) and len(auth) == 2 and all(isinstance(one, str) for one in auth):
        return basic(*auth)
    raise _unfit("auth", auth, "an aiohttp.BasicAuth, or a user and a password")


def _verify(ssl: Any) -> SSLContext | bool | None:
    if ssl is None or ssl is True:
        return None
    if ssl is False or isinstance(ssl, SSLContext):
        return ssl
    raise _unfit("ssl", ssl, "True, False or an ssl.SSLContext")


def _proxy(proxy: Any) -> str | None:
    if proxy is None or proxy == "":
        return None
    if proxy_parts(str(proxy)) is None:
        raise OptionError(
            "storage_options: proxy is not of a kind that is known here: expected http://host:port"
        )
    return str(proxy)


def _timeouts(timeout: Any) -> tuple[float | None, float | None]:
    """For making a connection, and for silence on it; None for each that is not set."""
    if timeout is None:
        return None, None
    if isinstance(timeout, int | float) or getattr(timeout, "total", None) is not None:
        raise OptionError(
            "storage_options: timeout limits a whole transfer (total), which is not honoured: stall_timeout_s of the "
            "options is what ends a load; sock_connect and sock_read are honoured"
        )
    found = getattr(timeout, "sock_connect", None), getattr(timeout, "sock_read", None)
    if not hasattr(timeout, "total") or any(not isinstance(one, int | float | None) for one in found):
        raise _unfit("timeout", timeout, "an aiohttp.ClientTimeout")
    return found


def _unfit(option: str, value: Any, expected: str) -> OptionError:
    return OptionError(f"storage_options: {option} is of type {type(value).__name__}: expected {expected}")
