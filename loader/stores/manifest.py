"""Reads the files of checksums that lie next to a checkpoint, in the format that ``sha256sum`` writes and checks.

    <64 hex digits>  name        two blanks, or a blank and ``*`` for binary
    \\<64 hex digits>  na\\nme     a name with ``\\\\``, ``\\n`` or ``\\r`` in it
    SHA256 (name) = <64 hex digits>
    <64 hex digits>              alone, in ``NAME.sha256``: of ``NAME``

Blank lines and lines that begin with ``#`` are left out. `find_manifests` looks for them on one rank, and `known_sums`
decodes on every rank what it found; `parse_manifest` parses one, and `manifest_of` makes one.
"""

from __future__ import annotations

import os
import posixpath
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import AccessError, CorruptError, FormatError, NotFoundError, RankloadError, StalledError
from ..retries import waiting_at_most
from ..store_errors import refusals_in
from .base import ObjectInfo, Store
from .first_answers import AsksFirst
from .locate import Located
from .names import child_of, file_name, folder_of, has_query, is_url, path_of
from .probes import AT_ONCE, ask_each, is_page

T = TypeVar("T")
NAMES = ("MANIFEST", "MANIFEST.sha256", "SHA256SUMS", "sha256sum.txt", "checksums.sha256")
"""What is looked for in a checkpoint's folder, in this order; and ``NAME.sha256`` next to a single file ``NAME``."""
SIDE = ".sha256"
"""The end of the name of a single file's manifest."""
FOLDER_SUMS = "SHA256SUMS"
"""The manifest that a save writes into a folder."""
_ANY_KIND = "MANIFEST"
"""A name that files of other kinds have too: one that is no manifest is left out, and noted in the receipt."""
LIMIT_BYTES = 4 << 20
_FIRST_BYTES = 64 << 10
"""What is asked for first of one: mostly all of it."""
OPTIONAL_S = 10.0
"""For how long, all together, a store that fails is asked for manifests: a load can go on without them."""
ONCE_MORE_S = 2.0
"""The same once more, after the store has answered for the checkpoint itself."""
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
_TAGGED = re.compile(r"(\\?)SHA256 \((.+)\) = ([0-9a-fA-F]{64})", re.DOTALL)
_ALONE = re.compile(rb"[0-9a-fA-F]{64}")
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}
_ESCAPED = {char: escape for escape, char in _ESCAPES.items()}


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


@dataclass(frozen=True)
class _Failed:
    """A manifest that may be there, and could not be read."""

    error: RankloadError


