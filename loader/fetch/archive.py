"""Unpacks tars from untrusted sources, plain or compressed, so that nothing is written outside their folder.

Files, folders and a root entry without a name are accepted: real checkpoints hold nothing else. Links, devices, pipes,
sparse files, absolute names, ``..`` and names that occur twice are refused. Before a member is written, its size is
checked against what the archive has left, where that is known, and against the room on the disk.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import IO, BinaryIO, cast

from ..cache.folder import open_private
from ..errors import CorruptError, FormatError, RankloadError, UnsafeError
from ..formats.sniff import HEAD_BYTES, sniff
from ..plurals import counted
from ..stores.base import OnBytes
from .decompress import COMPRESSED, Expanded

MAX_MEMBERS = 200_000
MAX_DEPTH = 64
"""Folders that a member may lie in, one in the other: making and removing them takes a call of Python for each."""
MAX_HEADER = 1 << 20
"""Bytes that one member's headers may take, extended ones included."""
_COPY = 1 << 20


def is_tar(path: str) -> bool:
    """Whether `path` is a tar, plain or compressed, by its contents. Raises as `Expanded` does."""
    kind = sniff(path)
    if kind not in COMPRESSED:
        return kind == "tar"
    with Expanded(path, kind, path, limit=1 << 30) as expanded:
        return sniff(expanded.read(HEAD_BYTES)) == "tar"


def unpack(
    path: str,
    folder: str,
    *,
    described: str | None = None,
    limit: int,
    on_bytes: OnBytes | None = None,
) -> list[str]:
    """Unpacks the tar at `path` (plain or compressed) into `folder`, and returns the names of its regular files.

    `folder` must exist; several archives may be unpacked into one, if files of one name are equal. At most `limit`
    bytes are written. Modes, owners and times are not kept. Errors call the archive `described`.

    Raises `UnsafeError` for a member that is refused or exceeds `limit`, `CorruptError` for a damaged or truncated
    archive, `FormatError` where `path` is no tar. The caller has to remove what was written by then.
    """
    shown = described if described is not None else path
    names = []
    with _opened(path, shown, limit=limit) as (source, checked):
        for info, name in checked:
            target = os.path.join(folder, *name.split("/")) if name else folder
            if info.isdir():
                _make_folder(target, name, shown)
                continue
            _make_folder(os.path.dirname(target), name, shown)
            _write(source, target, info.size, name, shown, on_bytes)
            names.append(name)
    return names


@contextlib.contextmanager
def checked_members(
    read: Callable[[int], bytes],
    shown: str,
    *,
    size: int | None,
    limit: int,
    skip: Callable[[int], object] | None = None,
) -> Iterator[tuple[_Source, Iterator[tuple[tarfile.TarInfo, str]]]]:
    """The members of a plain tar, in order, each with its safe name; the root's name is empty.

    `read` returns the next bytes of the archive, `skip` passes over some; `size` is the archive's, None where it is not
    known. Errors call it `shown`. Raises as `unpack` does, but accepts a name that is a file and a folder at once.
    """
    source = _Source(read, shown, skip)
    try:
        yield source, _checked(source, shown, size, limit)
    except RankloadError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, EOFError, IndexError) as error:
        raise CorruptError(f"{shown}: damaged tar archive: {error}", path=shown) from error


@contextlib.contextmanager
def checked_members_of(
    file: BinaryIO, shown: str, *, size: int, limit: int
) -> Iterator[tuple[_Source, Iterator[tuple[tarfile.TarInfo, str]]]]:
    """As `checked_members`, of a tar of `size` bytes in a file, whose contents are passed over by seeking."""

    def skip(ahead: int) -> None:
        file.seek(ahead, os.SEEK_CUR)

    with checked_members(file.read, shown, size=size, limit=limit, skip=skip) as found:
        yield found


