"""Tells whether all files of a checkpoint are there and none was cut short, without reading what they hold.

Each file that the checkpoint consists of is asked for, and of most the last bytes are read: a torch file that was
written to its end has a zip directory there, a tar its end, and a safetensors file is as long as its header says. What
a killed save, a broken copy or a full disk leaves shows in that. Changed bytes inside of a file do not: those are
compared with checksums. Imports no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from .alone import OpenCheckpoint
from .errors import CorruptError, NotFoundError, RankloadError
from .fetch.archive import checked_members_of
from .formats.safetensors import read_safetensors
from .formats.sniff import HEAD_BYTES, KINDS, sniff
from .formats.torch_zip import END_BYTES, check_end, ends_whole
from .http.connections import Connections
from .ranges.objects import ObjectBytes, open_bytes
from .saved.contents import SetFile
from .stores.base import ObjectInfo, Store
from .stores.manifest import find_manifests, key_of, known_sums
from .stores.probes import HEAD_BYTES as PAGE_BYTES
from .stores.probes import ask_each, is_page

AT_ONCE = 8
"""How many objects of a remote store are asked for at once: all of them ought to be there."""
_READ_BYTES = 4 << 10
"""What is read at once where more of a file is looked at."""
_NO_TENSORS = frozenset({"html", "xml", "lfs", "text", "unknown", "empty"})
"""Kinds that no file of a checkpoint is of (`formats.sniff`)."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Fault:
    """A file that is not there, or not whole."""

    file: str
    """As messages call it: its path or URI, without secrets."""
    reason: str
    """What is wrong with it, to follow the file's name: ``is not there``; what was expected, and what there is."""
    state: Literal["missing", "short", "damaged"]
    """``short``: it has fewer bytes than it must, or none; ``damaged``: its ends show that it is not whole."""

    def __str__(self) -> str:
        return f"{self.file} {self.reason}"


def faults_of(opened: OpenCheckpoint) -> tuple[Fault, ...]:
    """The files of the checkpoint that are missing, empty or cut short; none where it is complete.

    Compared are the files in ``opened.saved.files``, and those that a manifest of checksums in the checkpoint's folder
    lists, by what the store says of them and by a few of their bytes. Of a store without ranges, and of files of kinds
    that do not show where they end (compressed ones, torch's format before 1.6), by their sizes alone.

    Not said here: what the checkpoint's own index says about a save that did not end (``opened.saved.unfinished``).

    Raises:
        RankloadError: `AccessError` where the store refuses to say, or cannot be reached; `CorruptError` where an
            object changes meanwhile.
    """
    files, store = opened.files, opened.files.context.store
    wanted = [(files.object_of(one), one) for one in opened.saved.files]
    with contextlib.closing(Connections()) as connections:
        found = ask_all(store, lambda each: fault_in(store, *each, connections), wanted)
        known = {key_of(store, name) for name, _ in wanted}
        listed = {name: by for name, by in listed_files(opened).items() if key_of(store, name) not in known}
        there = ask_all(store, lambda name: stat_surely(store, name), list(listed))
    absent = (
        Fault(store.describe(name), f"is not there, and {by} lists it", "missing")
        for (name, by), info in zip(listed.items(), there, strict=True)
        if info is None
    )
    return (*(one for one in found if one is not None), *absent)


def fault_in(store: Store, name: str, file: SetFile, connections: Connections) -> Fault | None:
    """What is wrong with the object `name`, which is `file` of a checkpoint; None where nothing is.

    Raises as `faults_of`.
    """
    shown = store.describe(name)
    info = stat_surely(store, name)
    if info is None:
        return Fault(shown, "is not there", "missing")
    short = _short(info.size_bytes, file)
    if short is not None:
        return Fault(shown, short, "short")
    try:
        with open_bytes(store, info, connections) as data:
            if data is None:
                return None
            short = _short(data.size_bytes, file)
            if short is not None:
                return Fault(shown, short, "short")
            # Where its index knows how long it must be, its end tells no more.
            cut = _cut(data, shown) if file.least_bytes == 1 else None
    except NotFoundError:
        return Fault(shown, "is not there", "missing")
    return None if cut is None else Fault(shown, cut, "damaged")


