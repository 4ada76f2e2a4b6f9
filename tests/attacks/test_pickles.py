"""Hostile pickles: nothing in them runs or takes undue memory or time; the next file is read as ever."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks import measured, most, tried
from hostile_pickles import (
    Call,
    disguised,
    evil_bytes,
    gadgets,
    in_a_dict,
    payloads,
    push,
    text,
)
from hostile_tars import entry, tar_bytes
from places import SUPPORT
from rankload.loader.errors import CorruptError, FormatError, RankloadError, UnsafeError
from rankload.loader.formats.dcp_metadata import read_metadata
from rankload.loader.formats.torch_file import read_index
from rankload.loader.materialize.objects import materialize
from rankload.loader.materialize.tensors import TensorReader
from rankload.loader.saved.tree import check_tree, iterate
from rankload.loader.saved.values import InertObject
from torch_files import legacy_with, outcome, read_whole, zip_with

NAMES = list(payloads(Path("x")))


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("attack", NAMES)
def test_nothing_runs(tmp_path: Path, attack: str, kind: str) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "f.pt"
    (zip_with if kind == "zip" else legacy_with)(payloads(canary)[attack], path)
    with contextlib.suppress(UnsafeError, CorruptError):
        read_index(path)
    with contextlib.suppress(UnsafeError, CorruptError):
        read_whole(path)
    if attack not in ("as a factory", "as a persistent id"):
        with pytest.raises((UnsafeError, CorruptError)):
            read_whole(path)
    assert not canary.exists()


def test_the_payloads_would_run(tmp_path: Path) -> None:
    ran = 0
    for name, data in payloads(tmp_path / "canary").items():
        if name in ("subprocess", "exec"):
            continue
        with contextlib.suppress(Exception):
            pickle.loads(data)
        ran += (tmp_path / "canary").exists()
        (tmp_path / "canary").unlink(missing_ok=True)
    # The rest need torch's or numpy's own functions around them.
    assert ran >= 8


def test_an_unknown_global_in_an_ignored_part_does_no_harm(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save(
        {"model": {"w": torch.ones(2)}, "callbacks": Call(os.system, f"touch {canary}")}, tmp_path / "f.pt"
    )
    tree = read_index(tmp_path / "f.pt").tree
    assert isinstance(tree["callbacks"], InertObject)
    del tree["callbacks"]
    assert materialize(tree, reader=TensorReader())["model"]["w"].tolist() == [1.0, 1.0]
    assert not canary.exists()


PATCHES = {
    "state of a builder": b"ctorch._utils\n_rebuild_tensor_v2\n}X\x04\x00\x00\x00nameNsb0",
    "slots of a builder": b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x05\x00\x00\x00_makeNstb0",
    "state of a class": b"ccollections\nOrderedDict\n}X\x05\x00\x00\x00itemsNsb0",
    "slots of a class": b"ccollections\nOrderedDict\n(N}X\x09\x00\x00\x00__class__NstbO0",
    "slots of an object's type": b"cdatetime\ntimedelta\n(N}X\x04\x00\x00\x00daysNstb0",
    "item of a class": b"ccollections\nOrderedDict\nX\x01\x00\x00\x00aNs0",
    "append to a function": b"c_codecs\nencode\nNa0",
}


@pytest.mark.parametrize("patch", list(PATCHES))
def test_the_next_file_is_read_as_ever(tmp_path: Path, patch: str) -> None:
    kept = {"w": torch.arange(3.0), "o": collections.OrderedDict(a=1)}
    torch.save(kept, tmp_path / "good.pt")
    zip_with(b"\x80\x02" + PATCHES[patch] + b"N.", tmp_path / "bad.pt")
    assert outcome(tmp_path / "bad.pt") in ("UnsafeError", "CorruptError")
    got = read_whole(tmp_path / "good.pt")
    assert got["w"].tolist() == [0.0, 1.0, 2.0]
    assert got["o"] == {"a": 1}


def doubling(levels: int) -> bytes:
    """Billion laughs: a list of two of the same list, and so on."""
    return (
        b"\x80\x02]q\x000"
        + b"".join(
            b"](h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) + b"0" for n in range(levels)
        )
        + b"h"
        + bytes([levels])
        + b"."
    )


def chain(links: int) -> bytes:
    """Lists inside one another, built from inside outward so that no part of the stack is deep."""
    parts = [b"\x80\x02]q\x000"]
    for n in range(links):
        parts.append(b"]r" + struct.pack("<I", n + 1) + b"j" + struct.pack("<I", n) + b"a0")
    return b"".join(parts) + b"j" + struct.pack("<I", links) + b"."


def late_chain(links: int) -> bytes:
    """The same from outside inward: every list is put into the one before while both are empty."""
    parts = [b"\x80\x02]q\x000"]
    for n in range(links):
        parts.append(b"j" + struct.pack("<I", n) + b"]r" + struct.pack("<I", n + 1) + b"a0")
    return b"".join(parts) + b"j" + struct.pack("<I", 0) + b"."


BOMBS: dict[str, bytes] = {
    "memo index 100,000,000": b"\x80\x02Nr\x00\xe1\xf5\x05.",
    "memo index as high as the file is long": b"\x80\x02"
    + text("a" * 30_000_000)
    + b"r"
    + struct.pack("<I", 30_000_000)
    + b".",
    "length of 2 GiB": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "frame of an exabyte": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x0fN.",
    "a million lists deep": b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "a million tuples deep": b"N" + b"\x85" * 1_000_000 + b".",
    "tuple to hash for ever": b"\x80\x02}K\x01\x85" + b"2\x86" * 60 + b"Ns.",
    "billion laughs": doubling(60),
    "chain outward": chain(100_000),
    "chain inward": late_chain(100_000),
    "ten million lists": b"\x80\x02(" + b"]" * 10_000_000 + b"l.",
    "ten million dicts": b"\x80\x02(" + b"}" * 10_000_000 + b"l.",
    "five million numbers": b"\x80\x02(" + b"J\0\1\2\3" * 5_000_000 + b"l.",
    "ten million nothings": b"\x80\x02(" + b"N" * 10_000_000 + b"l.",
    "a million memo entries": b"\x80\x02" + b"]q\x000" * 1_000_000 + b"N.",
    "copies of a megabyte": b"\x80\x02"
    + text("a" * (1 << 20))
    + b"q\x000c_codecs\nencode\nq\x010"
    + b"h\x01h\x00\x85R0" * 3000
    + b"N.",
    "bytearray of 2 GiB": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "sets of one list": b"\x80\x02]("
    + b"K\x01" * 100_000
    + b"eq\x000"
    + b"c__builtin__\nset\nh\x00\x85R0" * 5000
    + b"N.",
    "a string that one character widens": b"\x80\x02" + text("a" * 20_000_000 + "\U0001f600") + b".",
    "tuples through a call": b"\x80\x02c__builtin__\ntuple\nq\x000]K\x01aq\x010"
    + b"h\x00](h\x01h\x01e\x85Rq\x010" * 60
    + b"}h\x01Ns.",
}


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("bomb", list(BOMBS))
def test_bombs(tmp_path: Path, bomb: str, kind: str) -> None:
    path = (zip_with if kind == "zip" else legacy_with)(BOMBS[bomb], tmp_path / "f.pt")
    said, grown, seconds = measured(path)
    assert said in ("UnsafeError", "CorruptError", "read")
    assert grown <= most(path), f"{grown >> 20} MiB for {path.stat().st_size:,} bytes"
    assert seconds < 30


def test_trees_that_no_walk_gets_through(tmp_path: Path) -> None:
    for bomb, error in (("billion laughs", UnsafeError), ("chain outward", UnsafeError)):
        zip_with(BOMBS[bomb], tmp_path / "f.pt")
        with pytest.raises(error):
            read_index(tmp_path / "f.pt")
    # Inside an object of the file's, where loops are in order, walks still end.
    loop: list[Any] = []
    loop.append(InertObject("a.B", state={"self": loop}))
    check_tree({"a": loop}, name="f")
    assert len(list(iterate(loop))) < 10


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")


def tensor(numel: bytes, offset: bytes, shape: bytes, stride: bytes) -> bytes:
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + numel
        + b"tQ"
        + offset
        + shape
        + stride
        + b"\x89}tR."
    )


def many_tensors(count: int, shape: bytes) -> bytes:
    """A list of tensors, all by the same arguments: of that shape, which is their strides too."""
    args = b"(" + STORAGE + b"K\x04tQK\x00" + shape + shape + b"\x89}tq\x00"
    return (
        b"\x80\x02(ctorch._utils\n_rebuild_tensor_v2\nq\x01" + args + b"00" + b"h\x01h\x00R" * count + b"l."
    )


@pytest.mark.parametrize(
    ("count", "shape", "expected"),
    [
        (180_000, b"(" + b"K\x00" * 64 + b"t", "read"),
        (1_000_000, b"(" + b"K\x00" * 64 + b"t", "UnsafeError"),
        (43_000, b"](" + b"K\x00" * 64 + b"e", "read"),
        (60_000, b"](" + b"K\x00" * 64 + b"e", "UnsafeError"),
        (43_000, b"ctorch\nSize\n(" + b"K\x00" * 64 + b"t\x85R", "read"),
        (60_000, b"ctorch\nSize\n(" + b"K\x00" * 64 + b"t\x85R", "UnsafeError"),
    ],
)
def test_tensors_without_end(tmp_path: Path, count: int, shape: bytes, expected: str) -> None:
    path = zip_with(many_tensors(count, shape), tmp_path / "f.pt", storages={"0": bytes(16)})
    said, grown, _ = measured(path)
    assert said == expected
    assert grown <= most(path), f"{grown >> 20} MiB for {path.stat().st_size:,} bytes"


def test_storages_without_end(tmp_path: Path) -> None:
    pid = STORAGE + b"K\x04tq\x00"
    for count, expected in ((170_000, "read"), (1_000_000, "UnsafeError")):
        data = b"\x80\x02(" + pid + b"0" + b"h\x00Q" * count + b"l."
        path = zip_with(data, tmp_path / "f.pt", storages={"0": bytes(16)})
        said, grown, _ = measured(path)
        assert said == expected
        assert grown <= most(path), f"{grown >> 20} MiB for {path.stat().st_size:,} bytes"


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "stride"),
    [
        (b"J\xff\xff\xff\x7f", b"K\x00", b"K\x01\x85", b"K\x01\x85"),
        (b"K\x05", b"K\x00", b"K\x05\x85", b"K\x01\x85"),
        (b"K\x04", b"K\x01", b"K\x04\x85", b"K\x01\x85"),
        (b"K\x04", b"K\x00", b"K\x02\x85", b"K\x04\x85"),
        (b"K\x04", b"J\xff\xff\xff\xff", b"K\x02\x85", b"K\x01\x85"),
        (b"K\x04", b"K\x00", b"J\xff\xff\xff\xff\x85", b"K\x01\x85"),
        (b"J\xff\xff\xff\xff", b"K\x00", b"K\x01\x85", b"K\x01\x85"),
        (b"X\x01\x00\x00\x004", b"K\x00", b"K\x01\x85", b"K\x01\x85"),
    ],
)
def test_sizes_that_lie(tmp_path: Path, numel: bytes, offset: bytes, shape: bytes, stride: bytes) -> None:
    good = tensor(b"K\x04", b"K\x00", b"K\x04\x85", b"K\x01\x85")
    zip_with(good, tmp_path / "g.pt", storages={"0": struct.pack("<4f", 1, 2, 3, 4)})
    assert read_whole(tmp_path / "g.pt").tolist() == [1.0, 2.0, 3.0, 4.0]
    bad = tensor(numel, offset, shape, stride)
    zip_with(bad, tmp_path / "f.pt", storages={"0": struct.pack("<4f", 1, 2, 3, 4)})
    with pytest.raises(CorruptError):
        read_index(tmp_path / "f.pt")


def shared_tensor(dtype: str, shape: bytes, stride: bytes, numel: int = 4) -> bytes:
    """A tensor over storage "0", of that storage class."""
    pid = b"(" + text("storage") + b"ctorch\n" + dtype.encode() + b"\n" + text("0") + text("cpu")
    args = pid + b"K" + bytes([numel]) + b"tQK\x00" + shape + stride + b"\x89}tR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + args


def sparse(indices: bytes, values: bytes, shape: bytes) -> bytes:
    """A pickle of a sparse COO tensor of those parts."""
    layout = b"ctorch.serialization\n_get_layout\n" + text("torch.sparse_coo") + b"\x85R"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n"
        + layout
        + b"("
        + indices
        + values
        + shape
        + b"t\x86R."
    )


INDICES = shared_tensor("LongStorage", b"K\x01K\x02\x86", b"K\x02K\x01\x86", 2)
VALUES = shared_tensor("FloatStorage", b"K\x02\x85", b"K\x01\x85")
QUANTIZED = (
    b"\x80\x02ctorch._utils\n_rebuild_qtensor\n(("
    + text("storage")
    + b"ctorch\nQInt8Storage\n"
    + text("0")
    + text("cpu")
    + b"K\x04tQK\x00"
)


def test_a_shape_that_nothing_can_hold_is_refused_though_it_has_no_elements(tmp_path: Path) -> None:
    huge = b"\x8a\x08" + (2**61).to_bytes(8, "little")
    shape, storage = b"K\x00" + huge + huge + b"\x87", {"0": b""}
    plain = shared_tensor("FloatStorage", shape, b"K\x01K\x01K\x01\x87", 0)
    empty = shared_tensor("FloatStorage", b"K\x00\x85", b"K\x01\x85", 0)
    none = shared_tensor("LongStorage", b"K\x03K\x00\x86", b"K\x00K\x01\x86", 0)
    array = (
        b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01"
        + shape
        + b"cnumpy\ndtype\n" + text("f4") + b"\x89\x88\x87R(K\x03" + text("<") + b"NNN"
        + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89C\x00tb"
    )  # fmt: skip
    for name, data in (
        ("plain", b"\x80\x02" + plain + b"."),
        ("sparse", sparse(none, empty, shape)),
        ("array", b"\x80\x03" + array + b"."),
    ):
        with pytest.raises(CorruptError, match="which nothing can hold"):
            pytest.fail(f"{name}: {read_whole(zip_with(data, tmp_path / 'f.pt', storages=storage))}")


@pytest.mark.parametrize("layout", ["torch._inductor", "_dynamo", "torch.onnx", "torch.no_such_layout"])
def test_what_a_file_names_as_a_layout_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "__getattr__", asked.append)  # by which torch imports some modules
    data = b"\x80\x02ctorch.serialization\n_get_layout\n" + text(layout) + b"\x85R."
    with pytest.raises(FormatError, match="does not know as a layout"):
        read_whole(zip_with(data, tmp_path / "f.pt"))
    assert asked == []


def test_sparse_tensors_that_lie(tmp_path: Path) -> None:
    storage = {"0": struct.pack("<2q", 0, 5)}
    good = zip_with(sparse(INDICES, VALUES, b"K\x06\x85"), tmp_path / "g.pt", storages=storage)
    assert read_whole(good).shape == (6,)
    huge = zip_with(sparse(INDICES, VALUES, b"J\xff\xff\xff\x7f\x85"), tmp_path / "h.pt", storages=storage)
    assert read_whole(huge)._nnz() == 2
    expanded = shared_tensor("FloatStorage", b"J\xff\xff\xff\x7f\x85", b"K\x00\x85")
    many = shared_tensor("LongStorage", b"K\x01J\xff\xff\xff\x7f\x86", b"K\x00K\x00\x86", 2)
    for name, data, error in (
        ("beyond its shape", sparse(INDICES, VALUES, b"K\x05\x85"), CorruptError),
        ("of other dimensions", sparse(INDICES, VALUES, b"K\x06K\x06\x86"), CorruptError),
        ("without its shape", sparse(INDICES, VALUES, b"N"), CorruptError),
        ("of repeated elements", sparse(many, expanded, b"K\x06\x85"), FormatError),
    ):
        path = zip_with(data, tmp_path / "f.pt", storages=storage)
        with pytest.raises(error):
            pytest.fail(f"{name}: {read_whole(path)}")


def test_one_storage_for_very_many_sparse_tensors(tmp_path: Path) -> None:
    size = 1 << 20
    values = shared_tensor("ByteStorage", b"J" + struct.pack("<i", size) + b"\x85", b"K\x01\x85")
    values = values.replace(b"K\x04tQ", b"J" + struct.pack("<i", size) + b"tQ")
    indices = shared_tensor(
        "LongStorage", b"K\x00J" + struct.pack("<i", size) + b"\x86", b"K\x01K\x01\x86", 2
    )
    one = sparse(indices, values, b")")[2:-1]
    data = b"\x80\x02(" + one * 200 + b"l."
    path = zip_with(data, tmp_path / "f.pt", storages={"0": bytes(size)})
    with pytest.raises(UnsafeError, match="sparse and quantized tensors would take"):
        read_index(path)


@pytest.mark.parametrize(
    ("shape", "stride", "scheme", "error"),
    [
        (b"K\x04\x85", b"K\x01\x85", b"ctorch\nper_tensor_affine\nG?\xf0\0\0\0\0\0\0K\x00\x87", None),
        (b"K\x11\x85", b"K\x01\x85", b"ctorch\nper_tensor_affine\nG?\xf0\0\0\0\0\0\0K\x00\x87", CorruptError),
        (b"K\x04\x85", b"K\x01\x85", b"ctorch\nper_tensor_affine\nNN\x87", CorruptError),
        (b"K\x04\x85", b"K\x01\x85", b"(ctorch\nper_channel_affine\n" + VALUES * 2 + b"K\x07t", CorruptError),
        (b"K\x04\x85", b"K\x01\x85", b"(ctorch\nper_channel_affine\n" + VALUES * 2 + b"K\x00t", CorruptError),
        (
            b"J\xff\xff\xff\x7f\x85",
            b"K\x00\x85",
            b"ctorch\nper_tensor_affine\nG?\xf0\0\0\0\0\0\0K\x00\x87",
            FormatError,
        ),
    ],
)
def test_quantized_tensors_that_lie(
    tmp_path: Path, shape: bytes, stride: bytes, scheme: bytes, error: type[RankloadError] | None
) -> None:
    data = QUANTIZED + shape + stride + scheme + b"\x89}tR."
    path = zip_with(data, tmp_path / "f.pt", storages={"0": bytes(range(16))})
    if error is None:
        assert read_whole(path).int_repr().tolist() == [0, 1, 2, 3]
    else:
        with pytest.raises(error):
            read_whole(path)


def test_a_file_in_memory_at_a_place_beyond_its_end(tmp_path: Path) -> None:
    stream = io.BytesIO(b"abc")
    torch.save(stream, tmp_path / "g.pt")
    assert read_whole(tmp_path / "g.pt").getvalue() == b"abc"
    stream.seek(1 << 60)
    torch.save(stream, tmp_path / "f.pt")
    with pytest.raises(CorruptError):
        read_whole(tmp_path / "f.pt")


def test_a_storage_that_is_not_there(tmp_path: Path) -> None:
    zip_with(tensor(b"K\x04", b"K\x00", b"K\x04\x85", b"K\x01\x85"), tmp_path / "f.pt")
    with pytest.raises(CorruptError, match="not in the file"):
        read_index(tmp_path / "f.pt")


# --- what passed scanners, and torch's own safe loading ---------------------------------------------------------------


def test_calls_that_scanners_took_for_harmless_are_refused(tmp_path: Path) -> None:
    canary = tmp_path / "out" / "canary"
    for name, data in gadgets(canary).items():
        assert "read" not in tried(zip_with(data, tmp_path / "f.pt")), name
        for path in (legacy_with(data, tmp_path / "l.pt"), tmp_path / "p.pkl"):
            if path.name == "p.pkl":
                path.write_bytes(data)
            assert outcome(path) != "read", (name, path)
    assert not canary.parent.exists()


REALLY_RUNS = """
import pickle, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from hostile_pickles import gadgets
canary = Path(sys.argv[1])
ran = []
for name in sys.argv[3:]:
    try: pickle.loads(gadgets(canary)[name])
    except BaseException: pass
    if canary.exists():
        ran.append(name)
        canary.unlink()
