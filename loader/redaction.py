"""Takes secrets out of paths and messages: user info, and queries of http(s) URLs, which may be signatures. Pure."""

from __future__ import annotations

import re

_USER_INFO = re.compile(r"(?<=://)[^/?#]*@")
_HTTP_QUERY = re.compile(r"(https?://[^?#]*)[?#].*", re.IGNORECASE | re.DOTALL)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>\\)?#]+)([?#][^\s'\"<>\\)]*)?")


def redact_path(path: str) -> str:
    """`path`, of whatever kind, without user info, and an http(s) URL without its query and fragment.

    Takes chains (``simplecache::https://...``) and templates too. The query of other URIs stays: ``?`` and ``#`` may be
    part of an object's name there.
    """
    return _HTTP_QUERY.sub(r"\1", _USER_INFO.sub("", path))


def redact_text(text: str) -> str:
    """`text` with every URL in it, of whatever kind, without user info, query and fragment."""
    return _URL.sub(lambda match: _USER_INFO.sub("", match[1]), text)
