"""Takes secrets out of paths and messages: user info, queries, headers and logins, and values that are known. Pure.

`redact_path` is for what is known to be a path, of which all else is kept. `redact_text` is for texts of others, in
which a URL may stand anywhere, and a secret without one: it takes more, rather than too little.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

HIDDEN = "***"
"""What stands in the place of a secret that no URL shows the end of."""
_LINK = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*(?:://|::))")
"""Between the parts of a chain."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HTTP = re.compile(r"https?://", re.IGNORECASE)
_SETTING = re.compile(r"[?#](?=[^?#]*=)", re.DOTALL)
"""Where a query begins, in URIs in which ``?`` and ``#`` may also be part of an object's name."""
_PORT = re.compile(r"(?:[^:\[\]]*|\[[^\]]*\])(?::(?:\d*|\{.*\}))?")
"""A host, and perhaps a port."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
_CLOSING = re.compile(r"[\"'`)\]}>,;:.\\]*\Z")
_QUERY = re.compile(r"([?&][\w.~%+-]{1,80}=)[^\s\"'<>&)]*")
_NAMED = re.compile(
    r"""((?:\b|_)(?:proxy-)?(?:authorization|private-token|x-[\w-]*(?:key|token)|(?:set-)?cookie|pass(?:word|wd|phrase)?|secret
    |[\w-]*token|[\w-]*(?:api|account|access|secret|shared|sas)[_-]?key|signature|sig|credentials?)s?["']?\s*[:=]\s*["']?)
    (?!["'\s:=])[^"',;&)\s]+""",
    re.IGNORECASE | re.VERBOSE,
)
_LOGIN = re.compile(r"\b(basic|bearer|digest|negotiate)\s+[\w+/=.~:-]{4,}", re.IGNORECASE)
_SECRET_NAME = re.compile(
    r"auth|cookie|credential|key|pass|secret|sas|sig|token|user|login|connection_string|cert", re.IGNORECASE
)
"""Names of options whose values are secret, or tell who somebody is."""
_OPEN_NAME = re.compile(
    r"^(?:trust_env|anon|use_listings_cache|skip_instance_cache|cert_?(?:file|path)|verify.*)$"
)
_SHORTEST = 4
"""Shorter values are in too many words to be taken out of texts."""


def redact_path(path: str) -> str:
    """`path`, of whatever kind, without user info, query and fragment; chains (``simplecache::https://...``) too.

    Where no http(s) URL, ``?`` and ``#`` begin a query only before a ``=``: they may be part of an object's name. Of a
    password with ``@`` or ``/`` in it, all up to the last ``@`` is taken for user info. A local path stays as it is.
    """
    return "::".join(map(_redact_link, _LINK.split(path)))


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` with every URL in it, of whatever kind, without user info, query and fragment.

    Values of queries, headers and logins outside of URLs are replaced, and each of the `secrets` wherever it stands.
    """
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _URL.sub(_redact_found, text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    text = _LOGIN.sub(rf"\1 {HIDDEN}", text)
    return _NAMED.sub(rf"\1{HIDDEN}", text)


def secrets_in(options: Any) -> frozenset[str]:
    """The values among a store's options that no message may hold: those of logins, keys, headers and cookies."""
    return frozenset(value for value in _secret_values(options, told=False) if len(value) >= _SHORTEST)


def _redact_link(link: str) -> str:
    scheme = _SCHEME.match(link)
    if scheme is None:
        return link
    rest = link[scheme.end() :]
    if _SCHEME.match(rest):
        # What caching file systems make of a chain.
        return scheme[0] + _redact_link(rest)
    if _HTTP.fullmatch(scheme[0]):
        query = re.search(r"[?#]", rest)
        # A password may hold them, too.
        at = rest.rfind("@")
        if query is not None and "/" not in rest[: query.start()] and at > query.start():
            query = re.search(r"[?#]", rest[at:])
            return scheme[0] + rest[at + 1 : None if query is None else at + query.start()]
    else:
        query = _SETTING.search(rest)
    rest = rest if query is None else rest[: query.start()]
    return scheme[0] + _without_user(rest)


def _without_user(rest: str) -> str:
    """What follows a scheme, without user info."""
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if not at and _PORT.fullmatch(authority):
        return rest
    if "@" in path and (":" in user or not at):
        # The password has a "/" in it, or a name has an "@": nothing shows which.
        return path.rpartition("@")[2]
    return host + slash + path


def _redact_found(found: re.Match[str]) -> str:
    url = found[0]
    closing = _CLOSING.search(url)
    end = len(url) if closing is None else closing.start()
    links = []
    for link in _LINK.split(url[:end]):
        redacted = _redact_link(link)
        query = re.search(r"[?#]", redacted)
        links.append(redacted if query is None else redacted[: query.start()])
    return "::".join(links) + url[end:]


def _secret_values(options: Any, *, told: bool) -> Iterator[str]:
    if isinstance(options, Mapping):
        for name, value in options.items():
            is_open = _OPEN_NAME.match(str(name)) is not None
            is_secret = told or str(name).lower() in ("headers", "cookies")
            yield from _secret_values(
                value, told=not is_open and (is_secret or bool(_SECRET_NAME.search(str(name))))
            )
    elif isinstance(options, str):
        if told:
            # Of ``Bearer X`` too what comes after the word.
            yield from (options, *options.split(None, 1)[1:])
        elif "@" in options:
            yield from re.findall(r"://[^/@\s]*:([^@\s]+)@", options)
    elif isinstance(options, bytes):
        if told:
            yield options.decode("latin-1")
    elif isinstance(options, list | tuple | set | frozenset):
        # A user and a password, as a named tuple too.
        for value in options:
            yield from _secret_values(value, told=told)
