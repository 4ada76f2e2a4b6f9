"""Writes the SHA-256s of files that were compared into manifests, which loads and ``sha256sum -c`` compare with.

A manifest is written under a temporary name and then renamed, or, in an object store, in one step. What one that is
there lists besides stays.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping

from ..errors import OptionError
from ..stores.base import Store
from ..stores.fsspec import FsspecStore
from ..stores.locate import Located
from ..stores.manifest import FOLDER_SUMS, LIMIT_BYTES, SIDE, manifest_beside, manifest_of, parse_manifest
from ..stores.names import file_name, folder_of
from ..writing.local import replace_small, write_errors


def require_writable(store: Store, described: str) -> None:
    """Raises `OptionError` where nothing can be written beside the checkpoint."""
    if not store.is_local and not isinstance(store, FsspecStore):
        raise OptionError(
            f"{described}: no manifest can be written there: expected a local folder, or a store that fsspec writes to"
        )


def write_manifests(store: Store, located: Located, sums: Mapping[str, str]) -> tuple[str, ...]:
    """Writes manifests of the objects in `sums`, with their SHA-256s as hex digits; returns how messages call them.

    A checkpoint of one file gets ``NAME.sha256``; files of a folder get ``SHA256SUMS`` in the checkpoint's folder, and
    those that a framework keeps above it, in theirs. Raises `AccessError` where the store refuses.
    """
    if located.form == "file" and located.root is None and len(sums) == 1:
        ((name, value),) = sums.items()
        return (_write(store, name + SIDE, manifest_beside(file_name(name), value)),)
    folders: dict[str, dict[str, str]] = {}
    for name, value in sums.items():
        folder = _folder_for(store, located, name)
        folders.setdefault(folder, {})[_relative(store, folder, name)] = value
    return tuple(_merge(store, folder, found) for folder, found in sorted(folders.items()))


def _folder_for(store: Store, located: Located, name: str) -> str:
    if located.form == "folder" and _is_in(store, located.name, name):
        return located.name
    if located.root is not None and _is_in(store, located.root, name):
        return located.root
    return (os.path.dirname(name) or ".") if store.is_local else folder_of(name)


def _is_in(store: Store, folder: str, name: str) -> bool:
    return name.startswith(store.join(folder, ""))


def _relative(store: Store, folder: str, name: str) -> str:
    return os.path.relpath(name, folder) if store.is_local else posixpath.relpath(name, folder)


def _merge(store: Store, folder: str, sums: Mapping[str, str]) -> str:
    name = store.join(folder, FOLDER_SUMS)
    info = store.stat(name)
    kept: dict[str, str] = {}
    if info is not None and not info.is_folder:
        before = parse_manifest(store.read_small(name, LIMIT_BYTES), store.describe(name))
        kept = {one: value.hex() for one, value in before.sums.items()}
    return _write(store, name, manifest_of({**kept, **sums}))


def _write(store: Store, name: str, data: bytes) -> str:
    if isinstance(store, FsspecStore):
        store.write_small(name, data)
    else:
        with write_errors(name):
            replace_small(store.local_path(name), data)
    return store.describe(name)
