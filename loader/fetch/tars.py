"""Makes the members of a remote tar files on this node: large torch files come in parts, all others whole.

    <name>             the tar, with holes: the blocks that its headers are in, and its small members, have landed
    <name>.members/    a file for each member, and ``.landed`` records of those that come in parts

`open_archive` reads the tar's headers (`read_members`) by hopping from one to the next. Then it fetches small members
whole, and of each large torch file the index.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..byte_ranges import ByteRange
from ..cache.folder import free_bytes_of, make_private
from ..cache.holes import again_record, landed_record
from ..errors import AccessError, CorruptError, FormatError, UnsafeError
from ..formats.sniff import HEAD_BYTES, sniff
from ..formats.torch_file import FileIndex, check_records, read_index
from ..formats.torch_zip import check_end
from ..ranges.engine import read_ranges
from ..ranges.window import WindowSource
from ..stores.base import OnBytes
from .archive import checked_members, file_and_folder, write_member
from .remote_file import BLOCK_BYTES, RemoteFile

MOST_LARGE_MEMBERS = 128
"""Each keeps a few files open until the load ends."""
SMALL_MEMBER_BYTES = 512 << 10
"""Members up to this size come whole, and out of the tar's own file."""
MOST_AT_ONCE = 16 << 20
"""The most bytes that are read ahead where headers are close to each other."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file or folder of an archive."""

    name: str
    """Relative, and safe to be made inside a folder."""
    offset: int
    """Of its contents, from the start of the archive, in bytes."""
    size_bytes: int
    is_folder: bool = False
    kind: str = ""
    """The kind of a file larger than `SMALL_MEMBER_BYTES`, by `sniff`."""

    @property
    def span(self) -> ByteRange:
        """Its contents' bytes in the archive."""
        return ByteRange(self.offset, self.offset + self.size_bytes)


@dataclass(frozen=True)
class RemoteArchive:
    """A tar whose members come in parts or have come whole. The caller closes `tar` and `files`."""

    path: str
    """Its folder on this node."""
    members: tuple[str, ...]
    """Its regular files, relative to `path`."""
    parts: tuple[str, ...]
    """Those of which the index alone is here."""
    tar: RemoteFile
    files: dict[str, RemoteFile] = field(default_factory=dict)
    """Large members by their paths."""
    indexes: dict[str, FileIndex] = field(default_factory=dict)
    """Of the `parts`, by their paths."""
    fetched_again: tuple[tuple[str, int, str], ...] = ()
    """Of members that came damaged at first: the name, how many bytes, and what was wrong."""

    @property
    def fetched_bytes(self) -> int:
        """How many bytes came from the store: headers, small members, and what has landed of the large ones."""
        return self.tar.fetched_bytes + sum(file.fetched_bytes for file in self.files.values())


def open_archive(
    tar: RemoteFile, object_name: str, described: str, edge_bytes: int, on_bytes: OnBytes
) -> RemoteArchive | None:
    """Fetches the headers of the remote `tar`, its small members, and of each large torch file the index.

    A large torch file's first and last `edge_bytes` are fetched at once; mostly they hold the index. None where the
    archive has to come whole: it has more large members than can be kept open, or one whose name ends in ``.landed`` or
    ``.again``.

    Raises as `archive.unpack` and `read_ranges` do.
    """
    members = read_members(tar, described, on_bytes)
    large = [one for one in members if one.size_bytes > SMALL_MEMBER_BYTES]
    if len(large) > MOST_LARGE_MEMBERS or any(_is_taken(one.name) for one in members):
        return None
    folder = f"{tar.path}.members"
    for name in ["", *(one.name if one.is_folder else os.path.dirname(one.name) for one in members)]:
        make_private(os.path.join(folder, name).rstrip("/"))
    with contextlib.ExitStack() as undoing:
        files = {}
        for one in large:
            source = WindowSource(
                tar.source,
                one.offset,
                one.size_bytes,
                object_name=object_name,
                described=f"{described}:{one.name}",
            )
            file = RemoteFile(source, os.path.join(folder, one.name))
            undoing.callback(file.close)
            file.adopt(tar, one.offset)
            files[one.name] = file
        small = [one for one in members if not one.is_folder and one.size_bytes <= SMALL_MEMBER_BYTES]
        _bring(tar, small, large, files, edge_bytes, on_bytes)
        for one in small:
            _write_again(tar, one, folder, described)
        again = list(_small_again(tar, small, folder, described, on_bytes))
        indexes = _indexes(large, files, again, on_bytes)
        undoing.pop_all()
    return RemoteArchive(
        folder,
        tuple(one.name for one in members if not one.is_folder),
        tuple(indexes),
        tar,
        {file.path: file for file in files.values()},
        {index.path: index for index in indexes.values()},
        tuple(again),
    )


def read_members(file: RemoteFile, described: str, on_bytes: OnBytes) -> list[Member]:
    """The members of the plain tar `file`, in order, without the root.

    Refuses what `archive.unpack` refuses. Raises as that and `read_ranges` do, before any member is written.
    """
    hops = _Hops(file, on_bytes)
    size = file.source.size_bytes
    found: list[Member] = []
    tree = _Tree(described)
    with checked_members(hops.read, described, size=size, limit=size, skip=hops.skip) as (_, checked):
        for info, name in checked:
            if not name:
                continue
            tree.add(name, is_folder=info.isdir())
            kind = sniff(hops.peek(HEAD_BYTES)) if info.size > SMALL_MEMBER_BYTES else ""
            found.append(Member(name, info.offset_data, info.size, info.isdir(), kind))
    return found


