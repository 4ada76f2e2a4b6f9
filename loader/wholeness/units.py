"""Finds what the bytes of one file can be compared with: units, each with a checksum of its own.

A unit is a record of a torch zip. The zip may be the file itself, a member of a tar, or an item of a DCP folder's file,
where zips lie end to end. What a file's index says is read for that, and no tensor's bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO, cast

from ..byte_ranges import ByteRange
from ..errors import RankloadError
from ..fetch.archive import checked_members_of
from ..fetch.checkpoint_files import CheckpointFiles
from ..fetch.decompress import COMPRESSED
from ..formats.dcp_metadata import read_metadata
from ..formats.sniff import HEAD_BYTES, KINDS, sniff
from ..formats.torch_items import read_item
from ..formats.torch_zip import Record, ZipRecords, read_zip
from ..ranges.objects import ObjectBytes
from ..saved.tree import iterate, tensors
from ..saved.values import InertShard
from ..stores.locate import DCP_METADATA

ZIP = "zip CRC-32"
SMALL_ZIP_BYTES = 4 << 20
"""A zip inside of a larger file is read whole up to this size, and only then taken apart."""
_HEADER_READ = 4 << 10


@dataclass(frozen=True, slots=True)
class Unit:
    """Bytes ``[start, stop)`` of a file that have a checksum."""

    start: int
    stop: int
    crc32: int | None
    """What they must sum to; None where they are a zip whose records state that."""
    what: str
    """What messages call them."""
    zip_span: ByteRange
    """The bytes of the zip that they are in, or are."""
    record: str = ""
    """The record's name in that zip."""
    tensor: str = ""
    """The tensor that the zip is of, where that is known without reading it."""
    check_header: Callable[[bytes], None] | None = None
    """Compares the record's header, the bytes from `header` to `start`, with the directory; None where that is done."""
    header: int = -1

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def first(self) -> int:
        """Where the bytes begin that have to be read for it."""
        return self.start if self.check_header is None else self.header


@dataclass(frozen=True)
class Contents:
    """What a file can be compared with, beyond checksums of all of it."""

    units: tuple[Unit, ...] = ()
    """In the order of the file."""
    compressed: str = ""
    """Its kind, one of `decompress.COMPRESSED`, where the format has a checksum of its contents."""
    unsummed: str = ""
    """What of it has no checksum; empty where all has."""


@dataclass(frozen=True, slots=True)
class Item:
    """A zip in a DCP folder's file."""

    start: int
    stop: int
    key: str
    plain: bool
    """Whether it is stored as it is: what is compressed states no checksum."""


def items_of(files: CheckpointFiles) -> dict[str, list[Item]]:
    """The items in the files of a DCP folder, by the files' names in the checkpoint; empty for other kinds."""
    found: dict[str, dict[tuple[int, int], Item]] = {}
    for file in files.fetched:
        if file.name.rpartition("/")[2] != DCP_METADATA:
            continue
        metadata, prefix = read_metadata(file.path, name=file.source), file.name.removesuffix(DCP_METADATA)
        named = [
            *(
                (tensor.label(key, number), item)
                for key, tensor in metadata.tensors.items()
                for number, item in enumerate(tensor.items)
            ),
            *metadata.objects.items(),
        ]
        for key, item in named:
            one = Item(item.offset, item.stop, key, not item.transforms)
            found.setdefault(f"{prefix}{item.file}", {}).setdefault((one.start, one.stop), one)
    return {name: sorted(items.values(), key=lambda one: one.start) for name, items in found.items()}


def contents_of(data: ObjectBytes, shown: str, items: Sequence[Item] | None, *, local: bool) -> Contents:
    """What the file `data` can be compared with; `items` are those of a DCP folder's file, None for any other.

    Raises `CorruptError`, `UnsafeError` or `FormatError` where its index is damaged or none that is known.
    """
    if items is not None:
        return _of_items(items)
    kind = sniff(data.read(0, HEAD_BYTES))
    if kind == "torch-zip":
        units, verifiable = _of_zip(data, 0, data.size_bytes, shown, "", local=local)
        return Contents(units, unsummed="" if verifiable else "torch was told to write no checksums")
    if kind == "tar":
        return _of_tar(data, shown, local=local)
    if kind in COMPRESSED:
        return _of_compressed(data, kind)
    return Contents(unsummed=f"{KINDS[kind]} keeps no checksums")


def records_of(data: ObjectBytes, unit: Unit, shown: str, *, local: bool) -> tuple[tuple[Unit, ...], bool]:
    """The units of a `unit` that is a zip itself, and whether they have checksums. Raises as `read_zip`."""
    start, stop = unit.zip_span
    units, verifiable = _of_zip(data, start, stop, shown, f"{unit.what}: ", local=local)
    return tuple(replace(one, tensor=unit.tensor) for one in units), verifiable