def write_member(read: Callable[[int], bytes], folder: str, name: str, size: int, shown: str) -> None:
    """Writes the member `name` of `size` bytes, which `read` returns, into `folder`. Raises as `unpack` does."""
    target = os.path.join(folder, *name.split("/"))
    _make_folder(os.path.dirname(target), name, shown)
    _write(_Source(read, shown), target, size, name, shown, None)


def file_and_folder(name: str, shown: str) -> UnsafeError:
    """The error for a name that is a file and a folder at once; the caller raises it."""
    return UnsafeError(f"{shown}: {name!r} is a file and a folder at once", path=shown)


@contextlib.contextmanager
def _opened(
    path: str, shown: str, limit: int
) -> Iterator[tuple[_Source, Iterator[tuple[tarfile.TarInfo, str]]]]:
    kind = sniff(path)
    with contextlib.ExitStack() as stack:
        if kind in COMPRESSED:
            expanded = stack.enter_context(Expanded(path, kind, shown, limit))
            yield stack.enter_context(checked_members(expanded.read, shown, size=None, limit=limit))
        elif kind == "tar":
            file = stack.enter_context(open(path, "rb"))
            size = os.fstat(file.fileno()).st_size
            yield stack.enter_context(checked_members_of(file, shown, size=size, limit=limit))
        else:
            raise FormatError(f"{shown}: expected a tar archive, got a file of another kind", path=shown)


def _checked(
    source: _Source, shown: str, archive_size: int | None, limit: int
) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """The members as `checked_members` gives them; every check but that of the target's folder is here."""
    seen: dict[str, bool] = {}
    total = 0
    # Over a `_Source`, tarfile can read headers only; and below it is made to forget its members.
    with tarfile.open(fileobj=cast(IO[bytes], source), mode="r:") as archive:
        if getattr(archive, "firstmember") is None:  # noqa: B009 (typeshed does not know it)
            return  # Python 3.10 would seek to before the beginning of an archive without members.
        while (info := archive.next()) is not None:
            name = _safe_name(info, shown)
            _check_kind(info, name, shown)
            total += info.size
            if archive_size is not None and info.offset_data + info.size > archive_size:
                raise CorruptError(
                    f"{shown}: the archive ends early: {info.name!r} claims bytes up to "
                    f"{info.offset_data + info.size}, the archive has {archive_size}",
                    path=shown,
                )
            if total > limit:
                raise UnsafeError(
                    f"{shown}: holds more than {limit} bytes; refused as a bomb, or for lack of disk space",
                    path=shown,
                )
            if len(seen) >= MAX_MEMBERS:
                raise UnsafeError(f"{shown}: holds more than {MAX_MEMBERS} members", path=shown)
            if name in seen and not (info.isdir() and seen[name]):
                raise UnsafeError(f"{shown}: {info.name!r} occurs twice", path=shown)
            seen[name] = info.isdir()
            source.header_budget = MAX_HEADER
            yield info, name
            archive.members = []  # type: ignore[attr-defined]
        if not source.ended_properly:
            raise CorruptError(
                f"{shown}: the archive ends early, or is damaged after {counted(len(seen), 'member')}",
                path=shown,
            )
        # A compressed file's checksum is at its end.
        while archive_size is None and source.take(_COPY):
            pass


def _safe_name(info: tarfile.TarInfo, shown: str) -> str:
    """The member's name as a relative path without ``.`` and ``..``; empty for the root."""
    name = info.name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    problem = None
    if not parts and info.isdir():
        return ""
    if not parts:
        problem = "has no name"
    elif name.startswith("/"):
        problem = "has an absolute name"
    elif ".." in parts:
        problem = "leaves its folder"
    elif "\\" in name or "\0" in name or (len(parts[0]) > 1 and parts[0][1] == ":"):
        problem = "has a name that is no plain relative path"
    elif any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in parts) or len(name) > 2048:
        problem = "has a name that is too long"
    elif len(parts) > MAX_DEPTH:
        problem = f"lies more than {MAX_DEPTH} folders deep"
    if problem is not None:
        raise UnsafeError(f"{shown}: member {name[:200]!r} {problem}; nothing of it was unpacked", path=shown)
    return "/".join(parts)


