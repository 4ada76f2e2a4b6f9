"""Hostile zips: their directories lie, their records overlap, or are two for one name; no byte of them is believed."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from attacks import measured, most, tried
from rankload.loader.errors import CorruptError, RankloadError, UnsafeError
from rankload.loader.formats.torch_file import read_index
from torch_files import read_whole


def directory_entry(data: bytearray, record: str) -> int:
    return data.rindex(b"PK\1\2", 0, data.rindex(record.encode()))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (42, b"\0\0\0\0"),  # header offset: that of another record
        (24, b"\xff\xff\xff\x7f"),  # size
        (20, b"\x01\0\0\0"),  # packed size
        (42, b"\xff\xff\xff\x7f"),  # header beyond the file
        (10, b"\x08\0"),  # deflated
        (8, b"\x01\0"),  # encrypted
    ],
)
def test_zip_directories_that_lie(tmp_path: Path, field: int, value: bytes) -> None:
    torch.save({"a": torch.arange(9.0), "b": torch.ones(3)}, tmp_path / "f.pt")
    data = bytearray((tmp_path / "f.pt").read_bytes())
    at = directory_entry(data, "data/1") + field
    data[at : at + len(value)] = value
    (tmp_path / "f.pt").write_bytes(data)
    with pytest.raises(RankloadError):
        read_whole(tmp_path / "f.pt")


def test_overlapping_records(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(9.0), "b": torch.ones(9)}, tmp_path / "f.pt")
    data = bytearray((tmp_path / "f.pt").read_bytes())
    first, second = directory_entry(data, "data/0"), directory_entry(data, "data/1")
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    (tmp_path / "f.pt").write_bytes(data)
    with pytest.raises(UnsafeError, match="overlap"):
        read_index(tmp_path / "f.pt")


def test_a_record_twice(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}, 2))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data.pkl", pickle.dumps({"a": 2}, 2))
    (tmp_path / "f.pt").write_bytes(stream.getvalue())
    with pytest.raises(CorruptError, match="two records"):
        read_index(tmp_path / "f.pt")


def test_a_directory_of_millions(tmp_path: Path) -> None:
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    directory = entry * 1_000_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(directory), 4, 0)
    path = tmp_path / "f.pt"
    path.write_bytes(b"PK\3\4" + directory + end)
    said, grown, _ = measured(path)
    assert said in ("UnsafeError", "CorruptError")
    assert grown <= most(path)


LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


def saved() -> bytearray:
    stream = io.BytesIO()
    torch.save({"a": torch.arange(9.0), "b": torch.ones(3)}, stream)
    return bytearray(stream.getvalue())


def local_entry(data: bytearray, record: str) -> int:
    return data.index(LOCAL, data.index(record.encode()) - 64)


def put(data: bytearray, at: int, value: bytes) -> bytearray:
    data[at : at + len(value)] = value
    return data


def renamed_in(data: bytearray, at: int, header: int) -> bytearray:
    """The record whose header begins at `at` gets another name there, and there alone."""
    return put(data, at + header + len("archive/data/"), b"7")


def two_ends() -> bytes:
    """One zip in the comment of another: which directory counts depends on who looks for its end."""
    outer, inner = saved(), saved()
    end = outer.rindex(END)
    return bytes(put(outer, end + 20, struct.pack("<H", len(inner) & 0xFFFF))) + bytes(inner)


def packed(names: list[tuple[str, bytes]], **options: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:  # type: ignore[arg-type]
        for name, data in names:
            archive.writestr(zipfile.ZipInfo(name) if not options else name, data)
    return stream.getvalue()


GOOD = pickle.dumps({"a": 1}, 2)
EVIL = b"\x80\x02}X\1\0\0\0acos\nsystem\nX\4\0\0\0true\x85Rs."
LIES = {
    "another name in the local header": lambda: renamed_in(saved(), local_entry(saved(), "data/1"), 30),
    "another name in the directory": lambda: renamed_in(saved(), directory_entry(saved(), "data/1"), 46),
    "a local header that is encrypted": lambda: put(saved(), local_entry(saved(), "data/1") + 6, b"\1\0"),
    "a local header that is compressed": lambda: put(saved(), local_entry(saved(), "data/1") + 8, b"\x08\0"),
    "a local header of another size": lambda: put(
        saved(), local_entry(saved(), "data/0") + 22, b"\x04\0\0\0"
    ),
    "a local header that is longer": lambda: put(saved(), local_entry(saved(), "data/1") + 28, b"\xff\x7f"),
    "a directory of another size": lambda: put(
        saved(), directory_entry(saved(), "data/0") + 24, b"\x25\0\0\0"
    ),
    "a checksum that is not that of the pickle": lambda: put(
        saved(), directory_entry(saved(), "data.pkl") + 16, b"\1\2\3\4"
    ),
    "a checksum that is not that of a tensor": lambda: put(
        saved(), directory_entry(saved(), "data/0") + 16, b"\1\2\3\4"
    ),
    "encrypted": lambda: put(saved(), directory_entry(saved(), "data.pkl") + 8, b"\1\0"),
    "strongly encrypted": lambda: put(saved(), directory_entry(saved(), "data.pkl") + 8, b"\x41\0"),
    "a compression that nobody knows": lambda: put(
        saved(), directory_entry(saved(), "data.pkl") + 10, b"\x63\0"
    ),
    "on another disk": lambda: put(saved(), saved().rindex(END) + 4, b"\7\0"),
    "fewer entries than it has": lambda: put(saved(), saved().rindex(END) + 8, b"\1\0\1\0"),
    "a directory that begins elsewhere": lambda: put(saved(), saved().rindex(END) + 16, b"\0\0\0\0"),
    "a directory longer than the file": lambda: put(saved(), saved().rindex(END) + 12, b"\xff\xff\xff\x7f"),
    "no directory": lambda: saved()[: saved().rindex(END)],
    "cut inside of the directory": lambda: (
        saved()[: saved().rindex(CENTRAL)] + saved()[saved().rindex(END) :]
    ),
    "a zip in the comment of a zip": two_ends,
    "a zip behind a zip, under one name": lambda: bytes(saved()) + packed([("archive/data.pkl", EVIL)]),
    "two folders with a pickle each": lambda: packed([("a/data.pkl", GOOD), ("b/data.pkl", EVIL)]),
    "a pickle in no folder": lambda: packed([("data.pkl", EVIL)]),
    "a pickle in a folder above": lambda: packed([("../data.pkl", EVIL)]),
    "an absolute pickle": lambda: packed([("/data.pkl", EVIL)]),
    "a bomb": lambda: packed(
        [("archive/data.pkl", GOOD), ("archive/data/0", bytes(50_000_000))], compression=zipfile.ZIP_DEFLATED
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_no_lie_is_believed(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "f.pt"
    path.write_bytes(LIES[lie]())
    assert "read" not in tried(path)
