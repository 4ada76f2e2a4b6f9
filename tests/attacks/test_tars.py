"""Hostile tars, as a whole file that a user was given: refused by each reader, and nothing is made outside its folder.

What each refusal says, and that remote tars are refused by their headers alone, is with the tests of the archive.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path

import pytest
from attacks import tried
from hostile_pickles import payloads
from hostile_tars import HOSTILE, entry, tar_bytes


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_members(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for name, data in (
        ("a.tar", tar_bytes(*HOSTILE[what])),
        ("a.tgz", gzip.compress(tar_bytes(*HOSTILE[what]))),
    ):
        (folder / name).write_bytes(data)
        assert "read" not in tried(folder / name)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def bomb(nbytes: int) -> bytes:
    """A tar of one member of so many zeros."""
    info = tarfile.TarInfo("composer_states.pt")
    info.size = nbytes
    return info.tobuf() + bytes(nbytes + 1024)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_bombs(tmp_path: Path, pack) -> None:  # type: ignore[no-untyped-def]
    """bzip2 and xz pack zeros into less than a thousandth."""
    (tmp_path / "a.tar").write_bytes(pack(bomb(64 << 20)))
    assert "read" not in tried(tmp_path / "a.tar")


def test_a_sparse_bomb(tmp_path: Path) -> None:
    """A terabyte of holes in two blocks, in GNU's old form: its map is in the header."""
    info = tarfile.TarInfo("composer_states.pt")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\0" + b"00000000001\0"
    header[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    assert "read" not in tried(tmp_path / "a.tar")


def test_packed_in_packed_is_not_unpacked_for_ever(tmp_path: Path) -> None:
    data = tar_bytes(entry("composer_states.pt", b"x"))
    for _ in range(5):
        data = gzip.compress(data)
    (tmp_path / "a.tar").write_bytes(data)
    assert "read" not in tried(tmp_path / "a.tar")


def test_a_member_that_is_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "out" / "canary"
    for name, data in payloads(canary).items():
        (tmp_path / "a.tar").write_bytes(tar_bytes(entry("composer_states.pt", data)))
        # What a dict makes for a missing key is never called, and not kept.
        assert "read" not in tried(tmp_path / "a.tar") or name == "as a factory", name
    assert not canary.parent.exists()


def test_a_tar_whose_name_is_a_torch_files(tmp_path: Path) -> None:
    stream = io.BytesIO(tar_bytes(*HOSTILE["symlink"]))
    (tmp_path / "f.pt").write_bytes(stream.getvalue())
    assert "read" not in tried(tmp_path / "f.pt")
