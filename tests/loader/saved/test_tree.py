"""Walks of a tree: with places and without, which find the same values in the same order."""

from __future__ import annotations

from typing import Any
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.errors import RankloadError
from rankload.loader.saved import tree as tree_module
from rankload.loader.saved.tensor import SavedTensor, StorageRef
from rankload.loader.saved.tree import check_tree, is_unknown, iterate, storages, unknown_values, values
from rankload.loader.saved.values import GlobalName, InertObject

STORAGES = [StorageRef("f", str(n), 64 * n, 64, None) for n in range(3)]
LEAVES = st.one_of(
    st.integers(),
    st.text(max_size=3),
    st.sampled_from(STORAGES).map(lambda one: SavedTensor.in_storage(one, "uint8", (4,), (1,))),
    st.sampled_from(["torch.float32", "mine.Kind"]).map(GlobalName),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=2), st.integers()), inner, max_size=4),
        st.tuples(inner, inner),
        st.builds(lambda state, args: InertObject("mine.Thing", args=(args,), state=state), inner, inner),
    ),
    max_leaves=20,
)


@given(TREES)
def test_values_are_those_of_iterate(tree: Any) -> None:
    shared = {"a": tree, "b": [tree, 3, tree]}
    assert list(map(id, values(shared))) == [id(value) for _, value in iterate(shared)]
    assert [id(one) for _, one in unknown_values(shared)] == [
        id(value) for value in values(shared) if is_unknown(value)
    ]


def test_storages_are_told_once_in_order() -> None:
    first, second, third = (SavedTensor.in_storage(one, "uint8", (4,), (1,)) for one in STORAGES)
    assert storages({"x": [third, first], "y": (first, {"z": second})}) == [
        STORAGES[2],
        STORAGES[0],
        STORAGES[1],
    ]


@st.composite
def shared_trees(draw: st.DrawFn) -> Any:
    """Containers and objects, of which later ones hold some of those before."""
    made: list[Any] = [1, "text", (), {}, []]
    for _ in range(draw(st.integers(1, 12))):
        inside = draw(st.lists(st.sampled_from(range(len(made))), max_size=4))
        items = [made[index] for index in inside]
        kind = draw(st.sampled_from(["list", "tuple", "dict", "numbered", "object"]))
        if kind == "object":
            made.append(
                InertObject("a.B", tuple(items[:2]), state=items[2] if items[2:] else None, items=items[3:])
            )
        elif kind == "dict":
            made.append({f"k{index}": item for index, item in enumerate(items)})
        elif kind == "numbered":
            made.append(dict(enumerate(items)))
        else:
            made.append(items if kind == "list" else tuple(items))
    return made[-1]


@given(shared_trees(), st.integers(1, 4), st.integers(0, 40))
def test_flat_containers_count_as_any_others(tree: Any, depth: int, unshared: int) -> None:
    """What holds no containers is looked at as a whole, with the outcome of a look at each of its values."""

    def outcome() -> str:
        try:
            check_tree(tree, name="f")
        except RankloadError as error:
            return str(error)
        return "sound"

    with mock.patch.multiple(tree_module, MAX_DEPTH=depth, MAX_UNSHARED=unshared):
        found = outcome()
        with mock.patch.object(tree_module, "_is_flat", return_value=False):
            assert outcome() == found
