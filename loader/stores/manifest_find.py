"""Finding the checksums that lie beside a checkpoint. One rank asks, for all; nothing is listed."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from ..errors import FormatError, RankloadError
from .base import ObjectInfo, Store
from .fsspec import ONE_CONNECTION
from .locate import Located
from .manifest import LIMIT_BYTES, NAMES, Manifest, is_manifest, parse_manifest

_ANY_KIND = "MANIFEST"
"""A name that files of other kinds have too."""
_SIDE = ".sha256"
_AT_ONCE = 6


@dataclass(frozen=True)
class KnownSum:
    """What a manifest tells of one object."""

    sha256: bytes
    told_by: str
    """The manifest's own name, without its folder."""


def find_manifests(store: Store, located: Located) -> dict[str, Any]:
    """What lies beside the checkpoint, as JSON for `known_sums`: ``sums`` by key, and ``notes`` for the receipt.

    In the folder of the checkpoint's first file, and where ``latest`` named that, in the one above. Raises
    `FormatError` as `parse_manifest` does, and what the store raises when one that is there can't be read.
    """
    sums: dict[str, tuple[str, str]] = {}
    notes: list[str] = []
    candidates = _candidates(store, located)
    for info in _stat_all(store, candidates):
        if info is None:
            continue
        manifest = _read(store, info, notes)
        if manifest is not None:
            label = posixpath.basename(_path_of(store, info.name))
            for name, value in manifest.sums.items():
                sums.setdefault(key_of(store, _in_folder(store, info.name, name)), (value.hex(), label))
    return {"sums": sums, "notes": notes}


def known_sums(found: Mapping[str, Any]) -> dict[str, KnownSum]:
    """By `key_of`."""
    return {key: KnownSum(bytes.fromhex(value), label) for key, (value, label) in found["sums"].items()}


def key_of(store: Store, name: str) -> str:
    """One text for all ways to write an object's name."""
    path = _path_of(store, name)
    return os.path.realpath(path) if store.is_local else posixpath.normpath(path)


def _candidates(store: Store, located: Located) -> list[str]:
    if urlsplit(located.first).query and _is_url(located.first):
        return []  # it may be a signature, which is of no use for other names
    first = located.first
    if located.form == "file":
        own = [_in_folder(store, first, posixpath.basename(_path_of(store, first)) + _SIDE)]
        return [*own, *(_in_folder(store, first, name) for name in NAMES)]
    beside = [store.join(located.name, name) for name in NAMES]
    above = [_in_folder(store, located.name, name) for name in NAMES] if located.by_latest else []
    return [*beside, *above]


def _stat_all(store: Store, names: list[str]) -> list[ObjectInfo | None]:
    """Side by side, but where each thread would have to log in."""
    if store.is_local or getattr(store, "protocol", "") in ONE_CONNECTION:
        return [_stat(store, name) for name in names]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(lambda name: _stat(store, name), names))


def _stat(store: Store, name: str) -> ObjectInfo | None:
    try:
        info = store.stat(name)
    except RankloadError:
        # Some stores answer so for what is not there, to those who may not list.
        return None
    return info if info is not None and info.certain and not info.is_folder else None


def _read(store: Store, info: ObjectInfo, notes: list[str]) -> Manifest | None:
    described = store.describe(info.name)
    any_kind = posixpath.basename(_path_of(store, info.name)) == _ANY_KIND
    too_long = info.size_bytes is not None and info.size_bytes > LIMIT_BYTES
    if too_long and not any_kind:
        raise FormatError(
            f"{described}: expected checksums of at most {LIMIT_BYTES} bytes, got {info.size_bytes}",
            path=described,
        )
    data = b"" if too_long else store.read_small(info.name, LIMIT_BYTES)
    if any_kind and not is_manifest(data):
        notes.append(f"{described} is not in sha256sum's format, and was not used")
        return None
    return parse_manifest(data, described)


def _in_folder(store: Store, beside: str, name: str) -> str:
    """The object `name` in the folder that `beside` lies in."""
    if store.is_local:
        return os.path.join(os.path.dirname(beside), name)
    if _is_url(beside):
        return store.join(urlunsplit(urlsplit(beside)._replace(path=_folder(urlsplit(beside).path))), name)
    folder, slash, _ = beside.rstrip("/").rpartition("/")
    return f"{folder}{slash}{name}"


def _folder(path: str) -> str:
    return path.rstrip("/").rpartition("/")[0]


def _path_of(store: Store, name: str) -> str:
    return unquote(urlsplit(name).path) if _is_url(name) else name


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))