def stat_surely(store: Store, name: str) -> ObjectInfo | None:
    """As ``store.stat``; but None for a folder too, and for a page in the place of what is not there."""
    info = store.stat(name)
    if info is None or info.is_folder:
        return None
    if info.certain and not info.may_be_page:
        return info
    try:
        head = store.peek(name, PAGE_BYTES)
        if head is None and not info.certain:
            _fetch_whole(store, info)
    except NotFoundError:
        return None
    return None if head is not None and is_page(head) else info


def reason_of(error: RankloadError, shown: str) -> str:
    """What `error` says of the file that messages call `shown`, without that name."""
    return error.message.removeprefix(shown).removeprefix(":").strip()


def ask_all(store: Store, ask: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """As `ask_each`, for objects that ought all to be there."""
    return ask_each(store, ask, items, at_once=AT_ONCE)


def _fetch_whole(store: Store, info: ObjectInfo) -> None:
    """Raises `NotFoundError` where there is no such object, in a store that tells only by a download."""
    with contextlib.suppress(CorruptError):  # longer than the limit, so it is there
        store.read_small(info.name, _READ_BYTES)


def _short(size: int | None, file: SetFile) -> str | None:
    if size is None or size >= file.least_bytes:
        return None
    at_least = (
        f"expected at least {file.least_bytes:,} bytes" if file.least_bytes > 1 else "expected some bytes"
    )
    return f"is empty: {at_least}" if size == 0 else f"is cut short: {at_least}, got {size:,}"


def _cut(data: ObjectBytes, shown: str) -> str | None:
    """What the ends of a file show to be wrong with it."""
    size = data.size_bytes
    try:
        # A healthy torch file is known by its end alone: that saves a request for its beginning.
        if ends_whole(data.read(max(0, size - END_BYTES), size), size):
            return None
        kind = sniff(data.read(0, HEAD_BYTES))
        if kind == "torch-zip":
            check_end(data.as_file(_READ_BYTES), size, shown)
        elif kind == "safetensors":
            read_safetensors(data.described, size, name=shown, open_file=lambda _: data.as_file())
        elif kind == "tar":
            _check_tar(data, shown)
        elif kind in _NO_TENSORS:
            return f"is {KINDS[kind]}, expected a file of tensors"
    except CorruptError as error:
        if error.path != shown:
            raise
        return f"is damaged: {reason_of(error, shown)}"
    return None


def _check_tar(data: ObjectBytes, shown: str) -> None:
    with data.as_file(_READ_BYTES) as file:
        size = data.size_bytes
        with checked_members_of(file, shown, size=size, limit=size) as (_, members):
            for _ in members:
                pass


def listed_files(opened: OpenCheckpoint) -> dict[str, str]:
    """The objects that a manifest of the checkpoint's folder lists, each with the manifest's name.

    Of a manifest one folder up, where ``latest`` is, those beside it and those of this tag: others come and go.
    """
    files, store = opened.files, opened.files.context.store
    checks, located = files.remote.checks, files.located
    known = checks.known
    if checks.verify == "off":
        known = known_sums(find_manifests(store, located))
    folders = [(located.name, True)] if files.in_folder else []
    if located.root is not None:
        folders.append((located.root, not files.in_folder))
    found: dict[str, str] = {}
    for folder, deep in folders:
        inside = f"{key_of(store, folder).rstrip('/')}/"
        for key, one in known.items():
            relative = key.removeprefix(inside)
            if relative != key and (deep or "/" not in relative):
                found.setdefault(store.join(folder, relative), one.told_by)
    return found
