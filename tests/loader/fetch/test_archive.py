"""Archives: what real ones hold comes out, what hostile ones hold does not."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import sys
import tarfile
from pathlib import Path

import pytest
from hostile_tars import HOSTILE, PLAIN, SIZE, TYPE, entry, patched_header, tar_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rankload.loader.errors import CorruptError, FormatError, OptionError, RankloadError, UnsafeError
from rankload.loader.fetch.archive import is_tar, unpack
from rankload.loader.fetch.decompress import Expanded
from rankload.loader.formats.sniff import sniff

LIMIT = 1 << 30
FILES = {
    "composer_states.pt": b"c" * 3000,
    "deepspeed/a.pt": os.urandom(5000),
    "deepspeed/empty": b"",
    "latest": b"deepspeed",
}


def composer_like(*, form: int = tarfile.PAX_FORMAT, root: str = "/") -> bytes:
    folders = [entry(root, type=tarfile.DIRTYPE), entry("deepspeed/", type=tarfile.DIRTYPE)]
    return tar_bytes(*folders, *(entry(name, data) for name, data in FILES.items()), form=form)


def compress(kind: str, data: bytes) -> bytes:
    if kind == "zstd":
        zstandard = pytest.importorskip("zstandard")
        return bytes(zstandard.ZstdCompressor().compress(data))
    return {"tar": bytes, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}[kind](data)


KINDS = ["tar", "gzip", "bzip2", "xz", "zstd"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("root", ["/", "./", "."])
def test_unpacks(tmp_path: Path, kind: str, root: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(compress(kind, composer_like(root=root)))
    assert is_tar(str(path))
    folder = tmp_path / "out"
    folder.mkdir()
    seen: list[int] = []
    assert unpack(str(path), str(folder), limit=LIMIT, on_bytes=seen.append) == list(FILES)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert sum(seen) == sum(map(len, FILES.values()))


def test_two_archives_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name, data in (("0", b"zero"), ("1", b"one"), ("2", b"two")):
        shared = entry("shared", b"same" if name != "2" else b"SAME")
        (tmp_path / name).write_bytes(
            tar_bytes(
                entry("", type=tarfile.DIRTYPE),
                entry("d", type=tarfile.DIRTYPE),
                entry(f"d/{name}", data),
                shared,
            )
        )
    for name in ("0", "1"):
        unpack(str(tmp_path / name), str(folder), limit=LIMIT)
    assert sorted(os.listdir(folder / "d")) == ["0", "1"]
    with pytest.raises(CorruptError, match="'shared' is in another archive"):
        unpack(str(tmp_path / "2"), str(folder), limit=LIMIT)


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("kind", ["tar", "gzip"])
def test_hostile_members(tmp_path: Path, what: str, kind: str) -> None:
    path, folder = tmp_path / "a.tar", tmp_path / "deep" / "out"
    folder.mkdir(parents=True)
    path.write_bytes(compress(kind, tar_bytes(*HOSTILE[what])))
    with pytest.raises((UnsafeError, CorruptError), match=r"a\.tar"):
        unpack(str(path), str(folder), limit=LIMIT)
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "deep"]
    assert os.listdir(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (patched_header(PLAIN, 0, SIZE, b"77777777777\0"), (CorruptError, UnsafeError)),
        (patched_header(PLAIN, 0, SIZE, b"\xff" * 12), CorruptError),
        (patched_header(PLAIN, 0, SIZE, b"\x80" + b"\0" * 3 + b"\xff" * 8), (CorruptError, UnsafeError)),
        (patched_header(patched_header(PLAIN, 0, SIZE, b"00077777777\0"), 0, TYPE, b"x"), UnsafeError),
        (patched_header(patched_header(PLAIN, 0, SIZE, b"00077777777\0"), 0, TYPE, b"L"), UnsafeError),
        (
            patched_header(patched_header(PLAIN, 0, SIZE, b"\xff" * 12), 0, TYPE, b"x"),
            (UnsafeError, CorruptError),
        ),
        (PLAIN[:1200], CorruptError),
        (PLAIN[:1536], CorruptError),
        (PLAIN[:1536] + b"garbage!" * 64 + PLAIN[2048:], CorruptError),
        (PLAIN[:100], (FormatError, CorruptError)),
        (b"not a tar at all" * 100, (FormatError, CorruptError)),
    ],
)
@pytest.mark.parametrize("compression", ["tar", "gzip"])
def test_sizes_that_lie(
    tmp_path: Path, data: bytes, kind: type[RankloadError] | tuple[type[RankloadError], ...], compression: str
) -> None:
    path, folder = tmp_path / "a.tar", tmp_path / "out"
    folder.mkdir()
    path.write_bytes(compress(compression, data))
    with pytest.raises(kind):
        unpack(str(path), str(folder), limit=1 << 26)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_and_damaged_compression(tmp_path: Path, kind: str) -> None:
    data = bytearray(compress(kind, composer_like()))
    path, folder = tmp_path / "a.tar", tmp_path / "out"
    folder.mkdir()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptError):
        unpack(str(path), str(folder), limit=LIMIT)


def expand_all(path: Path, kind: str, limit: int) -> None:
    with Expanded(str(path), kind, "a.pt", limit) as source:
        while source.read(1 << 20):
            pass


def test_bombs(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(bz2.compress(bytes(1 << 26)))
    with pytest.raises(UnsafeError, match="expands beyond"):
        expand_all(path, "bzip2", LIMIT)
    path.write_bytes(gzip.compress(bytes(1 << 16)))
    with pytest.raises(UnsafeError):
        expand_all(path, "gzip", limit=1000)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_several_streams_in_one_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(compress(kind, b"a" * 100_000) + compress(kind, b"b" * 7))
    assert sniff(str(path)) == kind
    with Expanded(str(path), kind, "x", LIMIT) as source:
        assert source.read(1 << 20) == b"a" * 100_000 + b"b" * 7
        assert source.read(1) == b""


def test_zstd_missing_prints_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(OptionError, match=r"pip install 'rankload\[zstd\]'"):
        unpack(str(tmp_path / "a.tar.zst"), str(tmp_path), limit=LIMIT)


NAMES = st.text(alphabet="ab/.-_\\:", min_size=1, max_size=8)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(NAMES, st.binary(max_size=600)), max_size=4))
def test_any_names_stay_inside(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    run(tmp_path, tar_bytes(*(entry(name, data) for name, data in members)))


def run(tmp_path: Path, data: bytes) -> None:
    import shutil

    folder = tmp_path / "in" / "out"
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    folder.mkdir(parents=True)
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    try:
        names = unpack(str(path), str(folder), limit=1 << 20)
    except RankloadError:
        names = None
    assert os.listdir(tmp_path / "in") == ["out"]
    if names is not None:
        found = [
            os.path.relpath(os.path.join(at, name), folder)
            for at, _, files in os.walk(folder)
            for name in files
        ]
        assert sorted(found) == sorted(names)
