from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.targets.optimizer_names import OwnParameter, Place, match_parameters


def own(*groups: list[tuple[str | None, str | None]]) -> list[OwnParameter]:
    return [
        OwnParameter((group, position), in_model, given)
        for group, names in enumerate(groups)
        for position, (in_model, given) in enumerate(names)
    ]


def saved(*groups: list[str]) -> dict[str, Place]:
    return {
        name: (group, position) for group, names in enumerate(groups) for position, name in enumerate(names)
    }


def test_the_models_names_count_whatever_the_optimizer_was_given() -> None:
    mine = own([("0.w", "decay_0"), ("0.b", "decay_1")])
    found = match_parameters(mine, saved(["0.b", "0.w"]), {}, saved_model=["0.w", "0.b"])
    assert found == {0: "0.w", 1: "0.b"}


def test_the_optimizers_own_names_count_where_the_model_does_not_know_the_parameter() -> None:
    mine = own([("w", "w"), (None, "crit.a"), (None, "crit.b")])
    theirs = saved(["module.w", "crit.b", "crit.a"])
    assert match_parameters(mine, theirs, {}, saved_model=["module.w"]) == {
        0: "module.w",
        1: "crit.a",
        2: "crit.b",
    }


def test_names_of_ones_own_on_both_sides_match_before_positions() -> None:
    mine = own([("0.w", "p0"), ("0.b", "p1")])
    assert match_parameters(mine, saved(["p1", "p0"]), {}, saved_model=["0.w", "0.b"]) == {0: "p0", 1: "p1"}


def test_names_that_no_model_knows_do_not_break_a_load_by_position() -> None:
    mine = own([("0.w", None), ("0.b", None)], [("1.w", None)])
    theirs = saved(["p0", "p1"], ["p2"])
    by_position = {0: "p0", 1: "p1", 2: "p2"}
    assert match_parameters(mine, theirs, {}, saved_model=["0.w", "0.b", "1.w"]) == by_position
    assert match_parameters(mine, theirs, {}, saved_model=[]) == by_position
    # Groups of other sizes cannot be matched by position, with or without names.
    assert match_parameters(mine, saved(["p0"], ["p1", "p2"]), {}, saved_model=[]) == {}


def test_a_parameter_without_a_name_takes_the_foreign_one_in_its_place() -> None:
    mine = own([("w", None), (None, None)])
    theirs = saved(["w", "crit.w"])
    assert match_parameters(mine, theirs, {}, saved_model=["w"]) == {0: "w", 1: "crit.w"}
    # A name of the checkpoint's model is never another parameter's.
    assert match_parameters(mine, theirs, {}, saved_model=["w", "crit.w"]) == {0: "w"}


def test_a_new_layer_of_the_model_does_not_take_the_state_in_its_place() -> None:
    mine = own([("enc.w", None), ("new_head.w", None)])
    assert match_parameters(mine, saved(["enc.w", "head.w"]), {}, saved_model=["enc.w", "head.w"]) == {
        0: "enc.w"
    }
    assert match_parameters(mine, saved(["enc.w", "crit.w"]), {}, saved_model=["enc.w"]) == {0: "enc.w"}


def test_a_name_that_the_optimizer_has_twice_names_nothing() -> None:
    mine = own([("w", None), (None, "x"), (None, "x"), (None, "w")])
    theirs = saved(["w", "x", "y", "z"])
    assert match_parameters(mine, theirs, {}, saved_model=["w"]) == {0: "w", 1: "x", 2: "y", 3: "z"}


NAMES = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "module.a", None]), st.sampled_from(["a", "b", "c", "module.b", None])
    ),
    max_size=4,
)


@given(
    st.lists(NAMES, max_size=2),
    st.lists(st.sampled_from("abcd"), unique=True),
    st.sets(st.sampled_from("abcd")),
)
def test_no_saved_state_goes_to_two_parameters(
    groups: list[list[tuple[str | None, str | None]]], names: list[str], model: set[str]
) -> None:
    mine = own(*groups)
    found = match_parameters(mine, saved(names), {}, saved_model=model)
    assert len(set(found.values())) == len(found)
    assert set(found) <= set(range(len(mine)))
    assert set(found.values()) <= set(names)
