"""Saved values: what messages call them, and what a saved tensor says of itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from rankload.loader.saved.regions import CoverageError, Run
from rankload.loader.saved.strided import Box
from rankload.loader.saved.tensor import Piece, SavedTensor, StorageRef, Unread
from rankload.loader.saved.tree import storages, tensors
from rankload.loader.saved.values import GlobalName, InertArray, InertObject, kind_of

STORAGE = StorageRef("f", "0", 0, 400, None)
OTHER = StorageRef("g", "0", 64, 400, None)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (SavedTensor.in_storage(STORAGE, "float32", (1,), (1,)), "tensor"),
        (SavedTensor("float32", (3,), (Piece(Run(0, 3), 0, (1,), Unread("is not here")),)), "tensor"),
        (InertObject("torch.device", ("cpu",)), "torch.device"),
        (InertArray("<f4", (1,), bytes(4)), "NumPy array"),
        (GlobalName("torch.float32"), "torch.float32"),
        ({}, "dict"),
        (None, "NoneType"),
    ],
)
def test_a_saved_value_is_called_what_it_was(value: Any, kind: str) -> None:
    assert kind_of(value) == kind


def test_a_tensor_in_one_storage() -> None:
    tensor = SavedTensor.in_storage(STORAGE, "float32", (2, 3), (3, 1), 5, requires_grad=True)
    piece = tensor.whole
    assert piece is not None
    assert (piece.region, piece.offset, piece.stride, piece.storage) == (
        Box((0, 0), (2, 3)),
        5,
        (3, 1),
        STORAGE,
    )
    assert (tensor.numel, tensor.itemsize, tensor.nbytes, tensor.requires_grad) == (6, 4, 24, True)
    assert tensor.storages == (STORAGE,)
    assert tensor.is_contiguous
    assert not SavedTensor.in_storage(STORAGE, "float32", (2, 3), (1, 2)).is_contiguous
    assert SavedTensor.in_storage(STORAGE, "float32", (2, 1, 3), (3, 77, 1)).is_contiguous
    assert SavedTensor.in_storage(STORAGE, "float32", (2, 0), (9, 9)).is_contiguous
    for again in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
        assert (again.shape, again.pieces[0].storage, again.pieces[0].stride) == ((2, 3), STORAGE, (3, 1))


def test_a_tensor_in_pieces_has_them_in_order() -> None:
    parts = [
        Piece(Run(4, 2), 1, (1,), Unread("is not here")),
        Piece(Run(4, 0), 0, (1,), OTHER),
        Piece(Run(0, 2), 9, (1,), STORAGE),
        Piece(Run(2, 2), 0, (1,), STORAGE),
    ]
    tensor = SavedTensor.in_pieces("bfloat16", (2, 3), parts)
    # Those without elements are left out.
    assert tensor.pieces == (parts[2], parts[3], parts[0])
    assert tensor.whole is None
    assert not tensor.is_contiguous
    assert tensor.storages == (STORAGE,)
    assert tensor.nbytes == 12
    with pytest.raises(CoverageError, match="element 2 is in none"):
        SavedTensor.in_pieces("bfloat16", (2, 3), parts[:3])
    empty = SavedTensor.in_pieces("bfloat16", (0, 3), parts[1:2])
    assert (empty.pieces, empty.whole, empty.storages, empty.is_contiguous) == ((), None, (), True)


def test_what_is_not_known_is_no_whole() -> None:
    for region, stride, place in (
        (Box((0,), (3,)), (1,), Unread("is not here")),
        (Run(0, 3), (1,), STORAGE),
    ):
        assert SavedTensor("float32", (3,), (Piece(region, 0, stride, place),)).whole is None


def test_tensors_of_a_tree_and_their_storages() -> None:
    one = SavedTensor.in_storage(STORAGE, "float32", (2,), (1,))
    two = SavedTensor.in_pieces(
        "float32", (3,), [Piece(Run(0, 2), 0, (1,), OTHER), Piece(Run(2, 1), 0, (1,), STORAGE)]
    )
    tree = {"a": [two, {"b": one}], "c": InertObject("x.y", state={"t": one}), "d": 3}
    assert tensors(tree, path="top") == [("top/a/0", two), ("top/a/1/b", one), ("top/c/t", one)]
    assert storages(tree) == [OTHER, STORAGE]
