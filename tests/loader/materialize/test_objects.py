"""Trees made real: tensors that share memory or lie in pieces, objects of known and of allowed types."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rankload.loader.errors import CorruptError, LayoutError, OptionError, UnsafeError
from rankload.loader.exporting.real import RealValues
from rankload.loader.formats.torch_file import read_index
from rankload.loader.materialize.objects import materialize
from rankload.loader.materialize.safe_types import require_safe
from rankload.loader.materialize.tensors import TensorReader
from rankload.loader.saved.regions import Run
from rankload.loader.saved.strided import Box
from rankload.loader.saved.tensor import Piece, SavedTensor, StorageRef, Unread
from rankload.loader.saved.tree import find_unknown
from torch_files import read_whole


def flat_of(tmp_path: Path, numel: int) -> StorageRef:
    """The storage of a saved tensor that counts from 0 on."""
    torch.save(torch.arange(float(numel)), tmp_path / "flat.pt")
    return read_index(tmp_path / "flat.pt").storages[0]


def test_tensors_of_one_storage_share_memory_and_those_in_pieces_have_their_own(tmp_path: Path) -> None:
    storage = flat_of(tmp_path, 60)
    row = SavedTensor.in_storage(storage, "float32", (4,), (1,), 21)
    pieces = SavedTensor.in_pieces(
        "float32",
        (2, 5),
        [
            Piece(Run(0, 4), 20, (1,), storage),
            Piece(Run(4, 1), 50, (1,), storage),
            Piece(Box((1, 0), (1, 5)), 30, (5, 2), storage),
        ],
    )
    tree = {
        "row": row,
        "column": SavedTensor.in_storage(storage, "float32", (3, 2), (1, 3), 21, requires_grad=True),
        "bytes": SavedTensor.in_storage(storage, "uint8", (3,), (1,), 85),
        "pieces": [pieces, pieces],
        "empty": SavedTensor.in_pieces("float32", (0, 2), []),
        "none": SavedTensor.in_storage(StorageRef("nowhere", "0", 0, 0, None), "int64", (2, 0), (7, 1), 3),
    }
    got = materialize(tree, reader=TensorReader())
    assert got["row"].tolist() == [21, 22, 23, 24]
    assert got["column"].tolist() == [[21, 24], [22, 25], [23, 26]]
    assert got["column"].requires_grad
    assert got["bytes"].tolist() == list(torch.tensor([21.0]).numpy().tobytes())[1:4]
    got["row"][0] = 7
    assert got["column"][0, 0] == 7
    assert got["bytes"].tolist() == list(torch.tensor([7.0]).numpy().tobytes())[1:4]
    assert got["pieces"][0].tolist() == [[20, 21, 22, 23, 50], [30, 32, 34, 36, 38]]
    assert got["pieces"][0] is got["pieces"][1]
    assert (got["empty"].shape, got["empty"].dtype) == ((0, 2), torch.float32)
    assert (got["none"].shape, got["none"].dtype) == ((2, 0), torch.int64)


def test_what_lies_in_files_that_were_not_read_is_told(tmp_path: Path) -> None:
    unread = Unread("lies in the files of saved rank 1, which were not read")
    tree = {"rng": [{"cuda": SavedTensor("uint8", (2,), (Piece(Run(0, 2), 0, (1,), unread),))}]}
    with pytest.raises(LayoutError, match="x/rng/0/cuda lies in the files of saved rank 1"):
        materialize(tree, reader=TensorReader(), path="x")


class Point:
    """Stands for a class of the user's."""

    def __init__(self, x: int) -> None:
        self.x = x


class Callback:
    def __init__(self) -> None:
        self.owner = self
        self.values = [torch.ones(2), Point(3)]


def test_unknown_types_need_to_be_allowed(tmp_path: Path) -> None:
    tree = {"state": {"callbacks": {"mine": Callback()}, "point": Point(4), "kind": Point}}
    torch.save(tree, tmp_path / "f.pt")
    index = read_index(tmp_path / "f.pt", name="s3://b/f.pt")
    found = find_unknown(index.tree)
    assert ("state/callbacks/mine", f"{__name__}.Callback") in found
    assert ("state/kind", f"{__name__}.Point") in found
    with pytest.raises(UnsafeError) as caught:
        materialize(index.tree, reader=TensorReader(), file="s3://b/f.pt")
    message = str(caught.value)
    for part in ("s3://b/f.pt", "state/callbacks/mine", f"{__name__}.Callback", "safe_types", "ignore_keys"):
        assert part in message
    with pytest.raises(UnsafeError, match="state/callbacks/mine/values/1"):
        require_safe({"": index.tree}, safe_types=[Callback], file="f")
    for allowed in ([Callback, Point], [f"{__name__}.Callback", f"{__name__}.Point"]):
        got = materialize(index.tree, reader=TensorReader(), safe_types=allowed)
        mine = got["state"]["callbacks"]["mine"]
        assert type(mine) is Callback
        assert mine.owner is mine
        assert mine.values[0].tolist() == [1.0, 1.0]
        assert mine.values[1].x == 3
        assert got["state"]["kind"] is Point
    ignored = {"state": {"x": index.tree["state"]["callbacks"]["mine"].state["values"][0]}}
    require_safe({"": ignored})
    torch.save({"a": Point(1)}, tmp_path / "g.pt")
    hostile = read_index(tmp_path / "g.pt").tree
    hostile["a"].global_name = "no_such_package.Type"
    with pytest.raises(OptionError, match="no_such_package"):
        materialize(hostile, reader=TensorReader(), safe_types=["no_such_package.Type"])


def test_objects_that_refer_to_each_other(tmp_path: Path) -> None:
    shared = [1, 2]
    torch.save({"a": shared, "b": (shared, shared)}, tmp_path / "f.pt")
    got = read_whole(tmp_path / "f.pt")
    assert got["b"][0] is got["a"]
    a: list = []
    a.append(a)
    torch.save(a, tmp_path / "g.pt")
    with pytest.raises(CorruptError, match="contains itself"):
        read_index(tmp_path / "g.pt")


class _SavedAsNamespace:
    """Has a hash, and is saved as what has none."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return SimpleNamespace, ()


@pytest.mark.parametrize(
    "hostile",
    [
        {_SavedAsNamespace(): 1},
        {(0, _SavedAsNamespace()): 1},
        {_SavedAsNamespace()},
        frozenset({_SavedAsNamespace()}),
    ],
    ids=["key", "within a key", "set", "frozenset"],
)
def test_a_key_without_a_hash_is_refused_by_name(tmp_path: Path, hostile: Any) -> None:
    torch.save({"state": {"held": hostile}}, tmp_path / "f.pt")
    with pytest.raises(CorruptError, match=r"state/held has a key, or a set a member, .*SimpleNamespace"):
        read_whole(tmp_path / "f.pt")
    index = read_index(tmp_path / "f.pt")
    with pytest.raises(CorruptError, match="SimpleNamespace"):
        RealValues(TensorReader(), (), "f.pt").real(index.tree, "")
