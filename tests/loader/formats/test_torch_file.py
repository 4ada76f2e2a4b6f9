"""Real torch files: what `read_index` and `materialize` make of them is what torch itself makes of them."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import pathlib
import pickle
import random
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rankload.loader.errors import CorruptError, FormatError, NotFoundError, RankloadError, UnsafeError
from rankload.loader.formats.sniff import sniff
from rankload.loader.formats.torch_file import read_index
from rankload.loader.saved.dtypes import ITEMSIZE
from rankload.loader.saved.tensor import SavedTensor
from rankload.loader.saved.tree import tensors
from torch_files import fixture_files, legacy_with, outcome, read_whole, same, zip_with

DTYPES = [name for name in ITEMSIZE if hasattr(torch, name)]


def sample(dtype: str) -> torch.Tensor:
    raw = torch.arange(48 * ITEMSIZE[dtype], dtype=torch.int64).to(torch.uint8)
    return raw.remainder(2).bool()[:48] if dtype == "bool" else raw.view(getattr(torch, dtype))


def variety() -> dict:
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return {
        "dtypes": {name: sample(name) for name in DTYPES},
        "views": [base, base.transpose(0, 2), base[1:, ::2], base[0], base[2, 3, 4]],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(2.5),
        "empty": [torch.empty(0), torch.empty(3, 0, 2)],
        "grad": torch.ones(2, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.zeros(2)),
        "frozen": torch.nn.Parameter(torch.zeros(2), requires_grad=False),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        "defaultdict": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("abca"),
        "deque": collections.deque([1, 2, 3], maxlen=5),
        "sets": [{1, "a"}, frozenset({2.5, (1, 2)}), set()],
        "numbers": [0, -1, 255, 65536, -(2**31), 2**62, 2**200, 1.5, float("inf"), float("nan"), 1 + 2j],
        "text": ["", "ä", "😀" * 300, "x" * 70_000],
        "bytes": [b"", b"\0\xff" * 300, bytearray(b"abc")],
        "none": [None, True, False],
        "ranges": [range(3), range(1, 9, 2), slice(1, None, 2)],
        "size": base.shape,
        "device": [torch.device("cpu"), torch.device("cuda", 1)],
        "dtype": [torch.float32, torch.bfloat16],
        "times": [
            datetime.timedelta(1, 2, 3),
            datetime.datetime(2020, 1, 2, 3, 4, 5, 6),
            datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc),
            datetime.date(2020, 1, 2),
            datetime.time(1, 2),
        ],
        "path": pathlib.PurePosixPath("/a/b"),
        "namespaces": [argparse.Namespace(a=1), types.SimpleNamespace(b=[2])],
        "random": random.getstate(),
        "numpy_random": np.random.get_state(),
        "arrays": [
            np.arange(6, dtype=">i4").reshape(2, 3),
            np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            np.array(["ab", "c"]),
            np.array([b"ab", b"c"]),
            np.array(5, dtype="f2"),
            np.zeros((0, 3), "c8"),
            np.array([True, False]),
            np.array(["2020-01-02"], dtype="M8[D]"),
            np.float64(2.5),
            np.int32(7),
            np.bool_(True),
            np.dtype("f4"),
        ],
    }


@pytest.fixture(scope="module")
def saved() -> dict:
    return variety()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_everything_is_read_as_torch_reads_it(tmp_path: Path, saved: dict, protocol: int, new: bool) -> None:
    path = tmp_path / "file.pt"
    torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    # torch cannot read its own legacy files where they hold the newer dtypes.
    want = torch.load(path, weights_only=False) if new else saved
    same(read_whole(path), want)
    index = read_index(path)
    assert index.format == ("zip" if new else "legacy")
    assert index.verifiable is new
    assert index.size_bytes == path.stat().st_size
    assert index.path == index.name == str(path)


def test_shared_storages_stay_shared(tmp_path: Path) -> None:
    base = torch.zeros(4, 4)
    torch.save({"whole": base, "row": base[1], "same": base, "other": torch.zeros(4)}, tmp_path / "f.pt")
    got = read_whole(tmp_path / "f.pt")
    got["row"].fill_(7)
    assert got["whole"][1].tolist() == [7.0] * 4
    assert got["same"] is got["whole"]
    assert got["other"].tolist() == [0.0] * 4
    index = read_index(tmp_path / "f.pt")
    assert [storage.nbytes for storage in index.storages] == [64, 16]
    assert index.tree["row"].storages == index.tree["whole"].storages == index.storages[:1]


def test_generators_of_numpy_go_on_where_they_were(tmp_path: Path) -> None:
    made = {
        "generators": [
            np.random.Generator(kind(3))
            for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64)
        ],
        "old": np.random.RandomState(4),
        "bits": np.random.PCG64DXSM(5),
    }
    made["old"].standard_normal()
    torch.save(made, tmp_path / "f.pt")
    got = read_whole(tmp_path / "f.pt")
    for a, b in zip(got["generators"], made["generators"], strict=True):
        assert a.integers(0, 1 << 40, 5).tolist() == b.integers(0, 1 << 40, 5).tolist()
    assert got["old"].standard_normal(3).tolist() == made["old"].standard_normal(3).tolist()
    assert got["bits"].random_raw(3).tolist() == made["bits"].random_raw(3).tolist()


def test_every_real_checkpoint_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    count = 0
    for path in fixture_files(tmp_path):
        want = torch.load(path, weights_only=False)
        index = read_index(path)
        assert index.verifiable, path
        same(read_whole(path), want, str(path))
        count += 1
    assert count >= 24


def test_the_fixtures_hold_the_tensors_that_they_should(tmp_path: Path) -> None:
    paths = list(fixture_files(tmp_path))
    states = [p for p in paths if "composer_states" in p.name]
    assert states
    for path in states:
        tree = read_index(path).tree
        timestamp = tree["state"]["timestamp"]["Timestamp"]
        assert timestamp["batch"] in (4, 8)
        assert isinstance(timestamp["total_wct"], datetime.timedelta)
        assert len(tree["rng"]) == 2
        assert tree["state"]["metadata"]["torch_version"].startswith("2.")


def test_stage_3_tensors_with_attributes_are_plain_tensors(tmp_path: Path) -> None:
    optim = [p for p in fixture_files(tmp_path) if "zero3" in str(p) and "optim" in p.name]
    tree = read_index(optim[0]).tree["optimizer_state_dict"]
    assert all(isinstance(group, SavedTensor) for group in tree["fp32_flat_groups"])
    assert tree["zero_stage"].known
    assert tree["zero_stage"].args == (3,)
    assert tree["loss_scaler"].state["cur_scale"] == 1.0


def test_what_is_read_of_a_file_without_checksums(tmp_path: Path) -> None:
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes checksums")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5)}, tmp_path / "f.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    index = read_index(tmp_path / "f.pt")
    assert not index.verifiable
    assert index.storages[0].crc32 is None
    assert read_whole(tmp_path / "f.pt")["a"].tolist() == [0, 1, 2, 3, 4]


def test_reading_an_index_imports_no_torch(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3), "n": np.ones(2)}, tmp_path / "f.pt")
    code = (
        "import sys, rankload.loader.formats.torch_file as t; i = t.read_index(sys.argv[1]);"
        "print(i.tree['a'].shape, [m for m in ('torch', 'numpy', 'deepspeed', 'fsspec') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "f.pt")], capture_output=True, text=True, timeout=60
    )
    assert run.stdout.strip() == "(3,) []", run.stderr


def not_checkpoints(folder: Path) -> dict[str, bytes]:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("a")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    tensors_header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return {
        "empty": b"",
        "html": b"<!DOCTYPE html>\n<html><body>404</body></html>",
        "xml": b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>',
        "safetensors": len(tensors_header).to_bytes(8, "little") + tensors_header + b"\0" * 4,
        "tar": stream.getvalue(),
        "gzip": b"\x1f\x8b\x08" + b"\0" * 20,
        "bzip2": b"BZh9" + b"\0" * 20,
        "xz": b"\xfd7zXZ\0" + b"\0" * 20,
        "zstd": b"\x28\xb5\x2f\xfd" + b"\0" * 20,
        "pickle": pickle.dumps({"a": 1}, 2),
        "json": b'{"a": 1}',
        "text": b"step3\n",
        "unknown": b"\0\1\2\3" * 9,
        "gguf": b"GGUF" + b"\0" * 20,
    }


def test_other_kinds_of_file_are_named(tmp_path: Path) -> None:
    for kind, data in not_checkpoints(tmp_path).items():
        path = tmp_path / kind
        path.write_bytes(data)
        assert sniff(path) == sniff(data) == kind
        if kind == "pickle":
            assert read_index(path).tree == {"a": 1}
            continue
        if kind == "safetensors":
            assert list(read_index(path).tree) == ["a"]
            continue
        with pytest.raises((CorruptError, FormatError), match=r"expected a file that torch\.save wrote"):
            read_index(path)
    with pytest.raises(NotFoundError, match=r"s3://bucket/x"):
        read_index(tmp_path / "absent", name="s3://bucket/x")


def test_other_zips_are_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "jit.pt")
    with pytest.raises(FormatError, match="TorchScript"):
        read_index(tmp_path / "jit.pt")
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    with pytest.raises(FormatError, match="NumPy archive"):
        read_index(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(FormatError, match=r"not one that torch\.save wrote"):
        read_index(tmp_path / "z.zip")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}, 2))
    with pytest.raises(FormatError, match="compressed"):
        read_index(tmp_path / "packed.pt")


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(FormatError, match="big"):
        read_index(tmp_path / "big.pt")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, new: bool) -> None:
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.arange(300), "b": torch.ones(2, 3)}, whole, _use_new_zipfile_serialization=new)
    data = whole.read_bytes()
    cut = tmp_path / "cut.pt"
    for size in [*range(0, len(data), 97), len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises((CorruptError, FormatError)):
            read_whole(cut)


def test_any_byte_that_flips_is_noticed_or_harmless(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    kept = {"a": torch.arange(30), "b": torch.ones(2, 3), "c": "text"}
    torch.save(kept, whole)
    data = bytearray(whole.read_bytes())
    path = tmp_path / "flipped.pt"
    noticed = 0
    for position in range(0, len(data), 3):
        data[position] ^= 0x10
        path.write_bytes(data)
        data[position] ^= 0x10
        try:
            got = read_whole(path)
        except RankloadError:
            noticed += 1
        else:
            # Padding, time stamps and the records that nobody needs.
            same(got, kept)
    assert noticed > 300


def test_an_error_names_file_and_place(tmp_path: Path) -> None:
    zip_with(b"\x80\x02N\xff.", tmp_path / "f.pt")
    with pytest.raises(CorruptError) as caught:
        read_index(tmp_path / "f.pt", name="https://host/f.pt")
    assert "https://host/f.pt" in str(caught.value)
    assert "0xff" in str(caught.value)
    assert caught.value.path == "https://host/f.pt"
    legacy_with(b"\x80\x02N\xff.", tmp_path / "g.pt")
    assert outcome(tmp_path / "g.pt") == "CorruptError"


def test_tensors_are_found_with_their_paths(tmp_path: Path) -> None:
    torch.save({"state": {"model": {"a.weight": torch.ones(2)}, "list": [torch.ones(1)]}}, tmp_path / "f.pt")
    found = tensors(read_index(tmp_path / "f.pt").tree)
    assert [name for name, _ in found] == ["state/model/a.weight", "state/list/0"]


def test_bounds_follow_what_torch_save_writes(tmp_path: Path) -> None:
    """Twenty thousand parameters of one element with AdamW's state, and a list of two million numbers."""
    one = torch.zeros(1)
    state = {
        n: {"step": one[0].clone(), "exp_avg": one.clone(), "exp_avg_sq": one.clone()} for n in range(20_000)
    }
    torch.save({"state": state, "groups": [{"params": list(range(20_000))}]}, tmp_path / "f.pt")
    assert len(read_index(tmp_path / "f.pt").tree["state"]) == 20_000
    torch.save({"order": list(range(2_000_000))}, tmp_path / "g.pt")
    assert read_index(tmp_path / "g.pt").tree["order"][-1] == 1_999_999


@pytest.mark.parametrize("form", ["legacy", "plain"])
def test_bounds_where_the_file_does_not_say_how_long_its_pickle_is(tmp_path: Path, form: str) -> None:
    counts = {index: index for index in range(400_000)}
    if form == "legacy":
        torch.save(counts, tmp_path / "f.pt", _use_new_zipfile_serialization=False)
    else:
        (tmp_path / "f.pt").write_bytes(pickle.dumps(counts, 4))
    assert len(read_index(tmp_path / "f.pt").tree) == 400_000


def test_a_bound_that_is_hit_accuses_nobody(tmp_path: Path) -> None:
    torch.save([{} for _ in range(400_000)], tmp_path / "f.pt")
    with pytest.raises(UnsafeError) as caught:
        read_index(tmp_path / "f.pt")
    message = str(caught.value)
    assert "docs/safety.md" in message
    assert "can be sound" in message
    assert "trust" not in message
    assert "attack" not in message
