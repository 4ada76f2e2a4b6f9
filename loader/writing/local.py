"""Puts a file in the place of the one before: a kill at any point leaves the old or the new one, whole.

    1  what killed saves left is removed
    2  the file and its manifest are written under temporary names in the same folder, and are on the disk
    3  the old manifest is removed: it fits the old file alone
    4  the new file takes its name, in one step, in which the old one goes
    5  the new manifest takes its name

A kill after 3 leaves a whole file without a manifest, never a file with another one's.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterator

from ..cache.folder import free_bytes_of
from ..errors import AccessError, FormatError, RankloadError
from ..plurals import counted
from ..store_errors import is_disk_full, store_error
from ..stores.base import OnBytes
from ..stores.manifest import SIDE, manifest_beside
from .summed import SummedFile, write_summed

_PART = re.compile(r"\.[0-9a-f]{8}\.part\Z")
_SOME_ROOM = 64 << 10
"""For the manifest, and what the file system keeps itself."""


def part_name(name: str) -> str:
    """A temporary name for `name`, which `remove_parts` recognises."""
    return f"{name}.{uuid.uuid4().hex[:8]}.part"


def is_part_name(name: str) -> bool:
    """Whether `name` is one that `part_name` could have made."""
    return _PART.search(name) is not None


def remove_parts(folder: str, names: Collection[str]) -> None:
    """Removes what killed saves of the files `names` left in `folder`."""
    for path, plain in parts_in(folder):
        if plain in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def parts_in(folder: str) -> list[tuple[str, str]]:
    """What is called as `part_name` calls it in `folder`: paths, and the names that they were to get."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return [(one.path, _PART.sub("", one.name)) for one in entries if _PART.search(one.name)]
    return []


def replace_file(
    path: str, write: Callable[[SummedFile], None], *, needed_bytes: int, on_bytes: OnBytes
) -> None:
    """Writes the file `path` and its manifest ``PATH.sha256``; the folder is made where it is missing.

    A link at `path` is replaced, and what it points to stays. `needed_bytes` is what the file has at least.

    Raises `AccessError` where there is no room or the permissions refuse, `FormatError` where `path` is a folder, and
    what `write` and `on_bytes` raise. Until the last step but one the old file is as it was.
    """
    folder, name = os.path.split(path)
    folder = folder or "."
    with write_errors(path):
        if os.path.isdir(path) or not name:
            raise FormatError(f"{path} is a folder, expected the name of a file to write", path=path)
        os.makedirs(folder, exist_ok=True)
        remove_parts(folder, (name, name + SIDE))
        check_room(folder, needed_bytes, path)
        part, manifest_part = (os.path.join(folder, part_name(one)) for one in (name, name + SIDE))
        try:
            digest = write_summed(part, write, on_bytes)
            write_small(manifest_part, manifest_beside(name, digest))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + SIDE)
            sync_folder(folder)
            os.replace(part, path)
            sync_folder(folder)
            os.replace(manifest_part, path + SIDE)
            sync_folder(folder)
        finally:
            for one in (part, manifest_part):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(one)


def write_small(path: str, data: bytes) -> None:
    """Makes the file `path`, which is on the disk when this returns."""
    write_summed(path, lambda file: _write_all(file, data), lambda _: None)


def replace_small(path: str, data: bytes) -> None:
    """Writes a small file, in one step in the place of the one before."""
    part = part_name(path)
    try:
        write_small(part, data)
        os.replace(part, path)
        sync_folder(os.path.dirname(path) or ".")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def sync_folder(folder: str) -> None:
    """Has the names in `folder` on the disk, where its file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def check_room(folder: str, needed_bytes: int, described: str, remedy: str = "") -> None:
    """Raises `AccessError` where the disk of `folder` has less than `needed_bytes` left."""
    free = free_bytes_of(folder)
    if free < needed_bytes + _SOME_ROOM:
        raise AccessError(
            f"{described} needs at least {counted(needed_bytes, 'byte')}, and the disk of {folder} has {free:,} left: "
            f"make room{remedy}. The checkpoint before, which stays until the new one is whole, is as it was",
            path=described,
        )


@contextlib.contextmanager
def write_errors(described: str) -> Iterator[None]:
    """Raises OSErrors of the block as rankload's, about the file or folder `described`."""
    try:
        yield
    except RankloadError:
        raise
    except PermissionError as error:
        raise AccessError(
            f"{described}: this user may not write it ({error.strerror}); check the permissions of the folder and of "
            "those above it",
            path=described,
        ) from error
    except OSError as error:
        if is_disk_full(error):
            raise AccessError(
                f"{described}: the disk is full ({error.strerror}): make room. The checkpoint before is as it was",
                path=described,
            ) from error
        raise store_error(error, described, "written") from error


def _write_all(file: SummedFile, data: bytes) -> None:
    file.write(data)
