"""The members of a remote tar, by its headers: hopped to, so that what they stand before need not be read.

    header → its size → the next header ...

A hop over a large member reads one block of 64 KiB at its other end. Small members come whole anyway: where only such
lie between, the next block begins where the last one ended, and is twice as long, up to 16 MiB. So ten thousand
members of 1 KiB take about ten requests, and at most as much is read for nothing as was read of small members before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..byte_ranges import ByteRange
from ..formats.sniff import HEAD_BYTES, sniff
from ..stores.base import OnBytes
from .archive import checked_members, file_and_folder
from .remote_file import BLOCK_BYTES, RemoteFile

SMALL_BYTES = 512 << 10
"""Members up to this size come whole."""
MOST_AT_ONCE = 16 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """A file or folder of an archive."""

    name: str
    """Safe to be made below a folder."""
    offset: int
    """Of its data, from the start of the archive."""
    size_bytes: int
    is_folder: bool = False
    kind: str = ""
    """Of a file larger than `SMALL_BYTES`: what `sniff` says of it."""

    @property
    def span(self) -> ByteRange:
        return ByteRange(self.offset, self.offset + self.size_bytes)


def read_members(file: RemoteFile, described: str, on_bytes: OnBytes) -> list[Member]:
    """The members of the plain tar `file`, in order, the root left out; the rules are those of `archive.unpack`.

    Raises as `unpack` and `read_ranges` do; nothing has been written for a member then.
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
            kind = sniff(hops.peek(HEAD_BYTES)) if info.size > SMALL_BYTES else ""
            found.append(Member(name, info.offset_data, info.size, info.isdir(), kind))
    return found


class _Hops:
    """A position in a remote tar."""

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
        if self._file.reading([ByteRange(start, stop)]) is not None:
            if start - self._read_to > SMALL_BYTES:
                self._read_to, self._block = start, BLOCK_BYTES
            else:
                self._block = min(2 * self._block, MOST_AT_ONCE)
            block = ByteRange(min(self._read_to, start), min(max(stop, start + self._block), end))
            self._file.ensure([block], self._on_bytes)
        self._read_to = max(self._read_to, stop)
        return self._file.read(start, stop - start)


class _Tree:
    """Refuses a name that is a file and a folder at once, as the file system does while an archive is unpacked."""

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
