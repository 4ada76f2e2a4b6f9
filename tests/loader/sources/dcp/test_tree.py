"""The nested state dict of a DCP folder's flat keys, and an optimizer's state in its three forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.errors import CorruptError, FormatError
from rankload.loader.saved.demand import Demand
from rankload.loader.saved.model_parallel import Position
from rankload.loader.saved.tensor import SavedTensor, StorageRef
from rankload.loader.sources.dcp.layout import parts_of
from rankload.loader.sources.dcp.optimizers import torch_form, with_names
from rankload.loader.sources.dcp.tree import nested
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

keys = st.text("abc.0", min_size=1, max_size=4)
leaves = st.one_of(st.integers(), st.just(torch.zeros(2)), st.text(max_size=3))
trees = st.recursive(
    st.dictionaries(keys, leaves, min_size=1, max_size=4),
    lambda inner: st.one_of(
        st.dictionaries(keys, st.one_of(leaves, inner), min_size=1, max_size=4),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))


@given(trees)
def test_what_torch_flattened(tree: dict[str, Any]) -> None:
    try:
        flat, paths = flatten_state_dict(tree)
    except ValueError:
        return  # two of its paths have one key
    assert nested((tuple(paths[key]), value) for key, value in flat.items()) == tree


def test_empty_dicts_left_no_trace() -> None:
    assert nested([(("a", 2, "b"), 1)]) == {"a": [{}, {}, {"b": 1}]}


@pytest.mark.parametrize(
    "paths",
    [
        [("a",), ("a", "b")],
        [("a", "b"), ("a",)],
        [("a",), ("a",)],
        [("a", 0), ("a", "b")],
        [("a", 1 << 40)],
        [(0,)],
    ],
)
def test_paths_that_contradict_each_other(paths: list[tuple[str | int, ...]]) -> None:
    with pytest.raises(CorruptError, match=r"contradicts itself|top level"):
        nested((path, {}) for path in paths)


def test_numbers_that_became_text() -> None:
    groups = [{"lr": 1, "params": [0, 1]}]
    form = torch_form({"state": {"0": {"step": 1}, "1": {}}, "param_groups": groups})
    assert form == {"state": {0: {"step": 1}, 1: {}}, "param_groups": groups}
    assert with_names(form, [["a", "b"]]) == {
        "state": {"a": {"step": 1}, "b": {}},
        "param_groups": [{"lr": 1, "params": ["a", "b"]}],
    }
    assert with_names(form, [["a"], ["b"]]) is None


def test_a_parameter_may_be_called_by_a_number() -> None:
    named = {"state": {"0": {"step": 1}}, "param_groups": [{"lr": 1, "params": ["0"]}]}
    assert torch_form(named) == named


def number(crc32: int | None) -> SavedTensor:
    return SavedTensor.in_storage(StorageRef("file", "key", 0, 4, crc32), "float32", (), ())


def test_groups_of_a_flattened_optimizer() -> None:
    """Equal hyperparameters make a group; a tensor is equal by its checksum, and not at all without one."""
    flat = {
        "state.a.w.step": 1,
        "param_groups.a.w.lr": number(5),
        "param_groups.a.w.betas": [0.9, 0.99],
        "state.b.step": 2,
        "param_groups.b.lr": number(5),
        "param_groups.b.betas": [0.9, 0.99],
        "param_groups.c.lr": number(6),
        "param_groups.c.betas": [0.9, 0.99],
        "param_groups.d.lr": number(None),
        "param_groups.e.lr": number(None),
        "param_groups.f.lr": 1,
        "param_groups.g.lr": 1.0,
        "param_groups.h.lr": True,
    }
    form = torch_form(flat)
    assert form["state"] == {"a.w": {"step": 1}, "b": {"step": 2}}
    names = [group["params"] for group in form["param_groups"]]
    assert names == [["a.w", "b"], ["c"], ["d"], ["e"], ["f"], ["g"], ["h"]]
    assert form["param_groups"][0]["betas"] == [0.9, 0.99]


@pytest.mark.parametrize("value", [None, 3, [1], {}, {"a": 1}])
def test_what_is_no_optimizer_stays(value: Any) -> None:
    assert torch_form(value) == value


def test_an_optimizer_alone() -> None:
    """It is of a known layout for a job that restores no model, and of none for another."""
    tree = {"optimizer": {"state": {"w": {"step": 1}}, "param_groups": [{"lr": 1, "params": ["w"]}]}}
    demand = Demand(Position(0, 1), optimizers=("SGD",))
    with pytest.raises(FormatError):
        parts_of(tree, demand, name="folder")
    assert parts_of(tree, replace(demand, model=False), name="folder").state == {
        "optimizers": {"SGD": tree["optimizer"]}
    }
