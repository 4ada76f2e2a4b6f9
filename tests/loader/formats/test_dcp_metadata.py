"""The ``.metadata`` of a DCP folder: what torch writes, what older ones lack, and what no torch writes."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_pickles import payloads
from places import DATA
from rankload.loader.errors import CorruptError, FormatError, RankloadError, UnsafeError
from rankload.loader.formats.dcp_metadata import Item, Metadata, read_metadata
from rankload.loader.saved.strided import Box
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import Metadata as TorchMetadata

FOLDERS = ("dcp-fsdp2-w2", "dcp-tp-fsdp-w4", "lightning-mp-w2")


def tensor(shape: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> TensorStorageMetadata:
    listed = [ChunkStorageMetadata(torch.Size(starts), torch.Size(sizes)) for starts, sizes in chunks]
    return TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size(shape), listed)


def place(key: str, starts: tuple[int, ...] | None = None) -> MetadataIndex:
    return MetadataIndex(key) if starts is None else MetadataIndex(key, torch.Size(starts))


def usual() -> TorchMetadata:
    """A tensor in two chunks, and an object."""
    return TorchMetadata(
        {"w": tensor((3, 2), ((0, 0), (2, 2)), ((2, 0), (1, 2))), "lr": BytesStorageMetadata()},
        {"w": ("model", "w"), "lr": ("groups", 0, "lr")},
        {
            place("w", (0, 0)): _StorageInfo("__0_0.distcp", 10, 20),
            place("w", (2, 0)): _StorageInfo("__1_0.distcp", 0, 5),
            place("lr"): _StorageInfo("__0_0.distcp", 0, 10),
        },
    )


def read(tree: Any, folder: Path, protocol: int | None = None) -> Metadata:
    path = folder / ".metadata"
    path.write_bytes(tree if isinstance(tree, bytes) else pickle.dumps(tree, protocol))
    return read_metadata(str(path), name="it")


@pytest.mark.parametrize("name", FOLDERS)
def test_all_that_torch_reads(name: str) -> None:
    path = DATA / name / "ckpt/.metadata"
    mine = read_metadata(str(path), name="it")
    theirs = pickle.loads(path.read_bytes())
    assert mine.paths == theirs.planner_data
    kinds = theirs.state_dict_metadata
    assert mine.objects.keys() == {key for key, one in kinds.items() if isinstance(one, BytesStorageMetadata)}
    stored = {
        (index.fqn, None if index.offset is None else tuple(index.offset)): info
        for index, info in theirs.storage_data.items()
    }
    found: dict[Any, Item] = {(key, None): item for key, item in mine.objects.items()}
    for key, one in mine.tensors.items():
        assert f"torch.{one.dtype}" == str(kinds[key].properties.dtype)
        assert one.shape == tuple(kinds[key].size)
        boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in kinds[key].chunks]
        assert list(one.division.boxes) == boxes
        found |= {(key, box.starts): item for box, item in zip(boxes, one.items, strict=True)}
    assert found.keys() == stored.keys()
    for index, item in found.items():
        info = stored[index]
        assert (item.file, item.offset, item.length) == (info.relative_path, info.offset, info.length)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_and_fields_that_are_not_known(protocol: int, tmp_path: Path) -> None:
    made = usual()
    expected = read(made, tmp_path)
    made.mcore_data = {"w": {"nd_reformulated": (1, 2)}}
    del made.__dict__["storage_meta"], made.__dict__["version"]
    made.state_dict_metadata = OrderedDict(made.state_dict_metadata)
    assert read(made, tmp_path, protocol) == expected


def test_without_paths_each_key_is_at_the_top(tmp_path: Path) -> None:
    made = usual()
    made.planner_data = None
    found = read(made, tmp_path)
    assert (found.path_of("w"), found.path_of("a.b")) == (("w",), ("a.b",))


def test_transforms_are_kept(tmp_path: Path) -> None:
    made = usual()
    made.storage_data[place("lr")] = _StorageInfo("__0_0.distcp", 0, 10, ["stream.zstd/1"])
    assert read(made, tmp_path).objects["lr"].transforms == ("stream.zstd/1",)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda one: one.storage_data.pop(place("w", (2, 0))), CorruptError, "does not say where 'w'.*lies"),
        (lambda one: one.storage_data.pop(place("lr")), CorruptError, "does not say where 'lr' lies"),
        (
            lambda one: one.storage_data.update({place("lr"): _StorageInfo("__0_0.distcp", -1, 3)}),
            CorruptError,
            "offset -1",
        ),
        (
            lambda one: one.storage_data.update({place("lr"): _StorageInfo("__0_0.distcp", 1, 1 << 70)}),
            CorruptError,
            "length",
        ),
        (
            lambda one: one.state_dict_metadata.update(w=tensor((3, 2), ((0, 0), (4, 2)))),
            CorruptError,
            "not inside its shape",
        ),
        (
            lambda one: one.state_dict_metadata.update(w=tensor((3, 2), ((0,), (3,)))),
            CorruptError,
            "not inside its shape",
        ),
        (
            lambda one: one.state_dict_metadata.update(w=tensor((1 << 40, 1 << 40))),
            CorruptError,
            "nothing can hold",
        ),
        (
            lambda one: one.state_dict_metadata["w"].properties.__dict__.update(dtype=torch.quint8),
            FormatError,
            "quint8",
        ),
        (lambda one: one.state_dict_metadata.update(w=3), CorruptError, "neither"),
        (lambda one: one.__dict__.update(storage_data=[]), CorruptError, "storage_data is a list"),
        (lambda one: one.planner_data.update(w=("a", -3)), CorruptError, "path"),
    ],
)
def test_what_contradicts_itself_is_refused(change: Any, kind: type, message: str, tmp_path: Path) -> None:
    made = usual()
    change(made)
    with pytest.raises(kind, match=message) as raised:
        read(made, tmp_path)
    assert str(raised.value).startswith("it: ")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../other/__0_0.distcp", "a/../../b", "a\\b", "", ".", "a//b", "a\nb", "x" * 2000]
)
def test_no_file_outside_of_the_folder(name: str, tmp_path: Path) -> None:
    made = usual()
    made.storage_data[place("lr")] = _StorageInfo(name, 0, 10)
    with pytest.raises(UnsafeError, match="its own folder"):
        read(made, tmp_path)


def test_another_pickle_is_no_metadata(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds a dict"):
        read({"a": 1}, tmp_path)


def test_nothing_in_it_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name, payload in payloads(canary).items():
        with pytest.raises(RankloadError):
            read(payload, tmp_path)
        assert not canary.exists(), name


def test_objects_in_it_stay_objects(tmp_path: Path) -> None:
    """Whatever lies where no field is read is neither imported nor called, and does no harm."""
    canary = tmp_path / "canary"

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (canary,)

    made = usual()
    expected = read(made, tmp_path)
    made.storage_meta = Touch()  # type: ignore[assignment]
    made.anything = {"a": Touch()}
    assert read(made, tmp_path) == expected
    assert not canary.exists()
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert canary.exists()


def test_many_entries_are_no_attack(tmp_path: Path) -> None:
    made = usual()
    chunks = [((row, 0), (1, 4)) for row in range(12_000)]
    made.state_dict_metadata["many"] = tensor((12_000, 4), *chunks)
    for starts, _ in chunks:
        made.storage_data[place("many", starts)] = _StorageInfo("__0_0.distcp", 0, 1)
    assert len(read(made, tmp_path).tensors["many"].items) == 12_000


def test_a_file_that_asks_for_more_than_it_is_worth(tmp_path: Path) -> None:
    """A list in a list, many times over, in a few bytes."""
    stream = io.BytesIO(b"\x80\x04]\x94")
    stream.seek(0, io.SEEK_END)
    stream.write(b"]\x94" * 400 + b"a" * 400 + b".")
    with pytest.raises(RankloadError):
        read(stream.getvalue(), tmp_path)
