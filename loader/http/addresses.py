"""Decides which headers and credentials go with a URL to its server, and through which proxy it is reached."""

from __future__ import annotations

import base64
import netrc
import os
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from ..errors import AccessError
from ..redaction import redact_path

_LEGAL = "%/:=&?~#+!$,;'@()*[]-._"
_SENDABLE = re.compile(r"[\x21-\x7e]*")
"""What a request may hold."""


class Origin(NamedTuple):
    """A server. Credentials for one are never sent to another."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True)
class Address:
    """An object's URL without user info and fragment, and the headers that only its own server may be sent."""

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    credentials: str
    """Where the credentials in `headers` come from, for messages."""

    @property
    def origin(self) -> Origin:
        return origin_of(self.url)


def origin_of(url: str) -> Origin:
    """The server of `url`. Raises `AccessError` for what is no http(s) URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme.lower()]
        host = (parts.hostname or "").encode("idna" if parts.hostname else "ascii").decode("ascii")
    except (KeyError, ValueError):
        host, port = "", 0
    if not host:
        raise AccessError(f"{redact_path(url)}: not a valid http(s) URL", path=redact_path(url))
    return Origin(parts.scheme.lower(), host, port)


def address_of(
    url: str, headers: Mapping[str, str], *, encoded: bool = False, trust_env: bool = True
) -> Address:
    """The address of `url`, as the user wrote it, with the user's `headers`.

    Where those hold no Authorization and no Cookie, credentials come from the URL's user info, or else, with
    `trust_env`, from the host's entry in the netrc file (``$NETRC`` or ``~/.netrc``). What no URL may hold is
    percent-encoded, unless the URL is `encoded` already. Raises `AccessError` for what is no http(s) URL.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise AccessError(f"{redact_path(url)}: not a valid http(s) URL", path=redact_path(url)) from None
    clean = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))
    if not encoded:
        clean = _legal(clean)
    elif not _SENDABLE.fullmatch(clean):
        raise AccessError(f"{redact_path(url)}: not a valid http(s) URL", path=redact_path(url))
    origin = origin_of(clean)
    sent = dict(headers)
    names = {name.lower() for name in sent}
    if "authorization" in names or "cookie" in names:
        return Address(clean, sent, "headers of storage_options")
    if parts.username is not None:
        sent["Authorization"] = basic(unquote(parts.username), unquote(parts.password or ""))
        return Address(clean, sent, "user info of the URL")
    entry = _netrc_entry(origin.host) if trust_env else None
    if entry is not None:
        sent["Authorization"] = basic(*entry)
        return Address(clean, sent, "the netrc file")
    if parts.query:
        return Address(clean, sent, "the URL's query and nothing else")
    return Address(clean, sent, "the headers of storage_options" if sent else "none")


def redirected(url: str, location: str, described: str) -> str:
    """The URL that a redirect from `url` to `location` leads to, without user info.

    Raises `AccessError` where it is no http(s) URL; `described` names the object in the message.
    """
    try:
        # http.client reads headers as Latin-1; servers write them in UTF-8.
        target = urlsplit(urljoin(url, _legal(location.encode("latin-1").decode("utf-8", "replace"))))
        clean = urlunsplit(target._replace(netloc=target.netloc.rpartition("@")[2], fragment=""))
        origin_of(clean)
    except (AccessError, ValueError):
        raise AccessError(f"{described}: redirects to what is no http(s) URL", path=described) from None
    return clean


def basic(user: str, password: str) -> str:
    """The value of an Authorization header in the Basic scheme (RFC 7617)."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def proxy_for(origin: Origin) -> str | None:
    """The URL of the proxy that the environment sets for `origin` (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY).

    None where it sets none.
    """
    proxies = urllib.request.getproxies_environment()
    found = proxies.get(origin.scheme) or proxies.get("all")
    bypass = getattr(urllib.request, "proxy_bypass_environment")  # noqa: B009
    if not found or bypass(f"{origin.host}:{origin.port}", proxies) or bypass(origin.host, proxies):
        return None
    return found if "://" in found else f"http://{found}"


def proxy_parts(proxy: str) -> SplitResult | None:
    """The parts of a proxy's URL; None where it is not ``http://host:port``, the one kind that is known here."""
    try:
        parts = urlsplit(proxy)
        return parts if parts.scheme == "http" and parts.hostname and parts.port != 0 else None
    except ValueError:
        return None


def request_target(url: str) -> str:
    """The path and query of `url`, which follow the method."""
    parts = urlsplit(url)
    # Not urlunsplit, which changes a path that begins with two slashes.
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _legal(url: str) -> str:
    """`url` with what no URL may hold percent-encoded. All else stays as it is: signatures cover it."""
    return quote(url, safe=_LEGAL)


def _netrc_entry(host: str) -> tuple[str, str] | None:
    path = os.environ.get("NETRC") or os.path.join(os.path.expanduser("~"), ".netrc")
    try:
        found = netrc.netrc(path).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return (found[0], found[2] or "") if found is not None else None
