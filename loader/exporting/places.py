"""Puts an export's files where they go, so that a kill at any point leaves no folder that looks whole.

    on this node   1  files and the small ones are written under temporary names in the folder, and are on the disk
                   2  of an export before, what a reader begins with is removed, and then the rest
                   3  files take their names; the one that a reader begins with is last, and the manifest after it
    remote         1  of an export before, the same is removed
                   2  files are written to the node's temporary folder, one at a time, and uploaded
                   3  the one that a reader begins with, and the manifest after it

So on this node an export before stays until the new one is on the disk; in a store it does not.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ..errors import OptionError, RankloadError
from ..plurals import counted
from ..store_errors import store_error
from ..stores.fsspec import FsspecStore
from ..stores.local import LocalStore
from ..stores.locate import DCP_METADATA, LATEST, MODEL_FILES, MODEL_STATES
from ..stores.manifest import FOLDER_SUMS, manifest_of
from ..stores.names import file_name
from ..writing.local import check_room, part_name, parts_in, sync_folder, write_errors, write_small
from ..writing.remote import make_folder, remove_folders
from ..writing.summed import SummedFile, write_summed

FIRST_FILES = (DCP_METADATA, *MODEL_FILES)
"""What a reader of an export begins with; ``model.safetensors`` may be all there is."""
_OURS = re.compile(
    r"model(-\d{5}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json|__\d+_\d+\.distcp|\.metadata"
    r"|training_state\.pt|SHA256SUMS"
)
"""Names of files that an export writes, and that one that replaces another removes."""
_TAKEN_FIRST = frozenset({LATEST, *MODEL_STATES, "pytorch_model_fsdp_0"})
"""What a load takes before any export that lies beside it."""
_SHOWN = 4


@dataclass(frozen=True)
class WrittenFile:
    """A file of an export."""

    name: str
    bytes: int
    sha256: str


class Place(Protocol):
    """The folder that an export is written to."""

    @property
    def described(self) -> str:
        """For messages, without secrets."""

    def begin(self, needed_bytes: int, largest_bytes: int, *, force: bool) -> None:
        """Makes sure that there is room for all files, and for the largest, and that the folder is empty.

        With `force` it may hold an export. Raises `OptionError` where it holds anything else, `AccessError` where it
        cannot be written.
        """

    def put(self, name: str, write: Callable[[SummedFile], None], needed_bytes: int) -> None:
        """Writes the file `name`, of about `needed_bytes`; one that this export has written is replaced.

        Raises what `write` raises, and `AccessError`.
        """

    def finish(self, small: Mapping[str, bytes]) -> tuple[WrittenFile, ...]:
        """Ends the export with the `small` files, in their order, and a manifest; returns all files but that."""

    def abandon(self) -> None:
        """Removes what an export that failed has written."""


def place_of(store: LocalStore | FsspecStore, name: str) -> Place:
    """The folder `name` of `store`."""
    return LocalPlace(name) if isinstance(store, LocalStore) else RemotePlace(store, name)


class LocalPlace:
    """A folder on this node."""

    def __init__(self, folder: str) -> None:
        self.described = folder
        self._folder = folder
        self._parts: dict[str, str] = {}
        """Final name to the temporary file's."""
        self._files: list[WrittenFile] = []
        self._made = False

    def begin(self, needed_bytes: int, largest_bytes: int, *, force: bool) -> None:
        with write_errors(self._folder):
            if os.path.lexists(self._folder) and not os.path.isdir(self._folder):
                raise OptionError(f"{self._folder} is a file, expected the name of a folder to write")
            self._made = not os.path.isdir(self._folder)
            os.makedirs(self._folder, exist_ok=True)
            left = [path for path, plain in parts_in(self._folder) if _OURS.fullmatch(plain)]
            there = [
                name
                for name in sorted(os.listdir(self._folder))
                if os.path.join(self._folder, name) not in left
            ]
            _check_empty(self.described, there, force=force)
            for path in left:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            check_room(self._folder, needed_bytes, self.described)

    def put(self, name: str, write: Callable[[SummedFile], None], needed_bytes: int) -> None:
        with write_errors(os.path.join(self._folder, name)):
            if name in self._parts:
                os.unlink(self._parts[name])
            part = self._part(name)
            digest = write_summed(part, write, lambda _: None)
            _note(self._files, WrittenFile(name, os.path.getsize(part), digest))

    def finish(self, small: Mapping[str, bytes]) -> tuple[WrittenFile, ...]:
        for name, data in small.items():
            self.put(name, _writes(data), len(data))
        files = tuple(self._files)
        with write_errors(self._folder):
            write_small(self._part(FOLDER_SUMS), manifest_of({one.name: one.sha256 for one in files}))
            old = [name for name in os.listdir(self._folder) if _OURS.fullmatch(name)]
            for name in _in_order_of_removal(old):
                os.unlink(os.path.join(self._folder, name))
            sync_folder(self._folder)
            for name in list(self._parts):
                os.rename(self._parts[name], os.path.join(self._folder, name))
                del self._parts[name]
                sync_folder(self._folder)
        return files

    def abandon(self) -> None:
        for part in self._parts.values():
            with contextlib.suppress(OSError):
                os.unlink(part)
        if self._made:
            with contextlib.suppress(OSError):
                os.rmdir(self._folder)

    def _part(self, name: str) -> str:
        self._parts[name] = os.path.join(self._folder, part_name(name))
        return self._parts[name]