def tensors_in(data: ObjectBytes, unit: Unit, shown: str) -> tuple[str, ...]:
    """The names of the tensors in a unit's bytes, as its file has them; empty where its index cannot be read."""
    if unit.tensor:
        return (unit.tensor,)
    try:
        index = read_item(
            data.described, *unit.zip_span, name=shown, key="", open_file=lambda _: data.as_file()
        )
    except RankloadError:
        return ()
    found = tensors(index.tree)
    for path, value in iterate(index.tree):
        if isinstance(value, InertShard):
            held = [] if value.local is None else [value.local]
            found += ((path, one) for one in (*held, *(part for _, part in value.boxes)))
    return tuple(path for path, tensor in found if any(one.key == unit.record for one in tensor.storages))


def _of_items(items: Sequence[Item]) -> Contents:
    units = tuple(
        Unit(one.start, one.stop, None, one.key, ByteRange(one.start, one.stop), tensor=one.key)
        for one in items
        if one.plain
    )
    n_left = len(items) - len(units)
    return Contents(units, unsummed=f"{n_left} of {len(items)} items are compressed" if n_left else "")


def _of_zip(
    data: ObjectBytes, start: int, stop: int, shown: str, inside: str, *, local: bool
) -> tuple[tuple[Unit, ...], bool]:
    """The records of the zip in bytes ``[start, stop)``, and whether they have checksums."""

    def open_part(_: str) -> BinaryIO:
        return data.as_file(io.DEFAULT_BUFFER_SIZE, start=start, stop=stop)

    # Far away, each local header would be a request of its own; they are compared as the bytes pass.
    archive = read_zip(data.described, name=shown, open_file=open_part, derive=not local, size=stop - start)
    if not archive.verifiable:
        return (), False
    return tuple(_units(archive, start, stop, inside)), True


def _units(archive: ZipRecords, start: int, stop: int, inside: str) -> Iterator[Unit]:
    for name, record in sorted(archive.records.items(), key=lambda one: one[1].offset):
        check = partial(_check_header, archive, name, record) if archive.derived else None
        yield Unit(
            start + record.offset,
            start + record.offset + record.size,
            record.crc32,
            f"{inside}record {name}",
            ByteRange(start, stop),
            name,
            check_header=check,
            header=start + record.header,
        )


def _check_header(archive: ZipRecords, name: str, record: Record, header: bytes) -> None:
    archive.check_header(name, lambda _: cast(BinaryIO, _At(header, record.header)))


class _At(io.BytesIO):
    """Bytes of a file that begin at a place in it."""

    def __init__(self, data: bytes, place: int) -> None:
        super().__init__(data)
        self._place = place

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return super().seek(offset - self._place if whence == os.SEEK_SET else offset, whence)


def _of_tar(data: ObjectBytes, shown: str, *, local: bool) -> Contents:
    units: list[Unit] = []
    unsummed: list[str] = []
    for name, start, stop in _members(data, shown):
        if sniff(data.read(start, min(stop, start + HEAD_BYTES))) != "torch-zip":
            unsummed.append(name)
            continue
        found, verifiable = _of_zip(data, start, stop, f"{shown}:{name}", f"{name}: ", local=local)
        units += found
        if not verifiable:
            unsummed.append(name)
    left = f"{', '.join(unsummed[:3])}{' and others' if len(unsummed) > 3 else ''} in it: no checksum is kept"
    return Contents(tuple(units), unsummed=left if unsummed else "")


def _members(data: ObjectBytes, shown: str) -> Iterator[tuple[str, int, int]]:
    """Each file in the tar that has any bytes, by its name, with where they begin and end."""
    with data.as_file(_HEADER_READ) as file:
        size = data.size_bytes
        with checked_members_of(file, shown, size=size, limit=size) as (_, members):
            for info, name in members:
                if name and info.size and not info.isdir():
                    yield name, info.offset_data, info.offset_data + info.size


def _of_compressed(data: ObjectBytes, kind: str) -> Contents:
    head = data.read(0, 16)
    # The check of an xz stream is in the low bits of its flags' second byte; a zstd frame's flag is in its first.
    without = (kind == "xz" and len(head) > 7 and not head[7] & 0x0F) or (
        kind == "zstd" and len(head) > 4 and not head[4] & 0x04
    )
    if without:
        return Contents(unsummed=f"this {kind} file was written without checksums")
    return Contents(compressed=kind)
