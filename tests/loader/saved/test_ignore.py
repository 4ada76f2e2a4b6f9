from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.errors import OptionError
from rankload.loader.saved.ignore import ignore, nearest


def tree() -> dict[str, Any]:
    return {
        "state": {
            "model": {"layer1.weight": 1, "layer1.bias": 2, "layer2.weight": 3, "Layer2.weight": 4},
            "optimizers": {"Adam": {"state": {0: {"exp_avg": 5}, "a/b": {"exp_avg": 6}}}},
            "rank_zero_seed": 17,
        },
        "rng": [{"python": 1}, {"python": 2}, {"python": 3}],
    }


def test_nothing_to_ignore_gives_the_same_tree() -> None:
    given_tree = tree()
    assert ignore(given_tree, None).tree is given_tree


def test_a_name_takes_the_node_away_and_a_star_empties_it() -> None:
    assert "model" not in ignore(tree(), ["state/model"]).tree["state"]
    assert ignore(tree(), ["state/model/*"]).tree["state"]["model"] == {}


def test_globs_cross_slashes_and_case_matters() -> None:
    found = ignore(tree(), ["state/model/layer*.weight"])
    assert list(found.tree["state"]["model"]) == ["layer1.bias", "Layer2.weight"]
    assert ignore(tree(), ["*exp_avg"]).tree["state"]["optimizers"]["Adam"]["state"] == {0: {}, "a/b": {}}


def test_integer_keys_beside_strings_and_slashes_in_keys() -> None:
    state = ignore(tree(), ["state/optimizers/Adam/state/0"]).tree["state"]["optimizers"]["Adam"]["state"]
    assert list(state) == ["a/b"]
    state = ignore(tree(), ["state/optimizers/Adam/state/a/b"]).tree["state"]["optimizers"]["Adam"]["state"]
    assert list(state) == [0]


def test_list_positions_are_the_original_ones() -> None:
    assert ignore(tree(), ["rng/0", "rng/2"]).tree["rng"] == [{"python": 2}]


def test_tuples_are_leaves() -> None:
    found = ignore({"a": ({"b": 1},)}, ["a/0/b"])
    assert found.tree == {"a": ({"b": 1},)}
    assert found.unmatched == ("a/0/b",)


def test_a_bare_string_is_one_glob() -> None:
    assert "rng" not in ignore(tree(), "rng").tree


def test_what_matched_nothing_is_told_once_each() -> None:
    found = ignore(tree(), ["state/modle", "rng", "state/model", "state/model/layer1.bias"])
    assert found.unmatched == ("state/modle",)
    assert found.paths == ("state/model", "rng")


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("model/layer2.*", ["state/model/layer2.weight"]),
        ("model", ["state/model", "state/model/layer1.weight", "state/model/layer1.bias"]),
        ("layer1", ["state/model/layer1.weight", "state/model/layer1.bias"]),
        ("exp_avg", ["state/optimizers/Adam/state/0/exp_avg", "state/optimizers/Adam/state/a/b/exp_avg"]),
        ("state/modle", ["state/model"]),
        ("state/modle/*.bias", ["state/model/layer1.bias"]),
        ("state/optimizer/AdamW/*", ["state/optimizers/Adam/state"]),
        ("state/model/module.layer1.bias", ["state/model/layer1.bias"]),
        ("/state/model", ["state/model"]),
        ("rank", ["state/rank_zero_seed"]),
        ("rng/7", ["rng/0", "rng/1", "rng/2"]),
        ("zzz/*", ["state", "rng"]),
    ],
)
def test_the_nearest_keys_of_a_glob_that_matches_nothing(glob: str, expected: list[str]) -> None:
    found = nearest(tree(), glob)
    assert found[: len(expected)] == expected
    assert len(found) <= 3
    assert ignore(tree(), found).unmatched == ()


def test_an_empty_checkpoint_has_no_nearest_key() -> None:
    assert nearest({}, "state/model/*") == []


def test_a_callable_changes_a_copy() -> None:
    original = tree()

    def drop(nested: dict[str, Any]) -> None:
        del nested["state"]["model"]["layer1.bias"]
        nested["rng"].clear()
        nested["state"]["rank_zero_seed"] = 5

    found = ignore(original, drop)
    assert original == tree()
    assert found.paths == ("state/model/layer1.bias",)
    assert found.tree["rng"] == []
    assert found.tree["state"]["rank_zero_seed"] == 5


def test_anything_else_is_an_error() -> None:
    with pytest.raises(OptionError, match="expected globs"):
        ignore(tree(), [3])  # type: ignore[list-item]


KEYS = st.text("ab/", min_size=1, max_size=3)
TREES = st.recursive(
    st.integers(0, 9), lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=12
).filter(lambda value: isinstance(value, dict))


@given(TREES, st.lists(st.text("ab/*?", min_size=1, max_size=5), max_size=3))
def test_every_kept_path_matches_no_glob_and_every_removed_one_does(value: Any, globs: list[str]) -> None:
    def paths(node: Any, at: str = "") -> list[str]:
        if not isinstance(node, dict):
            return []
        found = []
        for key, item in node.items():
            child = f"{at}/{key}" if at else key
            found += [child, *paths(item, child)]
        return found

    result = ignore(value, globs)
    kept = paths(result.tree)
    assert not [path for path in kept if any(fnmatchcase(path, glob) for glob in globs)]
    assert all(any(fnmatchcase(path, glob) for glob in globs) for path in result.paths)
    for glob in globs:
        assert (glob in result.unmatched) == (not any(fnmatchcase(path, glob) for path in paths(value)))
