"""Opens the store that a path belongs to.

explicit object_store  →  http(s)  →  any other URI, through fsspec  →  local path

What has no ``://`` is a local path first of all: ``run::1/last.ckpt`` is a chain of protocols only where there is no
such file, and ``run`` is a protocol. ``~`` is the home folder, unless there is a file of that name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..retries import Outages
from .base import Heard, Store, path_scheme, unheard
from .local import LocalStore, file_uri_path


def open_store(
    path: str,
    object_store: object | None = None,
    storage_options: Mapping[str, Any] | None = None,
    heard: Heard = unheard,
    outages: Outages | None = None,
) -> tuple[Store, str]:
    """The store that `path` (already expanded) belongs to, and the object's name in it.

    No request is made, unless a backend asks for its credentials. `heard` is called here and by the store whenever it
    waits; `outages` are those of the call that it is for. Raises `OptionError` for an unknown protocol, a backend that
    is not installed (saying how to install it), or an `object_store` that offers no download, and `AccessError` where
    a backend's credentials cannot be had.
    """
    options = dict(storage_options or {})
    if object_store is not None:
        from .given import open_object_store

        return open_object_store(object_store, path, heard, outages)
    scheme = path_scheme(path)
    if scheme in ("http", "https") and "::" not in path.split("://", 1)[0]:
        from .http import HttpStore

        return HttpStore(options, heard, outages), path
    if "://" not in path and os.path.lexists(path):
        return LocalStore(), path
    local = file_uri_path(path)
    if local is not None:
        return LocalStore(), local
    if scheme is None:
        return LocalStore(), os.path.expanduser(path)
    from .filesystems import is_protocol
    from .fsspec import open_fsspec

    if "://" not in path and not is_protocol(scheme):
        return LocalStore(), path
    return open_fsspec(path, options, heard, outages)
