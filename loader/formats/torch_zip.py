"""Reads the directory of a zip that ``torch.save`` wrote: which bytes of the file each record is. Free of torch.

Python's zipfile reads the directory. What it does not promise is checked here: that records are stored without
compression, that each local header agrees with the directory, and that no two records share bytes.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from ..checksums import crc32
from ..errors import CorruptError, FormatError, UnsafeError
from ..plurals import counted

# Structures of the zip format (PKWARE's APPNOTE): end of the directory, its zip64 forms, and a local header.
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s5H3L2H")
END_BYTES = _END64.size + _END64_LOCATOR.size + _END.size
"""How many bytes of a zip's end hold all records that may follow its directory."""
_ENTRY_MEMORY = 12
"""Bytes of memory per byte of directory, as zipfile and this module take them."""
_DIRECTORY_MEMORY = 5
"""Bytes that the directory may take in memory for each byte of the file, beyond the least.

A record of torch.save's takes 240 bytes at least, of them 90 in the directory; those take 1,080 in memory.
"""
_LEAST_DIRECTORY_MEMORY = 64 << 20
_SIZES_FOLLOW = 0x08
_ENCRYPTED = 0x01
_ALIGNMENT = 64
"""PyTorch begins each record's data at a multiple of this many bytes."""
_LARGE = 0xFFFFFFFF
"""Stands in a 4-byte field for a size or offset that is in a zip64 field."""
_MANY = 0xFFFF
"""The same of a number of records, in 2 bytes."""
_DESCRIPTORS = (0, 16, 24)
"""Bytes between a record's data and the next header: none, or a descriptor with sizes of 4 or of 8 bytes."""

OpenFile = Callable[[str], BinaryIO]
"""Opens a path for reading, as ``open(path, "rb")``."""


def open_local(path: str) -> BinaryIO:
    """Opens a file that is on this node as a whole."""
    return open(path, "rb")


@dataclass(frozen=True, slots=True)
class Record:
    """One stored record."""

    offset: int
    """Of its data, from the start of the file."""
    size: int
    crc32: int
    header: int
    """Where its local header starts."""
    entry: zipfile.ZipInfo


@dataclass(frozen=True, slots=True)
class ZipRecords:
    """The records of a torch zip by their names below its top folder, such as ``data/0``."""

    path: str
    name: str
    records: dict[str, Record]
    verifiable: bool
    """Whether any record keeps a checksum; torch can be told to write none."""
    open_file: OpenFile = open_local
    derived: bool = False
    """Whether places of data come from the directory alone, so that headers are still to be compared."""

    def check_header(self, record_name: str, open_file: OpenFile = open_local) -> None:
        """Compares a record's local header with the directory, and with the place that was derived from it.

        The header has to be there by now. Raises `CorruptError` where they contradict each other.
        """
        record = self.records[record_name]
        with open_file(self.path) as file:
            offset = _data_offset(file, record.entry, self.name)
        if offset != record.offset:
            raise CorruptError(
                f"{self.name}: the data of record {record_name} begin at byte {offset:,}, expected {record.offset:,} "
                "by the zip's directory. The file is damaged, or torch.save did not write it; take another copy of it.",
                path=self.name,
            )

    def crc32(self, record: Record) -> int | None:
        """What the record's bytes must sum to; None where this file keeps no checksums."""
        return record.crc32 if self.verifiable else None

    def read(self, record_name: str, *, limit: int) -> bytes:
        """A record's bytes, compared with its CRC-32 where the file keeps any.

        Raises `UnsafeError` for more than `limit` bytes, `CorruptError` where they are missing or do not match.
        """
        record = self.records[record_name]
        if record.size > limit:
            raise UnsafeError(
                f"{self.name}: record {record_name} has {record.size:,} bytes; expected at most {limit:,}.",
                path=self.name,
            )
        with self.open_file(self.path) as file:
            file.seek(record.offset)
            data = file.read(record.size)
        if len(data) != record.size:
            raise CorruptError(
                f"{self.name}: record {record_name} ends after {len(data):,} of {counted(record.size, 'byte')}; take "
                "another copy of it.",
                path=self.name,
            )
        if self.verifiable and crc32(data) != record.crc32:
            raise CorruptError(
                f"{self.name}: record {record_name} has CRC-32 {crc32(data):08x}; its directory says "
                f"{record.crc32:08x}. The file is damaged; take another copy of it.",
                path=self.name,
            )
        return data


