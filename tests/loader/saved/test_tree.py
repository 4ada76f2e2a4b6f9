"""Walks of a tree: with places and without, which find the same values in the same order."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.saved.tensor import SavedTensor, StorageRef
from rankload.loader.saved.tree import is_unknown, iterate, storages, unknown_values, values
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
