"""Reads the indexes of torch files that lie end to end in larger files, as in those of a DCP folder.

A local file is read where it lies, small items that follow each other at once. Of a file that comes in parts, the ends
of the items are fetched first, of all items in one round: mostly they hold the whole index, and the end of one item and
the beginning of the next are one range. Items up to `WHOLE_ITEM_BYTES` of which a rank reads all are fetched whole in
that round, so that many of them are one request. Items whose index is longer are fetched whole in a second round, and
compressed ones in the first: those are expanded into the node's cache, a file for each, and compared with the checksums
that they hold. Of items that are alike but for their values, one is taken apart (`ItemForms`).
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO, cast

from ..byte_ranges import ByteRange, subtract
from ..checksums import crc32_in_file
from ..context import LoadContext
from ..errors import CorruptError
from ..formats.torch_file import FileIndex, read_index
from ..formats.torch_items import ITEM_END_BYTES, SMALL_ITEM_BYTES, ItemForms, item_ends, read_item
from ..saved.node_file import FileItem, ItemSpan
from .again import SecondFetch
from .decompress import Expanded
from .remote_files import RemoteFiles
from .rounds import WantedRanges, fetch_now
from .whole import on_disk

_COPY_BYTES = 1 << 20
_READ_AT_ONCE_BYTES = 1 << 20
WHOLE_ITEM_BYTES = 4 << 20
"""Up to this size, two requests for the ends of an item and one for the rest cost more than what they save."""


def read_items(
    context: LoadContext,
    remote: RemoteFiles,
    again: SecondFetch,
    wanted: Sequence[FileItem],
    stage: str,
) -> tuple[list[FileIndex], list[FileIndex]]:
    """The indexes of the items, in the order of `wanted`, and one for each file, with all of its storages together.

    What came damaged is fetched once more, by `again`. Every rank must call, whatever it wants. Raises, on all ranks
    alike, what `read_item` and `fetch_now` raise, and `CorruptError` where a file ends before one of its items.
    """
    ends = {item: ends_of(context, item.span) for item in wanted if item.file.path in remote.known}
    found: dict[FileItem, FileIndex] = {}
    forms = ItemForms()
    with context.stages.announced(f"{stage}: sizes"):
        _check_sizes(wanted)
    fetch_now(context, remote, _by_path(ends), f"{stage}: ends")
    with context.stages.announced(stage), _OpenFile() as opened:
        late = _read([item for item in wanted if not item.span.zstd], ends, again, opened, forms, found)
        found |= {item: _expanded(context, again, item) for item in wanted if item.span.zstd}
    if not context.store.is_local and context.session.channel.decide(f"{stage}: longer", bool(late), any):
        whole = {item: [ByteRange(item.span.start, item.span.stop)] for item in late}
        fetch_now(context, remote, _by_path(whole), f"{stage}: longer ones")
        with context.stages.announced(f"{stage} again"), _OpenFile() as opened:
            _read(late, whole, again, opened, forms, found)
    return [found[item] for item in wanted], list(_by_file(wanted, found))


def _check_sizes(wanted: Sequence[FileItem]) -> None:
    last: dict[str, FileItem] = {}
    for item in wanted:
        if item.file.path not in last or item.span.stop > last[item.file.path].span.stop:
            last[item.file.path] = item
    for path, item in last.items():
        size = os.path.getsize(path)
        if item.span.stop > size:
            raise CorruptError(
                f"{item.file.source} has {size:,} bytes, but {item.key} is to end at byte {item.span.stop:,}: the file "
                "was cut short when it was saved or copied, or is of another save; take another copy of the whole "
                "folder",
                path=item.file.source,
            )


def ends_of(context: LoadContext, item: ItemSpan) -> list[ByteRange]:
    """What is fetched of an item for its index."""
    # What is fetched here goes into the node's file, which mode="direct" is there to avoid.
    most = SMALL_ITEM_BYTES if context.options.mode == "direct" else WHOLE_ITEM_BYTES
    if item.zstd or item.stop - item.start <= (most if item.whole else SMALL_ITEM_BYTES):
        return [ByteRange(item.start, item.stop)]
    return [
        ByteRange(item.start, item.start + ITEM_END_BYTES),
        ByteRange(item.stop - ITEM_END_BYTES, item.stop),
    ]


def _by_path(parts: Mapping[FileItem, Sequence[ByteRange]]) -> WantedRanges:
    wanted: WantedRanges = {}
    for item, ranges in parts.items():
        wanted.setdefault(item.file.path, []).extend(ranges)
    return wanted


def _read(
    wanted: Sequence[FileItem],
    landed: Mapping[FileItem, Sequence[ByteRange]],
    again: SecondFetch,
    opened: _OpenFile,
    forms: ItemForms,
    found: dict[FileItem, FileIndex],
) -> list[FileItem]:
    """Adds the indexes to `found`; items of which more is needed than has `landed` are returned."""
    late = []
    for item, ends in _ends(wanted, opened):
        path, start, stop = item.file.path, item.span.start, item.span.stop
        name = f"{item.file.source}: {item.key}"
        alike = forms.index(path, start, stop - start, ends, name, f"{item.key}:")
        if alike is not None:
            found[item] = alike
            continue
        try:
            found[item] = again.reading(
                path,
                name,
                partial(
                    read_item,
                    path,
                    start,
                    stop,
                    name=name,
                    key=f"{item.key}:",
                    open_file=opened.opener(landed.get(item)),
                    forms=forms,
                ),
                landed.get(item, ()),
            )
        except _NotThereError:
            late.append(item)
        except OSError as error:
            raise CorruptError(
                f"{item.file.source}: {item.file.path} cannot be read ({error.strerror}).",
                path=item.file.source,
            ) from error
    return late


def _ends(wanted: Sequence[FileItem], opened: _OpenFile) -> Iterator[tuple[FileItem, bytes]]:
    """The items in the order of their files, each with its ends (`item_ends`); fewer bytes where a file has not all."""
    files: dict[str, list[FileItem]] = {}
    for item in wanted:
        files.setdefault(item.file.path, []).append(item)
    for path, items in files.items():
        items.sort(key=lambda item: item.span.start)
        for together in _adjacent(items):
            start, stop = together[0].span.start, together[-1].span.stop
            if len(together) == 1:
                ends = [opened.read(path, start + at, length) for at, length in item_ends(stop - start)]
                yield together[0], b"".join(ends)
                continue
            data = opened.read(path, start, stop - start)
            for item in together:
                yield item, data[item.span.start - start : item.span.stop - start]


def _adjacent(items: Sequence[FileItem]) -> Iterator[list[FileItem]]:
    """Items of one file in its order, in groups that are read at once: small ones without any bytes between them."""
    group: list[FileItem] = []
    for item in items:
        span = item.span
        if group and not (
            span.start == group[-1].span.stop
            and span.stop - group[0].span.start <= _READ_AT_ONCE_BYTES
            and max(span.stop - span.start, group[-1].span.stop - group[-1].span.start) <= SMALL_ITEM_BYTES
        ):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _expanded(context: LoadContext, again: SecondFetch, item: FileItem) -> FileIndex:
    """The index of a compressed item, which the first process of the node to ask for it expands into the cache."""
    path, name = item.file.path, f"{item.file.source}: {item.key}"

    def produce(target: str) -> dict[str, Any]:
        span = [ByteRange(item.span.start, item.span.stop)]
        again.reading(path, name, lambda: expand(target), span)
        return {}

    def expand(target: str) -> None:
        raw = f"{target}.raw"
        for left in (raw, target):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(left)
        with open(path, "rb") as file, open(raw, "xb") as part:
            file.seek(item.span.start)
            for start in range(item.span.start, item.span.stop, _COPY_BYTES):
                part.write(file.read(min(_COPY_BYTES, item.span.stop - start)))
        with (
            Expanded(raw, "zstd", name, context.cache.free_bytes(target)) as expanded,
            open(target, "xb") as made,
        ):
            while data := expanded.read(_COPY_BYTES):
                made.write(data)
        os.unlink(raw)
        # zstd notices nothing in what it could not compress, and the item is in the cache's file alone from here on.
        index = read_index(target, name=name)
        if context.options.verify != "off":
            _check_storages(target, index, name)

    known = os.stat(path)
    identity = (path, known.st_size, known.st_mtime_ns, item.span.start, item.span.stop)
    entry = context.cache.entry(item.file.source, *map(str, identity), lasting=False)
    filled = entry.fill("item", item.file.source, on_disk(produce), lambda _: context.stages.count(0))
    return read_index(filled.path, name=name)


def _check_storages(path: str, index: FileIndex, name: str) -> None:
    """Raises `CorruptError` where a storage of the item at `path` differs from its checksum."""
    with open(path, "rb") as file:
        for storage in index.storages:
            if storage.crc32 is None:
                continue
            found = crc32_in_file(file.fileno(), storage.offset, storage.offset + storage.nbytes)
            if found != storage.crc32:
                raise CorruptError(
                    f"{name}: storage {storage.key} has CRC-32 {found:08x}; the item's directory says "
                    f"{storage.crc32:08x}. The file is damaged; take another copy of it.",
                    path=name,
                )


def _by_file(wanted: Sequence[FileItem], found: Mapping[FileItem, FileIndex]) -> Iterator[FileIndex]:
    """For each file an index with all of its items together."""
    files: dict[str, list[FileIndex]] = {}
    names = {item.file.path: item.file.source for item in wanted}
    for item in wanted:
        if item.span.zstd:
            yield found[item]
            continue
        files.setdefault(item.file.path, []).append(found[item])
    for path, indexes in files.items():
        yield FileIndex(
            path,
            names[path],
            [index.tree for index in indexes],
            os.path.getsize(path),
            all(index.verifiable for index in indexes),
            tuple(storage for index in indexes for storage in index.storages),
            "zip",
        )


class _NotThereError(Exception):
    """Bytes are read that were not fetched."""


class _OpenFile(contextlib.ExitStack):
    """The file that is read, open once; what its openers return shares it, and closes nothing.

    It has no buffer, which would read several times what an item's index has. Another file takes its place: a rank may
    read thousands.
    """

    def __init__(self) -> None:
        super().__init__()
        self._path = ""
        self._file: BinaryIO | None = None

    def opener(self, landed: Sequence[ByteRange] | None) -> Callable[[str], BinaryIO]:
        """A function like ``open``; reading outside of what has `landed` raises `_NotThereError`."""
        return lambda path: cast(BinaryIO, _Shared(self._at(path), landed))

    def read(self, path: str, start: int, length: int) -> bytes:
        """Bytes of the file at `path`; fewer where it ends before, or cannot be read."""
        try:
            return os.pread(self._at(path).fileno(), length, start)
        except OSError:
            return b""

    def _at(self, path: str) -> BinaryIO:
        if self._file is None or path != self._path:
            self.close()
            self._file = cast(BinaryIO, self.enter_context(io.FileIO(path)))
            self._path = path
        return self._file


class _Shared(io.RawIOBase):
    """A file that another one is open for."""

    def __init__(self, file: BinaryIO, landed: Sequence[ByteRange] | None) -> None:
        super().__init__()
        self._file = file
        self._landed = landed

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if self._landed is not None:
            start = self._file.tell()
            if size < 0 or subtract([ByteRange(start, start + size)], self._landed):
                raise _NotThereError
        return self._file.read(size)