def read_zip(
    path: str, *, name: str, open_file: OpenFile = open_local, derive: bool = False, size: int | None = None
) -> ZipRecords:
    """The records of the torch zip at `path`; ``name`` is what messages call it.

    `size` is that of what `open_file` opens, where that is not the whole file: places are counted from its beginning.
    `derive` is for a file of which only the directory was fetched: where a record's data begin is worked out from the
    directory, by torch's rule of alignment, and a local header is read only where that does not fit the next record.
    `ZipRecords.check_header` compares the others later.

    Raises `CorruptError` where the directory is damaged or contradicts the file, `UnsafeError` where records
    overlap or the directory would take far more memory than the file has bytes, `FormatError` for zips of
    other kinds.
    """
    size = os.path.getsize(path) if size is None else size
    with open_file(path) as file:
        directory, n_entries = _directory_size(file, size, name)
        if directory * _ENTRY_MEMORY > _DIRECTORY_MEMORY * size + _LEAST_DIRECTORY_MEMORY:
            raise UnsafeError(
                f"{name}: its zip directory has {directory:,} bytes, in a file of {size:,}. That is more than rankload "
                "takes on for a file of its size (docs/safety.md states the bounds), and more than torch.save writes.",
                path=name,
            )
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                end_of_records = archive.start_dir
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error) as error:
            raise CorruptError(
                f"{name}: its zip directory cannot be read ({error}). The file is truncated or damaged; "
                "take another copy of it.",
                path=name,
            ) from error
        if n_entries is not None and n_entries != len(entries):
            raise CorruptError(
                f"{name}: its zip directory has {counted(len(entries), 'record')}, and says that it has "
                f"{n_entries:,}. The file is damaged; take another copy of it.",
                path=name,
            )
        top = _top_folder([entry.filename for entry in entries], name)
        records = _checked_records(file, entries, end_of_records, name, derive=derive)
    inside = {record[len(top) :]: place for record, place in records.items() if record.startswith(top)}
    verifiable = any(record.crc32 for record in inside.values())
    return ZipRecords(path, name, inside, verifiable, open_file, derive)