print(",".join(ran))
"""


def test_the_calls_would_do_harm(tmp_path: Path) -> None:
    """A sample, run by Python's own unpickler: else a refusal would show nothing."""
    sample = (
        "profile:run",
        "cProfile:run",
        "pydoc:pipepager",
        "runpy:_run_code",
        "posix:system",
        "pty:spawn",
        "os:popen",
        "uuid:_get_command_stdout",
        "logging:FileHandler",
        "io:FileIO",
        "imaplib:IMAP4_stream",
    )
    run = subprocess.run(
        [sys.executable, "-c", REALLY_RUNS, str(tmp_path / "canary"), str(SUPPORT), *sample],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    ran = run.stdout.strip().splitlines()[-1].split(",")
    assert len(ran) >= 9, (ran, run.stderr)


HARMLESS = {
    "build that calls setattr": "namespace()",
    "build with a state that is called": "OrderedDict()",
    "popped before the end": "None",
    "below a mark that is popped": "None",
    "as a tensor's hooks": "tensor([0., 0., 0., 0.])",
}
"""Of which nothing is left in what is read: how the value is shown."""


def test_disguised_calls_are_refused_or_leave_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "out" / "canary"
    for name, data in disguised(canary).items():
        path = zip_with(data, tmp_path / "f.pt", storages={"0": bytes(16)})
        said = tried(path)
        if name in HARMLESS:
            assert repr(read_whole(path)["a"]) == HARMLESS[name], name
        else:
            assert "read" not in said, name
        (tmp_path / "p.pkl").write_bytes(data)
        tried(tmp_path / "p.pkl")
    assert not canary.parent.exists()


TENSOR = shared_tensor("FloatStorage", b"K\x04\x85", b"K\x01\x85")
PID = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
WEIGHTS_ONLY: dict[str, bytes] = {
    # CVE-2026-24747: opcodes for dicts and lists that reach what is none, and counts that the records do not have.
    "an item of a tensor": TENSOR + b"K\x00G?\xf0\0\0\0\0\0\0s",
    "items of a tensor": TENSOR + b"(J\xff\xff\xff\x7fK\x01K\x02K\x03u",
    "an item of a storage": PID + b"J\0\1\0\0K\x41s",
    "an item of a tuple": b"K\x01\x85K\x00K\x02s",
    "an item of a text": text("x") + b"K\x00" + text("y") + b"s",
    "an item of a bytearray": b"\x96\4\0\0\0\0\0\0\0abcdK\x00K\x01s",
    "an item of a number": b"K\x01K\x00K\x02s",
    "an item of a size": b"ctorch\nSize\n(K\x01K\x02t\x85RK\x00K\x02s",
    "an item of a dtype": b"ctorch\nfloat32\nK\x00K\x02s",
    "appended to a tensor": TENSOR + b"K\x01a",
    "many appended to a tensor": TENSOR + b"(K\x01K\x02e",
    "appended to a bytearray": b"\x96\0\0\0\0\0\0\0\0K\x01a",
    "added to a tensor": TENSOR + b"(K\x01\x90",
    "a tensor's state": TENSOR + b"}b",
    "a tensor's state with its class": TENSOR + b"(" + push({}) + push({"__class__": 1}) + b"tb",
    "a storage's state": PID + b"(K\x01K\x02tb",
    "more elements than the record has": PID.replace(b"K\x04", b"J\xff\xff\xff\x7f"),
    "fewer elements than below none": PID.replace(b"K\x04", b"J\xff\xff\xff\xff"),
    "elements as text": PID.replace(b"K\x04", text("4")),
    "one record as two types": b"(" + PID + PID.replace(b"FloatStorage", b"ComplexDoubleStorage") + b"t",
    "a type that is no storage": PID.replace(b"torch\nFloatStorage", b"torch\nTensor"),
    "a storage of another file": PID.replace(text("0"), text("../../version")),
    "a view of a storage, beyond it": b"ctorch._utils\n_rebuild_tensor_v2\n("
    + PID
    + b"J\xff\xff\xff\x7fK\x01\x85K\x01\x85\x89}tR",
    "a stride that overflows": b"ctorch._utils\n_rebuild_tensor_v2\n("
    + PID
    + b"K\x00K\x02\x85\x8a\x08"
    + b"\xff" * 7
    + b"\x7f\x85\x89}tR",
    "a negative stride": b"ctorch._utils\n_rebuild_tensor_v2\n("
    + PID
    + b"K\x03K\x04\x85J\xff\xff\xff\xff\x85\x89}tR",
    # What torch.load has called for tensors of other kinds.
    "a tensor of a nested torch file": b"ctorch.storage\n_load_from_bytes\n"
    + evil_bytes(b"\x80\x02cos\nsystem\n)R.")
    + b"\x85R",
    "an array on another device": b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n(Nctorch\nfloat32\n"
    + text("cuda")
    + b"\x89tR",
    "a sparse tensor whose indices lie": sparse(
        shared_tensor("LongStorage", b"K\x01K\x02\x86", b"K\x02K\x01\x86", 2),
        TENSOR,
        b"J\xff\xff\xff\x7f\x85",
    )[2:-1],
    "a compressed tensor without its parts": b"ctorch._utils\n_rebuild_sparse_tensor\n"
    + b"ctorch.serialization\n_get_layout\n"
    + push(("torch.sparse_csr",))
    + b"R("
    + TENSOR
    + TENSOR
    + b"t\x86R",
    "integers that require gradients": INDICES.replace(b"\x89}tR", b"\x88}tR"),
    "a parameter of integers": b"ctorch._utils\n_rebuild_parameter\n(" + INDICES + b"\x88}tR",
    "a nested tensor": b"ctorch._utils\n_rebuild_nested_tensor\n(" + TENSOR * 4 + b"tR",
    "a wrapper of other tensors": b"ctorch._utils\n_rebuild_wrapper_subclass\n(ctorch\nTensor\nctorch\nfloat32\n"
    + push((4,))
    + push((1,))
    + b"K\x00NN\x89tR",
}
"""Values of a dict that torch's own restricted unpickler took at some time, or makes by its C++ code."""


@pytest.mark.parametrize("attack", WEIGHTS_ONLY)
def test_what_torchs_safe_loading_let_through(tmp_path: Path, attack: str) -> None:
    storages = {"0": struct.pack("<4f", 1, 2, 3, 4)}
    path = zip_with(in_a_dict(WEIGHTS_ONLY[attack]), tmp_path / "f.pt", storages=storages)
    assert "read" not in tried(path)


def test_a_pickle_in_a_tensors_bytes_stays_bytes(tmp_path: Path) -> None:
    canary = tmp_path / "out" / "canary"
    evil = payloads(canary)["reduce os.system"]
    torch.save(
        {"t": torch.frombuffer(bytearray(evil), dtype=torch.uint8), "io": io.BytesIO(evil)}, tmp_path / "f.pt"
    )
    assert tried(tmp_path / "f.pt") == {"read"}
    got = read_whole(tmp_path / "f.pt")
    assert bytes(got["t"].tolist()) == got["io"].getvalue() == evil
    assert not canary.parent.exists()


@pytest.mark.parametrize(
    "name", ["f.pt", "f.pkl", "f.bin", "f.npy", "f.joblib", "f.txt", "f", "f.safetensors", "f.json"]
)
def test_a_files_name_does_not_choose_its_reader(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "out" / "canary"
    for data in (
        payloads(canary)["stack global"],
        zip_with(payloads(canary)["eval"], tmp_path / "z").read_bytes(),
    ):
        (tmp_path / name).write_bytes(data)
        assert "read" not in tried(tmp_path / name)
    assert not canary.parent.exists()


def test_files_of_other_kinds_that_hold_pickles_are_not_opened(tmp_path: Path) -> None:
    """A 7z archive, a NumPy file with objects, and the tar of torch before 0.1.10 (CVE-2025-32434)."""
    canary = tmp_path / "out" / "canary"
    evil = payloads(canary)["reduce os.system"]
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    old = tar_bytes(
        entry("sys_info", push({}) + b"."), *(entry(name, evil) for name in ("pickle", "storages", "tensors"))
    )
    for data in (
        b"7z\xbc\xaf\x27\x1c\0\x04" + evil,
        b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + evil,
        old,
    ):
        (tmp_path / "f.pt").write_bytes(data)
        assert "read" not in tried(tmp_path / "f.pt")
    assert not canary.parent.exists()


def test_code_in_a_torchscript_archive_is_not_run(tmp_path: Path) -> None:
    """torch.load takes such a file for one of its own in no mode now; weights_only=True did (CVE-2025-32434)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in (
            ("data.pkl", payloads(tmp_path / "out" / "canary")["eval"]),
            ("constants.pkl", b"\x80\x02)."),
            ("code/__torch__.py", b"def forward(self): return 1"),
            ("version", b"3"),
        ):
            archive.writestr(f"archive/{name}", data)
    (tmp_path / "f.pt").write_bytes(stream.getvalue())
    assert tried(tmp_path / "f.pt") == {"FormatError"}


DCP = ("torch.distributed.checkpoint.metadata", "Metadata")


def test_a_dcp_folders_metadata_runs_nothing(tmp_path: Path) -> None:
    """torch.distributed.checkpoint reads this file by pickle.load."""
    canary = tmp_path / "out" / "canary"
    hidden = {
        "in its state": b"c%b\n%b\n)\x81}" % tuple(part.encode() for part in DCP) + text("planner_data")
    }
    for name, data in {**payloads(canary), **disguised(canary)}.items():
        (tmp_path / ".metadata").write_bytes(data)
        with pytest.raises(RankloadError):
            pytest.fail(f"{name}: {read_metadata(str(tmp_path / '.metadata'), name=name)}")
    for opcodes in hidden.values():
        (tmp_path / ".metadata").write_bytes(
            b"\x80\x02" + opcodes + b"cos\nsystem\n" + push((f"touch {canary}",)) + b"Rsb."
        )
        with pytest.raises(RankloadError):
            read_metadata(str(tmp_path / ".metadata"), name="m")
    assert not canary.parent.exists()
