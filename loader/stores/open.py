"""Opens the store that a path belongs to.

explicit object_store  →  http(s)  →  any other URI, through fsspec  →  local path
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import OptionError
from .base import Store, path_scheme


def open_store(
    path: str, object_store: object | None = None, storage_options: Mapping[str, Any] | None = None
) -> tuple[Store, str]:
    """The store that `path` (already expanded) belongs to, and the object's name in it.

    No request is made. Raises `OptionError` for an unknown protocol, a backend that is not installed (saying
    how to install it), or an `object_store` that offers no download.
    """
    options = dict(storage_options or {})
    if object_store is not None:
        from .given import open_object_store

        return open_object_store(object_store, path)
    scheme = path_scheme(path)
    if scheme in ("http", "https") and "::" not in path.split("://", 1)[0]:
        from .http import HttpStore

        return HttpStore(options), path
    from .local import LocalStore

    if scheme is None:
        return LocalStore(), path
    if scheme in ("file", "local") and path.startswith(f"{scheme}://"):
        return LocalStore(), _local_part(path)
    from .fsspec import open_fsspec

    return open_fsspec(path, options)


def _local_part(uri: str) -> str:
    path = uri.split("://", 1)[1]
    if not path.startswith("/"):
        host, slash, rest = path.partition("/")
        if host == "localhost":
            return slash + rest
        raise OptionError(
            f"{uri!r}: expected file:///absolute/path or a plain path, got the host {host!r}", path=uri
        )
    return path