def _check_kind(info: tarfile.TarInfo, name: str, shown: str) -> None:
    if info.size < 0:
        raise CorruptError(f"{shown}: member {info.name!r} claims a size of {info.size}", path=shown)
    if info.issparse() or any(key.startswith("GNU.sparse") for key in info.pax_headers):
        kind = "a sparse file"
    elif info.isdir():
        kind = "" if info.size == 0 else "a folder with contents"
    elif info.isreg():
        kind = "" if name else "a file without a name"
    elif info.issym() or info.islnk():
        kind = f"a link to {info.linkname[:200]!r}"
    elif info.isdev():
        kind = "a device or pipe"
    else:
        kind = f"of unknown type {info.type!r}"
    if kind:
        raise UnsafeError(
            f"{shown}: member {info.name[:200]!r} is {kind}, expected files and folders only", path=shown
        )


def _make_folder(path: str, name: str, shown: str) -> None:
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise file_and_folder(name, shown) from error


def _write(source: _Source, target: str, size: int, name: str, shown: str, on_bytes: OnBytes | None) -> None:
    try:
        fd = open_private(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError as error:
        if os.path.isdir(target):
            raise file_and_folder(name, shown) from error
        _compare(source, target, size, name, shown)
        return
    with os.fdopen(fd, "wb", buffering=0) as file:
        for data in _contents(source, size, name, shown):
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            if on_bytes is not None:
                on_bytes(len(data))


def _compare(source: _Source, target: str, size: int, name: str, shown: str) -> None:
    """Raises `CorruptError` unless the file at `target`, of another archive of the checkpoint, has the same bytes."""
    with open(target, "rb") as file:
        same = os.fstat(file.fileno()).st_size == size
        for data in _contents(source, size, name, shown):
            same = same and file.read(len(data)) == data
    if not same:
        raise CorruptError(
            f"{shown}: {name!r} is in another archive of the same checkpoint too, with other contents",
            path=shown,
        )


def _contents(source: _Source, size: int, name: str, shown: str) -> Iterator[bytes]:
    left = size
    while left:
        data = source.take(min(_COPY, left))
        if not data:
            raise CorruptError(
                f"{shown}: the archive ends early: {name!r} has {size - left} of {counted(size, 'byte')}",
                path=shown,
            )
        left -= len(data)
        yield data


class _Source:
    """The file that tarfile reads headers from: forward only, and no more than `header_budget` bytes of them."""

    def __init__(
        self, read: Callable[[int], bytes], described: str, skip: Callable[[int], object] | None = None
    ) -> None:
        """`read` returns the next bytes of the archive; `skip`, where given, passes over some faster."""
        self._read = read
        self._skip = skip
        self._described = described
        self._position = 0
        self._last = b""
        self.header_budget = MAX_HEADER

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.header_budget:
            raise UnsafeError(
                f"{self._described}: a header at byte {self._position} claims more than {MAX_HEADER} bytes",
                path=self._described,
            )
        self.header_budget -= size
        return self.take(size)

    def take(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end; for contents, which are no part of the budget."""
        self._last = self._read(size)
        self._position += len(self._last)
        return self._last

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        ahead = position - self._position
        if ahead < 0:
            raise CorruptError(f"{self._described}: its headers overlap", path=self._described)
        if self._skip is not None:
            self._skip(ahead)
            self._position = position
        while self._position < position:
            if not self.take(min(_COPY, position - self._position)):
                raise CorruptError(f"{self._described}: the archive ends early", path=self._described)

    @property
    def ended_properly(self) -> bool:
        """Whether the last bytes read are the block of zeros that ends an archive."""
        return len(self._last) == tarfile.BLOCKSIZE and not self._last.strip(b"\0")