def ends_whole(tail: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that ends in `tail` (`END_BYTES` of it at least) is one zip from its first byte to
    its last, as far as its end shows: the directory lies right before its last record, at the byte that this names."""
    place = directory_place(tail, size)
    return place is not None and place[0] + place[1] == place[2]


def check_end(file: BinaryIO, size: int, name: str) -> None:
    """Raises `CorruptError` unless the zip in `file`, of `size` bytes, ends in a directory that lies inside of it.

    Nothing but the file's last bytes is read: a zip whose writing did not end, or that was cut short, has none.
    """
    _directory_size(file, size, name)
    file.seek(max(0, size - END_BYTES))
    place = directory_place(file.read(), size)
    if place is not None and place[0] + place[1] > place[2]:
        raise CorruptError(
            f"{name}: its zip directory claims bytes {place[0]:,} to {place[0] + place[1]:,}, but it ends before byte "
            f"{place[2]:,}. The file has lost some of its bytes; take another copy of it.",
            path=name,
        )


def directory_place(tail: bytes, size: int) -> tuple[int, int, int] | None:
    """Where the directory begins as the record at the file's end has it, its size, and where it ends in truth.

    None where there is no such record, or a comment follows it, which torch does not write.
    """
    end = len(tail) - _END.size
    if end < 0 or tail[end : end + 4] != b"PK\5\6" or tail[-2:] != b"\0\0":
        return None
    nbytes, offset = _END.unpack_from(tail, end)[5:7]
    at = end
    locator = end - _END64_LOCATOR.size
    end64 = locator - _END64.size
    if end64 >= 0 and tail[locator : locator + 4] == b"PK\6\7" and tail[end64 : end64 + 4] == b"PK\6\6":
        nbytes, offset = _END64.unpack_from(tail, end64)[8:10]
        at = end64
    return offset, nbytes, size - len(tail) + at


def _directory_size(file: BinaryIO, size: int, name: str) -> tuple[int, int | None]:
    """Bytes and records of the directory as the record at the file's end has them; zipfile would read that many at
    once. None where it has no room for the number of records.

    Raises `CorruptError` where the two forms of that record contradict each other: which of them a reader believes
    would decide what the file holds.
    """
    # As torch writes it, without a comment, the record is the last bytes.
    file.seek(max(0, size - _END.size - _END64_LOCATOR.size))
    tail = file.read()
    at = len(tail) - _END.size
    if at < 0 or tail[at : at + 4] != b"PK\5\6" or tail[-2:] != b"\0\0":
        file.seek(max(0, size - 65557 - _END64_LOCATOR.size))
        tail = file.read()
        at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise CorruptError(
            f"{name}: it begins as a zip but has no zip directory at its end. The file is truncated; take "
            "another copy of it.",
            path=name,
        )
    short = _END.unpack_from(tail, at)[1:7]
    directory: int = short[4]
    entries: int | None = None if short[3] == _MANY else short[3]
    locator = at - _END64_LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
        file.seek(min(_END64_LOCATOR.unpack_from(tail, locator)[2], size))
        record = file.read(_END64.size)
        if len(record) == _END64.size and record[:4] == b"PK\6\6":
            long = _END64.unpack(record)[4:10]
            largest = (_MANY,) * 4 + (_LARGE,) * 2
            if any(one not in (other, most) for one, other, most in zip(short, long, largest, strict=True)):
                raise CorruptError(
                    f"{name}: the two records at the end of its zip directory contradict each other. The file is "
                    "damaged; take another copy of it.",
                    path=name,
                )
            directory, entries = long[4], long[3]
    if directory > size:
        raise CorruptError(
            f"{name}: its zip directory claims {directory:,} bytes, in a file of {size:,}. The file is "
            "damaged; take another copy of it.",
            path=name,
        )
    return directory, entries


def _top_folder(records: list[str], name: str) -> str:
    """The one folder that all of torch's records are in, with its slash."""
    tops = [record[: -len("data.pkl")] for record in records if record.endswith("/data.pkl")]
    tops = sorted({top for top in tops if top.count("/") == 1})
    if any(record.endswith("/constants.pkl") or "/code/" in record for record in records):
        raise FormatError(
            f"{name}: a TorchScript archive (torch.jit.save), which holds code. Load it with torch.jit.load "
            "and save its state_dict() with torch.save.",
            path=name,
        )
    if len(tops) != 1:
        if any(record.endswith(".npy") for record in records):
            raise FormatError(
                f"{name}: a NumPy archive (.npz). Save its arrays as tensors: "
                "torch.save({key: torch.from_numpy(array) for key, array in numpy.load(path).items()}, new_path).",
                path=name,
            )
        raise FormatError(
            f"{name}: a zip file, but not one that torch.save wrote: it has no data.pkl. Pass the file that torch.save "
            "wrote, or save one.",
            path=name,
        )
    return tops[0]


def _checked_records(
    file: BinaryIO, entries: list[zipfile.ZipInfo], end_of_records: int, name: str, *, derive: bool
) -> dict[str, Record]:
    """The records by name, in the order of the file, none of which overlaps another or the directory."""
    records: dict[str, Record] = {}
    taken_until = 0
    before = ""
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    if ordered and ordered[0].header_offset > 0:
        raise CorruptError(
            f"{name}: {counted(ordered[0].header_offset, 'byte')} before its first record belong to none. Something "
            "was put before the file; take another copy of it.",
            path=name,
        )
    for entry, following in zip(ordered, [*ordered[1:], None], strict=True):
        label = entry.filename[:200]
        if entry.flag_bits & _ENCRYPTED or entry.compress_type != zipfile.ZIP_STORED:
            raise FormatError(
                f"{name}: record {label} is compressed or encrypted; torch stores its records as they are. "
                "Was the file packed again? Unpack it and save it with torch.save.",
                path=name,
            )
        if entry.filename in records:
            raise CorruptError(f"{name}: two records are called {label}.", path=name)
        if entry.header_offset < taken_until:
            raise UnsafeError(
                f"{name}: records {before} and {label} overlap. No zip is written that way: do not trust "
                "this file.",
                path=name,
            )
        until = following.header_offset if following is not None else end_of_records
        derived = _derived_offset(entry, until) if derive else None
        offset = _data_offset(file, entry, name) if derived is None else derived
        if offset + entry.file_size > end_of_records:
            raise CorruptError(
                f"{name}: record {label} claims bytes {offset:,} to {offset + entry.file_size:,}, but "
                f"records end at {end_of_records:,}. The file is damaged; take another copy of it.",
                path=name,
            )
        records[entry.filename] = Record(offset, entry.file_size, entry.CRC, entry.header_offset, entry)
        taken_until = offset + entry.file_size
        before = label
    return records


def _derived_offset(entry: zipfile.ZipInfo, until: int) -> int | None:
    """Where torch puts the record's data: after header, name, zip64 sizes and a padding field, at the next multiple of
    64 (PyTorch's caffe2/serialize/inline_container.cc). None where the data would not end where the next record begins,
    at `until`."""
    start = entry.header_offset + _LOCAL.size + len(_raw_name(entry)) + 4
    if entry.file_size >= _LARGE or entry.header_offset >= _LARGE:
        start += 4 + 16 * (entry.file_size >= _LARGE) + 8 * (entry.header_offset >= _LARGE)
    offset = -(-start // _ALIGNMENT) * _ALIGNMENT
    return offset if until - offset - entry.file_size in _DESCRIPTORS else None


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo, name: str) -> int:
    """Where the record's data start. Raises `CorruptError` where its local header contradicts the directory."""
    label = entry.filename[:200]
    file.seek(max(0, entry.header_offset))
    raw_name = _raw_name(entry)
    header = file.read(_LOCAL.size + len(raw_name))
    if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
        raise CorruptError(
            f"{name}: record {label} has no header at byte {entry.header_offset:,}. The file is damaged; "
            "take another copy of it.",
            path=name,
        )
    _, _, flags, method, _, _, crc, packed, unpacked, name_length, extra = _LOCAL.unpack_from(header)
    sizes = {packed, unpacked} - {_LARGE}
    follow = flags & _SIZES_FOLLOW and sizes <= {0, entry.file_size}
    if (
        method != zipfile.ZIP_STORED
        or entry.compress_size != entry.file_size
        or name_length != len(raw_name)
        or header[_LOCAL.size :] != raw_name
        or not (follow or (sizes <= {entry.file_size} and crc == entry.CRC))
    ):
        raise CorruptError(
            f"{name}: the header of record {label} contradicts the zip's directory. The file is damaged; "
            "take another copy of it.",
            path=name,
        )
    return entry.header_offset + _LOCAL.size + int(name_length) + int(extra)


def _raw_name(entry: zipfile.ZipInfo) -> bytes:
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437", "replace")