@dataclass(frozen=True)
class Looked:
    """What a store had of manifests by names that they may have."""

    found: Mapping[str, Manifest | _Failed | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def look_for_manifests(
    store: Store, name: str, *, is_file: bool, required: bool = False, at_once: int = AT_ONCE
) -> Looked:
    """Reads the manifests next to what `name` probably is, a file or a folder, for `find_manifests`.

    For a caller who finds out at the same time what it is. What fails is left to `find_manifests`.
    """
    notes: list[str] = []
    likely = Located("file" if is_file else "folder", name, name)
    try:
        names = _candidates(store, likely, NAMES)
        found = _look(store, names, None if required else OPTIONAL_S, notes, at_once)
    except RankloadError:
        return Looked()
    return Looked(found, tuple(notes))


def find_manifests(
    store: Store,
    located: Located,
    *,
    only_beside: bool = False,
    required: bool = False,
    looked: Sequence[Looked] = (),
) -> dict[str, Any]:
    """Reads the manifests next to the checkpoint; one rank calls it, for all.

    With `only_beside`, only the one of a single file ``NAME``, which is ``NAME.sha256``. Those that were `looked` for
    before are not asked for again.

    A store that fails is asked for `OPTIONAL_S`. Then the checkpoint itself is asked for, and waited for as anything
    is: an outage of the store is waited out so. What still fails when that has answered is left out, and noted. With
    `required`, each manifest is waited for as anything is, and what fails then is raised.

    Returns JSON for `known_sums`: ``sums`` by `key_of`, and ``notes`` for the receipt. Looks in the folder of the
    checkpoint's first file, and where ``latest`` named that, in the one above. Raises `FormatError` as
    `parse_manifest` does, and what the store raises where a manifest is there and it refuses to give it.
    """
    sums: dict[str, tuple[str, str]] = {}
    candidates = _candidates(store, located, () if only_beside else NAMES)
    told: dict[str, Manifest | _Failed | None] = {}
    notes: list[str] = []
    for each in looked:
        if each.found.keys() <= set(candidates):
            told.update(each.found)
            notes += each.notes
    told |= _look(
        store, [name for name in candidates if name not in told], None if required else OPTIONAL_S, notes
    )
    found = {name: told[name] for name in candidates}
    failed = [name for name, one in found.items() if isinstance(one, _Failed)]
    if failed:
        _await_answer(store, located.first)
        found |= _look(store, failed, ONCE_MORE_S, notes)
    for name, one in found.items():
        if isinstance(one, _Failed):
            notes.append(
                f"{store.describe(name)} could not be read, so nothing was compared with it: {one.error.message}"
            )
        elif one is not None:
            for inside, value in one.sums.items():
                key = key_of(store, _in_folder(store, name, inside))
                sums.setdefault(key, (value.hex(), file_name(name)))
    return {"sums": sums, "notes": notes}


def _look(
    store: Store,
    names: Sequence[str],
    within_s: float | None,
    notes: list[str],
    at_once: int = AT_ONCE,
) -> dict[str, Manifest | _Failed | None]:
    """The manifests `names`, as far as they are there. Without `within_s`, what fails is raised."""
    until = None if within_s is None else time.monotonic() + within_s

    def patient(ask: Callable[[], T], is_passed_over: Callable[[RankloadError], bool]) -> T | _Failed:
        try:
            if until is None:
                return ask()
            with waiting_at_most(until - time.monotonic()):
                return ask()
        except StalledError:
            raise  # It has been waited for as long as anything is.
        except RankloadError as error:
            if not is_passed_over(error):
                raise
            if until is None:
                error.message += (
                    ". It may hold checksums, which were asked for: without verify, a load goes on without them after "
                    f"{OPTIONAL_S:.0f} s, and its receipt says so"
                )
                raise
            return _Failed(error)

    def stat(name: str) -> ObjectInfo | _Failed | None:
        return patient(lambda: _stat(store, name), lambda _: True)

    def read(info: ObjectInfo) -> Manifest | _Failed | None:
        return patient(
            lambda: _read(store, info, notes),
            lambda error: (
                is_url(info.name) and isinstance(error, AccessError | CorruptError) and not refusals_in(error)
            ),
        )

    told = ask_each(store, stat, names, at_once=at_once)
    return {
        name: read(info) if isinstance(info, ObjectInfo) else info
        for name, info in zip(names, told, strict=True)
    }


def _await_answer(store: Store, name: str) -> None:
    """Waits until the store says anything about `name`, as long as it is waited for."""
    if isinstance(store, AsksFirst):
        store.forget(name)  # what it answered before says nothing of now
    try:
        store.stat(name)
    except AccessError as error:
        if not refusals_in(error):
            raise


def known_sums(found: Mapping[str, Any]) -> dict[str, KnownSum]:
    """What `find_manifests` found, by `key_of`."""
    return {key: KnownSum(bytes.fromhex(value), label) for key, (value, label) in found["sums"].items()}


def key_of(store: Store, name: str) -> str:
    """The same text for all ways to write the name of one object."""
    return os.path.realpath(name) if store.is_local else posixpath.normpath(path_of(name))


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


def manifest_of(sums: Mapping[str, str]) -> bytes:
    """A manifest of files by name, with their SHA-256s as hex digits; `parse_manifest` and ``sha256sum`` read it."""
    lines = []
    for name, value in sorted(sums.items()):
        escaped = re.sub(r"[\\\n\r]", lambda found: _ESCAPED[found[0]], name)
        lines.append(f"{chr(92) if escaped != name else ''}{value}  {escaped}\n")
    return "".join(lines).encode()


def manifest_beside(name: str, value: str) -> bytes:
    """The manifest ``NAME.sha256``: of the name too, where that is text."""
    try:
        return manifest_of({name: value})
    except UnicodeEncodeError:
        return f"{value}\n".encode()


def _candidates(store: Store, located: Located, names: Sequence[str]) -> list[str]:
    first = located.first
    if has_query(first):
        return []  # it may be a signature, which is of no use for other names
    if located.form == "file":
        return [_in_folder(store, first, name) for name in (file_name(first) + SIDE, *names)]
    inside = [store.join(located.name, name) for name in names]
    if not located.by_latest or located.tag is None:
        return inside
    below = located.name
    for _ in located.tag.split("/")[1:]:
        below = folder_of(below)
    return [*inside, *(_in_folder(store, below, name) for name in names)]


def _stat(store: Store, name: str) -> ObjectInfo | None:
    try:
        if isinstance(store, AsksFirst) and not is_url(name):
            # What would be two answers of S3 where it is not there, and two where it is, is one.
            store.ask_ahead(name, _FIRST_BYTES)
        info = store.stat(name)
    except RankloadError as error:
        # Some stores refuse access to what is not there, to users who may not list.
        if not refusals_in(error):
            raise
        return None
    return info if info is not None and info.certain and not info.is_folder else None


def _read(store: Store, info: ObjectInfo, notes: list[str]) -> Manifest | None:
    described = store.describe(info.name)
    any_kind = file_name(info.name) == _ANY_KIND
    # Some servers answer 200 to every name, with a page or with anything else.
    any_answer = is_url(info.name)
    too_long = info.size_bytes is not None and info.size_bytes > LIMIT_BYTES
    if too_long and not any_kind and not any_answer:
        raise FormatError(
            f"{described}: expected checksums of at most {LIMIT_BYTES} bytes, got {info.size_bytes}",
            path=described,
        )
    try:
        data = b"" if too_long else store.read_small(info.name, LIMIT_BYTES)
    except (AccessError, CorruptError, NotFoundError) as error:
        if not any_answer or (isinstance(error, AccessError) and not refusals_in(error)):
            raise
        notes.append(f"{described} could not be read as a list of checksums, and was not used")
        return None
    if (too_long or any_kind or (any_answer and _is_no_list(data))) and not is_manifest(data):
        notes.append(f"{described} is not in sha256sum's format, and was not used")
        return None
    alone = data.strip()
    if _ALONE.fullmatch(alone) and file_name(info.name).endswith(SIDE):
        # As many tools write it: the file beside it is meant.
        return Manifest(described, {file_name(info.name).removesuffix(SIDE): bytes.fromhex(alone.decode())})
    return parse_manifest(data, described)


def _is_no_list(data: bytes) -> bool:
    """Whether this is a page, a JSON document or no text at all, as no damaged list of checksums is."""
    return is_page(data) or data.lstrip().startswith((b"<", b"{", b"[")) or b"\0" in data


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
    folder = folder_of(other)
    return child_of(folder, name) if folder else name
