"""Reads the files of checksums that lie next to a checkpoint, in the format that ``sha256sum`` writes and checks.

    <64 hex digits>  name        two blanks, or a blank and ``*`` for binary
    \\<64 hex digits>  na\\nme     a name with ``\\\\``, ``\\n`` or ``\\r`` in it
    SHA256 (name) = <64 hex digits>

Blank lines and lines that begin with ``#`` are left out. `find_manifests` looks for them on one rank, and `known_sums`
decodes on every rank what it found; `parse_manifest` parses one.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from ..errors import FormatError, RankloadError
from .base import ObjectInfo, Store
from .fsspec import ONE_CONNECTION
from .locate import Located

NAMES = ("MANIFEST", "MANIFEST.sha256", "SHA256SUMS", "sha256sum.txt", "checksums.sha256")
"""What is looked for in a checkpoint's folder, in this order; and ``NAME.sha256`` next to a single file ``NAME``."""
_SIDE = ".sha256"
_ANY_KIND = "MANIFEST"
"""A name that files of other kinds have too: one that is no manifest is left out, and noted in the receipt."""
LIMIT_BYTES = 4 << 20
_AT_ONCE = 6
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
_TAGGED = re.compile(r"(\\?)SHA256 \((.+)\) = ([0-9a-fA-F]{64})", re.DOTALL)
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


@dataclass(frozen=True)
class Manifest:
    """SHA-256s by file name, relative to the folder that the manifest lies in."""

    described: str
    """The manifest, for messages."""
    sums: Mapping[str, bytes]


@dataclass(frozen=True)
class KnownSum:
    """What a manifest states of one object."""

    sha256: bytes
    told_by: str
    """The manifest's own name, without its folder."""


def find_manifests(store: Store, located: Located) -> dict[str, Any]:
    """Reads the manifests next to the checkpoint; one rank calls it, for all.

    Returns JSON for `known_sums`: ``sums`` by `key_of`, and ``notes`` for the receipt. Looks in the folder of the
    checkpoint's first file, and where ``latest`` named that, in the one above. Raises `FormatError` as
    `parse_manifest` does, and what the store raises where a manifest is there and cannot be read.
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
    """What `find_manifests` found, by `key_of`."""
    return {key: KnownSum(bytes.fromhex(value), label) for key, (value, label) in found["sums"].items()}


def key_of(store: Store, name: str) -> str:
    """The same text for all ways to write the name of one object."""
    path = _path_of(store, name)
    return os.path.realpath(path) if store.is_local else posixpath.normpath(path)


def is_manifest(data: bytes) -> bool:
    """Whether the first line that is not left out is one of a manifest's."""
    first = next((line for line in _lines(data.decode("utf-8", "replace"))), "")
    return _parse(first) is not None


def parse_manifest(data: bytes, described: str) -> Manifest:
    """The manifest that `data` holds. Names that lead out of its folder are left out.

    Raises `FormatError` where a line is none of the format's, or two lines differ about one file.
    """
    sums: dict[str, bytes] = {}
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{described}: expected lines as sha256sum writes them, got {error}", path=described
        ) from None
    for line in _lines(text):
        parsed = _parse(line)
        if parsed is None:
            raise FormatError(
                f"{described}: expected lines as sha256sum writes them (64 hex digits, two blanks, a name), got "
                f"{line[:80]!r}; mend it, take it away, or load with verify='off'",
                path=described,
            )
        name, value = parsed
        plain = posixpath.normpath(name)
        if plain.startswith(("/", "../")) or plain in (".", ".."):
            continue
        if sums.setdefault(plain, value) != value:
            raise FormatError(f"{described}: has two different checksums of {plain!r}", path=described)
    return Manifest(described, sums)


def _candidates(store: Store, located: Located) -> list[str]:
    if urlsplit(located.first).query and _is_url(located.first):
        return []  # it may be a signature, which is of no use for other names
    first = located.first
    if located.form == "file":
        own = [_in_folder(store, first, posixpath.basename(_path_of(store, first)) + _SIDE)]
        return [*own, *(_in_folder(store, first, name) for name in NAMES)]
    inside = [store.join(located.name, name) for name in NAMES]
    above = [_in_folder(store, located.name, name) for name in NAMES] if located.by_latest else []
    return [*inside, *above]


def _stat_all(store: Store, names: list[str]) -> list[ObjectInfo | None]:
    """What the store says of each name; in parallel, except where each thread would have to log in."""
    if store.is_local or getattr(store, "protocol", "") in ONE_CONNECTION:
        return [_stat(store, name) for name in names]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(lambda name: _stat(store, name), names))


def _stat(store: Store, name: str) -> ObjectInfo | None:
    try:
        info = store.stat(name)
    except RankloadError:
        # Some stores refuse access to what is not there, to users who may not list.
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


def _lines(text: str) -> list[str]:
    lines = (line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n"))
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _parse(line: str) -> tuple[str, bytes] | None:
    match = _LINE.fullmatch(line)
    if match is not None:
        escaped, value, name = match.groups()
    else:
        match = _TAGGED.fullmatch(line)
        if match is None:
            return None
        escaped, name, value = match.groups()
    if escaped:
        name = re.sub(r"\\[\\nr]", lambda found: _ESCAPES[found[0]], name)
    return name, bytes.fromhex(value)


def _in_folder(store: Store, other: str, name: str) -> str:
    """The object `name` in the folder that the object `other` lies in."""
    if store.is_local:
        return os.path.join(os.path.dirname(other), name)
    if _is_url(other):
        return store.join(urlunsplit(urlsplit(other)._replace(path=_folder(urlsplit(other).path))), name)
    folder, slash, _ = other.rstrip("/").rpartition("/")
    return f"{folder}{slash}{name}"


def _folder(path: str) -> str:
    return path.rstrip("/").rpartition("/")[0]


def _path_of(store: Store, name: str) -> str:
    return unquote(urlsplit(name).path) if _is_url(name) else name


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))
