"""Opens fsspec's file systems by URI and options, so that what is the user's goes to its own server alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import OptionError, RankloadError
from ..http.settings import headers_of
from ..redaction import redact_path, redact_text, secrets_in
from ..store_errors import caused_by, store_error
from .base import path_scheme, path_schemes

_EXTRAS = {
    "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs",
    "az": "azure", "abfs": "azure", "abfss": "azure", "adl": "azure", "wasb": "azure", "wasbs": "azure",
    "hf": "hf", "http": "http", "https": "http", "sftp": "sftp", "ssh": "sftp",
}  # fmt: skip
"""The extra of this distribution that installs the backend of a protocol."""
_CHAINED_URL = re.compile(r"::(https?)://[\x21-\x7e]*\Z", re.IGNORECASE)
"""A URL at the end of a chain that needs no percent-encoding."""
_USERS = frozenset({"headers", "cookies", "auth"})
"""Options of fsspec's http, and of its client, that are for the user's own server."""
_ANYBODYS = frozenset({"accept", "accept-encoding", "range", "user-agent", "if-match", "if-none-match"})
"""Headers that any server may be sent."""


def is_protocol(scheme: str) -> bool:
    """Whether fsspec knows a file system of this name."""
    from fsspec import available_protocols

    return scheme in available_protocols()


def open_filesystem(uri: str, storage_options: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system of an fsspec URI, and the object's name in it.

    Raises `OptionError` where there is none of the protocol, or its options or packages do not fit, and what the
    backend's own error means.
    """
    from fsspec.core import url_to_fs

    shown = redact_path(uri)
    secrets = secrets_in(storage_options)
    try:
        filesystem, name = url_to_fs(uri, **_as_given(uri, storage_options))
    except OptionError:
        raise
    except Exception as error:
        ours = caused_by(_unopened(uri, shown, error, secrets), error, secrets)
        raise ours from ours.__cause__
    return filesystem, str(name)


def _unopened(uri: str, shown: str, error: Exception, secrets: frozenset[str]) -> RankloadError:
    """The error for a file system that could not be made."""
    told = redact_text(str(error), secrets)
    if isinstance(error, ImportError):
        return OptionError(f"{shown}: {_how_to_install(uri, told)}", path=shown)
    if isinstance(error, TypeError):
        return OptionError(f"{shown}: storage_options do not fit: {told}", path=shown)
    if isinstance(error, ValueError) and "rotocol" in told:
        return OptionError(
            f"{shown}: unknown protocol {path_scheme(uri)!r}; expected a local path, http(s), "
            "or a protocol that fsspec knows",
            path=shown,
        )
    return store_error(error, shown, secrets=secrets)


def _as_given(uri: str, storage_options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, by which the http(s) part of a chain is sent as it is written: it may be signed to the letter.

    Its headers, cookies and login go to its own server alone.
    """
    options = dict(storage_options)
    for scheme in {"http", "https"} & set(path_schemes(uri)):
        own = options.get(scheme) or {}
        if not isinstance(own, Mapping):
            continue
        match = _CHAINED_URL.search(uri)
        encoded = {"encoded": True} if match is not None and match[1].lower() == scheme else {}
        options[scheme] = {**encoded, **_kept_home(own)}
    return options


def _kept_home(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of fsspec's http by which what is the user's is in the headers of a client that `_client` makes."""
    client = options.get("client_kwargs") or {}
    if not isinstance(client, Mapping) or "get_client" in options:
        return dict(options)
    auth = options.get("auth") or client.get("auth")
    theirs = {name: value for name, value in client.items() if name not in _USERS}
    headers = headers_of(client, options, auth)
    ours = {name: value for name, value in options.items() if name not in _USERS}
    return {**ours, "client_kwargs": {**theirs, "headers": headers}, "get_client": _client}


async def _client(**options: Any) -> Any:
    """The client of fsspec's http. Redirected to another server, it sends none of the headers that are the user's.

    aiohttp itself leaves out Authorization, where it is a header, and nothing else.
    """
    from aiohttp import ClientSession, TraceConfig
    from yarl import URL

    async def redirected(session: Any, context: Any, told: Any) -> None:
        location = told.response.headers.get("Location") or told.response.headers.get("URI") or ""
        if told.url.join(URL(location)).origin() != told.url.origin():
            for name in [name for name in told.headers if name.lower() not in _ANYBODYS]:
                # The next request is sent with what is left.
                told.headers.popall(name, None)

    trace = TraceConfig()
    trace.on_request_redirect.append(redirected)
    return ClientSession(**{**options, "trace_configs": [*options.get("trace_configs", ()), trace]})


def _how_to_install(uri: str, error: str) -> str:
    schemes = path_schemes(uri)
    for scheme in schemes:
        if scheme in _EXTRAS:
            extra = _EXTRAS[scheme]
            return f"reading {scheme}:// needs a package that is missing; pip install 'rankload[{extra}]'"
    return f"a package that {schemes[0] if schemes else 'its protocol'}:// needs is missing: {error}"