def _is_taken(name: str) -> bool:
    """Whether `name` could be that of a record of what has landed, or was fetched again."""
    return any(part.endswith((landed_record(""), again_record(""))) for part in name.split("/"))


def _bring(
    tar: RemoteFile,
    small: Sequence[Member],
    large: Sequence[Member],
    files: dict[str, RemoteFile],
    edge_bytes: int,
    on_bytes: OnBytes,
) -> None:
    """Fetches in parallel the small members, both ends of large torch files, and all of other large members."""
    wanted = [(tar, [one.span for one in small])]
    for one in large:
        if one.kind == "torch-zip":
            ends = [ByteRange(0, edge_bytes), ByteRange(one.size_bytes - edge_bytes, one.size_bytes)]
        else:
            ends = [ByteRange(0, one.size_bytes)]
        wanted.append((files[one.name], ends))
    object_reads = [found for file, ranges in wanted if (found := file.object_read(ranges)) is not None]
    needed = sum(one.size_bytes for one in small)
    needed += sum(span.length for one in object_reads for span in one.ranges)
    free = free_bytes_of(os.path.dirname(tar.path))
    if needed > free:
        raise AccessError(
            f"{tar.source.describe()}: needs {needed} bytes, but {os.path.dirname(tar.path)} has {free} left; set "
            "cache_dir to a folder with more",
            path=tar.source.describe(),
        )
    read_ranges(object_reads, on_bytes)


def _write_again(tar: RemoteFile, member: Member, folder: str, described: str) -> None:
    """Writes a small member out of the tar's file, and replaces what an earlier process may have written of it."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, member.name))
    write_member(_reader(tar, member), folder, member.name, member.size_bytes, described)


def _reader(tar: RemoteFile, member: Member) -> Callable[[int], bytes]:
    position = member.offset

    def read(size: int) -> bytes:
        nonlocal position
        data = tar.read(position, size)
        position += len(data)
        return data

    return read


def _small_again(
    tar: RemoteFile, small: Sequence[Member], folder: str, described: str, on_bytes: OnBytes
) -> Iterator[tuple[str, int, str]]:
    """Fetches again those of the `small` members that are damaged torch files; yields what was."""
    for one in small:
        try:
            check_records(os.path.join(folder, one.name), name=one.name)
        except CorruptError as error:
            tar.forget([one.span])
            tar.ensure([one.span], on_bytes)
            _write_again(tar, one, folder, described)
            yield one.name, one.size_bytes, error.message.removeprefix(f"{one.name}: ")


def _indexes(
    large: Sequence[Member],
    files: dict[str, RemoteFile],
    again: list[tuple[str, int, str]],
    on_bytes: OnBytes,
) -> dict[str, FileIndex]:
    """The indexes of the torch files among the `large` members, by name; adds what was fetched again to `again`."""
    found = {}
    for one in large:
        file = files[one.name]
        if one.kind != "torch-zip":
            continue
        name = file.source.describe()

        def index(file: RemoteFile = file, name: str = name) -> FileIndex:
            return read_index(file.path, name=name, open_file=file.opener(on_bytes), partial=True)

        try:
            found[one.name] = index()
            continue
        except (CorruptError, FormatError, UnsafeError) as error:
            why = error.message.removeprefix(f"{name}: ")
        with contextlib.suppress(CorruptError, FormatError, UnsafeError):
            # Where it ends as a zip too, a bit may have flipped on the way.
            check_end(file.opener(on_bytes)(file.path), one.size_bytes, name)
            dropped = file.forget_what_was_read()
            found[one.name] = index()
            again.append((one.name, dropped, why))
            continue
        # It may be another kind of zip, or never be read. If it is, its reader raises what is wrong with it.
        file.ensure([ByteRange(0, one.size_bytes)], on_bytes)
    return found


class _Hops:
    """A position in a remote tar, which skips contents without fetching them.

    What is read ahead doubles while headers follow each other closely, and starts small again after a long skip.
    """

    def __init__(self, file: RemoteFile, on_bytes: OnBytes) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self._position = 0
        self._read_to = 0
        self._block = BLOCK_BYTES

    def read(self, size: int) -> bytes:
        data = self.peek(size)
        self._position += len(data)
        return data

    def skip(self, ahead: int) -> None:
        self._position += ahead

    def peek(self, size: int) -> bytes:
        start, end = self._position, self._file.source.size_bytes
        stop = min(start + size, end)
        if start >= stop:
            return b""
        if self._file.object_read([ByteRange(start, stop)]) is not None:
            if start - self._read_to > SMALL_MEMBER_BYTES:
                self._read_to, self._block = start, BLOCK_BYTES
            else:
                self._block = min(2 * self._block, MOST_AT_ONCE)
            block = ByteRange(min(self._read_to, start), min(max(stop, start + self._block), end))
            self._file.ensure([block], self._on_bytes)
        self._read_to = max(self._read_to, stop)
        return self._file.read(start, stop - start)


class _Tree:
    """Refuses a name that is a file and a folder at once; while `unpack` writes, the file system refuses it."""

    def __init__(self, described: str) -> None:
        self._described = described
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def add(self, name: str, *, is_folder: bool) -> None:
        parents = set(_parents(name))
        if parents & self._files or (not is_folder and name in self._folders):
            raise file_and_folder(name, self._described)
        self._folders |= parents
        (self._folders if is_folder else self._files).add(name)


def _parents(name: str) -> Iterator[str]:
    while (at := name.rfind("/")) >= 0:
        name = name[:at]
        yield name
