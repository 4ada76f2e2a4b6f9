from __future__ import annotations

from rankload.loader.saved.regions import whole_box
from rankload.loader.saved.tensor import Piece, SavedTensor, StorageRef, Unread
from rankload.loader.saved.ties import tied_names


def tensor(storage: StorageRef | Unread, shape: tuple[int, ...] = (2, 3)) -> SavedTensor:
    return SavedTensor("float32", shape, (Piece(whole_box(shape), 0, (3, 1), storage),))


def stored(key: str) -> StorageRef:
    return StorageRef("file.pt", key, 0, 24, None)


def test_names_in_one_place_are_tied_to_the_first() -> None:
    one, other = stored("0"), stored("1")
    tensors = {"a": tensor(one), "b": tensor(other), "c": tensor(one), "d": tensor(one)}
    assert tied_names(tensors, {}) == {"c": "a", "d": "a"}


def test_what_the_checkpoint_says_comes_first() -> None:
    tensors = {"a": tensor(stored("0")), "b": tensor(stored("1")), "c": tensor(stored("0"))}
    assert tied_names(tensors, {"b": "c"}) == {"b": "a", "c": "a"}
    assert tied_names(tensors, {"b": "gone"}) == {"c": "a"}
    assert tied_names({**tensors, "b": tensor(stored("1"), (3, 2))}, {"b": "c"}) == {"c": "a"}


def test_nothing_is_said_of_elements_that_were_not_read_or_are_none() -> None:
    """They look alike, whatever they are."""
    unread = Unread("lies in a file that was not read")
    assert tied_names({"a": tensor(unread), "b": tensor(unread)}, {}) == {}
    blank = SavedTensor("float32", (2, 3), ())
    assert tied_names({"a": blank, "b": blank}, {}) == {}
    empty = tensor(stored("0"), (0, 3))
    assert tied_names({"a": empty, "b": empty}, {}) == {}