class RemotePlace:
    """A folder of a store that fsspec writes to."""

    def __init__(self, store: FsspecStore, folder: str) -> None:
        self.described = store.describe(folder)
        self._store = store
        self._folder = folder.rstrip("/")
        self._files: list[WrittenFile] = []

    def begin(self, needed_bytes: int, largest_bytes: int, *, force: bool) -> None:
        there = self._names()
        _check_empty(self.described, there, force=force)
        remove_folders(self.described)
        # Whether the largest file fits is better known before the first is uploaded.
        shutil.rmtree(make_folder(self.described, largest_bytes), ignore_errors=True)
        for name in _in_order_of_removal([name for name in there if _OURS.fullmatch(name)]):
            self._store.remove(self._store.join(self._folder, name))

    def put(self, name: str, write: Callable[[SummedFile], None], needed_bytes: int) -> None:
        folder = make_folder(self.described, needed_bytes)
        try:
            path = os.path.join(folder, "object")
            with write_errors(path):
                digest = write_summed(path, write, lambda _: None)
                size = os.path.getsize(path)
            self._store.upload(path, self._store.join(self._folder, name), lambda _: None)
            _note(self._files, WrittenFile(name, size, digest))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self, small: Mapping[str, bytes]) -> tuple[WrittenFile, ...]:
        for name, data in small.items():
            self.put(name, _writes(data), len(data))
        files = tuple(self._files)
        sums = manifest_of({one.name: one.sha256 for one in files})
        self._store.write_small(self._store.join(self._folder, FOLDER_SUMS), sums)
        return files

    def abandon(self) -> None:
        # The index, which was written last, goes first: without it nothing looks whole.
        for one in reversed(self._files):
            with contextlib.suppress(RankloadError):
                self._store.remove(self._store.join(self._folder, one.name))

    def _names(self) -> list[str]:
        try:
            files = self._store.files()
            files.invalidate_cache()
            found = files.ls(self._folder, detail=False) if files.exists(self._folder) else []
        except FileNotFoundError:
            return []
        except Exception as error:
            mapped = store_error(error, self.described, "listed")
            raise mapped from mapped.__cause__
        own = self._folder.rpartition("/")[2]
        return sorted({file_name(str(one).rstrip("/")) for one in found} - {"", own})


def _note(files: list[WrittenFile], written: WrittenFile) -> None:
    """Adds `written` to `files`, in the place of one of its name."""
    for at, one in enumerate(files):
        if one.name == written.name:
            files[at] = written
            return
    files.append(written)


def _writes(data: bytes) -> Callable[[SummedFile], None]:
    def write(file: SummedFile) -> None:
        file.write(data)

    return write


def _check_empty(described: str, there: list[str], *, force: bool) -> None:
    """Raises `OptionError` where the folder may not be written to, given the names of what is `there`."""
    if not there:
        return
    shown = ", ".join(there[:_SHOWN]) + (", ..." if len(there) > _SHOWN else "")
    if not force:
        raise OptionError(
            f"{described} is not empty ({counted(len(there), 'entry', 'entries')}: {shown}): name another folder, or "
            "pass --force (force=True), which replaces an export that is there and leaves other files as they are"
        )
    if not _TAKEN_FIRST & {*there}:
        return
    raise OptionError(
        f"{described} holds another checkpoint ({shown}), which a load would take in place of the export: name another "
        "folder"
    )


def _in_order_of_removal(names: list[str]) -> list[str]:
    """The manifest first, which fits the old files alone; then what a reader begins with; then the rest."""
    return sorted(names, key=lambda name: (name != FOLDER_SUMS, name not in FIRST_FILES, name))
