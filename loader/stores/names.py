"""Takes names of objects apart, and makes names of others from them. Pure.

A name is a local path, a file system's own name (``bucket/key``), or a whole http(s) URL. A URL's query and fragment
are no part of the name: they are carried along as they are (a signature covers them to the letter), and what is added
to the path is percent-encoded, so that a ``#``, ``?`` or ``%`` in it stays a plain character.
"""

from __future__ import annotations

import posixpath
import re
from urllib.parse import quote, unquote

from ..errors import UnsafeError
from ..redaction import redact_path

_URL = re.compile(r"(https?://[^/?#]*)([^?#]*)(.*)", re.IGNORECASE | re.DOTALL)
"""Server, path, and the query with the fragment."""


def is_url(name: str) -> bool:
    """Whether `name` is an http(s) URL."""
    return _URL.match(name) is not None


def has_query(name: str) -> bool:
    """Whether `name` is an http(s) URL with a query, which may be a signature."""
    return "?" in _parts(name)[2].partition("#")[0]


def path_of(name: str) -> str:
    """`name`; of a URL its path, percent-decoded."""
    server, path, _ = _parts(name)
    return unquote(path) if server else path


def file_name(name: str) -> str:
    """The last component of `name`, as a user would write it."""
    return posixpath.basename(path_of(name).rstrip("/"))


def child_of(name: str, child: str) -> str:
    """The name of `child` (may hold ``/``) in the folder `name`; where that is empty, in none."""
    if not name:
        return child
    server, path, rest = _parts(name)
    return f"{server}{path.rstrip('/')}/{_encoded(child) if server else child}{rest}"


def folder_of(name: str) -> str:
    """The name of the folder that the object or folder `name` lies in; empty where it lies in none."""
    server, path, rest = _parts(name)
    folder, slash, _ = path.rstrip("/").rpartition("/")
    # Of a file system whose names begin with a slash, that is its root.
    return f"{server}{folder or ('' if server else slash)}{rest}"


def without_slash(name: str) -> str:
    """`name` without a ``/`` at the end of its path."""
    return with_suffix(name, "")


def with_suffix(name: str, suffix: str) -> str:
    """The name with `suffix` after it."""
    server, path, rest = _parts(name)
    return f"{server}{path.rstrip('/')}{_encoded(suffix) if server else suffix}{rest}"


def url_link_targets(link: str, text: str) -> list[str]:
    """The URLs that `text`, found in the link at the URL `link`, may stand for, the likeliest first.

    Raises `UnsafeError` where it names another server.
    """
    server, path, rest = _parts(link)
    if "://" in text:
        if _parts(text)[0].lower() != server.lower():
            raise UnsafeError(
                f"{redact_path(link)}: the link names another server, {redact_path(text)}",
                path=redact_path(link),
            )
        return [text]
    # Whoever wrote the link may have encoded it.
    spellings = dict.fromkeys([_encoded(text), quote(text, safe="/%")])
    folders = [""] if text.startswith("/") else [path.rpartition("/")[0], ""]
    return list(
        dict.fromkeys(
            f"{server}{folder}/{spelt.lstrip('/')}{rest}" for spelt in spellings for folder in folders
        )
    )


def _parts(name: str) -> tuple[str, str, str]:
    """Server, path and rest of a URL; of any other name the path alone."""
    match = _URL.match(name)
    return ("", name, "") if match is None else (match[1], match[2], match[3])


def _encoded(text: str) -> str:
    return quote(text, safe="/")
