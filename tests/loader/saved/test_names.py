from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.errors import OptionError
from rankload.loader.saved.names import (
    WRAPPERS,
    as_option,
    canonical_name,
    match_names,
    suggest_rename,
    unused_renames,
    without_checkpoint_wrappers,
)

COMPONENT = st.sampled_from(["a", "b", "0", "weight", "module", *sorted(WRAPPERS)])
NAME = st.lists(COMPONENT, min_size=1, max_size=5).map(".".join)
PLAIN_NAMES = st.sets(
    st.lists(st.sampled_from(["a", "b", "0", "w"]), min_size=1, max_size=3).map(".".join),
    min_size=1,
    max_size=6,
)
WRAPPING = st.lists(
    st.lists(st.sampled_from(["module", *sorted(WRAPPERS)]), max_size=2), min_size=3, max_size=3
)
"""For each depth, the wrappers that a name gets in front of its component there."""


def wrapped(name: str, wrapping: list[list[str]]) -> str:
    parts = [[*wrappers, part] for wrappers, part in zip(wrapping, name.split("."), strict=False)]
    return ".".join(one for part in parts for one in part)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("module.{}", "{}"),
        ("{}", "module.{}"),
        ("_orig_mod.{}", "{}"),
        ("{}", "_orig_mod.{}"),
        ("module._orig_mod.{}", "{}"),
        ("_orig_mod.module.{}", "{}"),
        ("module.module.{}", "{}"),
        ("{}", "module._orig_mod.{}"),
        ("_fsdp_wrapped_module._checkpoint_wrapped_module.{}", "module.{}"),
        ("_forward_module.module.module.{}", "_dmp_wrapped_module._fpw_module.{}"),
        ("module.module.module.{}", "{}"),
    ],
)
def test_wrapper_prefixes_are_dropped_or_added(source: str, target: str) -> None:
    names = ["0.weight", "0.bias", "head.weight"]
    match = match_names([source.format(n) for n in names], [target.format(n) for n in names])
    assert match.target_of == {source.format(n): target.format(n) for n in names}
    assert not match.missing
    assert not match.unexpected


def test_a_module_that_is_named_module_stays_as_it_is() -> None:
    names = ["module.0.weight", "module.0.bias"]
    match = match_names(names, names)
    assert match.target_of == {name: name for name in names}
    assert not match.renamed


def test_orig_mod_inside_a_name_is_disregarded() -> None:
    match = match_names(["blocks.0._orig_mod.up.weight"], ["blocks.0.up.weight"])
    assert match.target_of == {"blocks.0._orig_mod.up.weight": "blocks.0.up.weight"}


def test_missing_and_unexpected_are_named() -> None:
    match = match_names(["a.w", "b.w", "x.w"], ["a.w", "b.w", "c.w"])
    assert match.missing == ("c.w",)
    assert match.unexpected == ("x.w",)


def test_rename_maps_names_and_prefixes_longest_first() -> None:
    match = match_names(
        ["enc.0.w", "enc.1.w", "head"],
        ["encoder.0.w", "last.w", "classifier"],
        {"enc.": "encoder.", "enc.1.": "last.", "head": "classifier"},
    )
    assert match.renamed == {"enc.0.w": "encoder.0.w", "enc.1.w": "last.w", "head": "classifier"}


def test_a_whole_name_goes_before_a_prefix() -> None:
    match = match_names(
        ["a.b.w", "a.c", "z."], ["x.w", "y", "q."], {"a.b.": "x.", "a.c": "y", "a.": "n.", "z.": "q."}
    )
    assert match.target_of == {"a.b.w": "x.w", "a.c": "y", "z.": "q."}


def test_many_names_take_no_time() -> None:
    names = [f"blocks.{index}.weight" for index in range(20_000)]
    rename = {name: name.replace("blocks", "layers") for name in names}
    began = time.process_time()
    assert not match_names(names, names).missing
    assert not match_names(names, list(rename.values()), rename).missing
    assert time.process_time() - began < 1


def test_two_names_that_become_one_are_an_error() -> None:
    with pytest.raises(OptionError, match="would both become 'c'"):
        match_names(["a", "b"], ["c"], {"a": "c", "b": "c"})


@given(NAME)
def test_a_canonical_name_is_its_own(name: str) -> None:
    plain = canonical_name(name)
    assert canonical_name(plain) == plain
    assert plain.split(".")[-1] == name.split(".")[-1]
    assert not WRAPPERS.intersection(plain.split(".")[:-1])


@given(PLAIN_NAMES, WRAPPING, WRAPPING)
def test_wrappers_on_either_side_and_at_any_depth_change_no_match(
    names: set[str], here: list[list[str]], there: list[list[str]]
) -> None:
    match = match_names([wrapped(name, here) for name in names], [wrapped(name, there) for name in names])
    assert match.target_of == {wrapped(name, here): wrapped(name, there) for name in names}


@given(st.sets(NAME, max_size=6), st.sets(NAME, max_size=6))
def test_no_name_is_lost_and_both_directions_agree(source: set[str], target: set[str]) -> None:
    match, back = match_names(source, target), match_names(target, source)
    assert set(match.target_of) | set(match.unexpected) == source
    assert set(match.target_of).isdisjoint(match.unexpected)
    assert set(match.target_of.values()) | set(match.missing) == target
    assert len(set(match.target_of.values())) == len(match.target_of)
    assert back.target_of == {new: old for old, new in match.target_of.items()}
    assert all(canonical_name(old) == canonical_name(new) for old, new in match.target_of.items())


def test_a_module_of_the_users_that_is_named_module_keeps_its_place_below_a_wrapper() -> None:
    own = ["module.w", "w", "enc.module.w", "enc.w"]
    for source in ([f"module.{name}" for name in own], [name.replace("enc.", "enc.module.") for name in own]):
        assert match_names(source, own).target_of == dict(zip(source, own, strict=True))
        assert match_names(own, source).target_of == dict(zip(own, source, strict=True))


@pytest.mark.parametrize(
    ("source", "target", "found"),
    [
        (["w", "module.w"], ["w"], {"w": "w"}),
        (["_orig_mod.w", "w"], ["w"], {"w": "w"}),
        (["module.module.w", "w"], ["module.w"], {}),
        (["module.w", "_orig_mod.w"], ["w"], {}),
    ],
)
def test_names_that_could_be_either_are_told_not_guessed(
    source: list[str], target: list[str], found: dict[str, str]
) -> None:
    match = match_names(source, target)
    assert match.target_of == found
    assert match.unexpected == tuple(name for name in source if name not in found)


def test_names_of_submodules_follow_those_of_their_tensors() -> None:
    match = match_names(["module.a._orig_mod.bn.w", "module.w"], ["a.bn.w", "w"])
    assert match.modules == {
        "module.a._orig_mod.bn": "a.bn", "module.a._orig_mod": "a", "module": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("0._checkpoint_wrapped_module.weight", "0.weight"),
        ("0._checkpoint_wrapped_module", "0"),
        ("_checkpoint_wrapped_module", ""),
        ("a._checkpoint_wrapped_module.b._checkpoint_wrapped_module.c", "a.b.c"),
        ("", ""),
    ],
)
def test_what_a_state_dict_calls_a_checkpointed_module(path: str, name: str) -> None:
    assert without_checkpoint_wrappers(path) == name


def test_the_empty_prefix_comes_before_every_name_that_no_other_key_fits() -> None:
    match = match_names(["a.w", "head.w"], ["model.a.w", "top.w"], {"": "model.", "head.": "top."})
    assert match.target_of == {"a.w": "model.a.w", "head.w": "top.w"}


def test_one_rename_fits_the_models_names_and_the_optimizers() -> None:
    rename = {"module.model.": "net."}
    for prefix in ("module.model.", "model.", "module._orig_mod.model."):
        assert match_names([f"{prefix}w"], ["net.w"], rename).target_of == {f"{prefix}w": "net.w"}
    # A key that fits as it is does not reach for names without the wrapper.
    match = match_names(["enc.module.w", "enc.v"], ["dec.w", "enc.v"], {"enc.module.": "dec."})
    assert match.target_of == {"enc.module.w": "dec.w", "enc.v": "enc.v"}


def test_keys_of_rename_that_fit_nothing_are_told() -> None:
    rename = {"enc.": "", "enc": "x", "": "y.", "module.head.": "top.", "gone.": ""}
    assert unused_renames(["enc.w", "head.w"], rename) == ["enc", "gone."]


LAYERS = [f"layers.{index}.{kind}" for index in range(3) for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    ("source", "target", "key", "new"),
    [
        ("model.", "", "model.", ""),
        ("", "model.", "", "model."),
        ("encoder.", "backbone.net.", "encoder.", "backbone.net."),
        ("module.model.", "", "model.", ""),
        ("model.", "_orig_mod.", "model.", ""),
    ],
)
def test_one_prefix_that_explains_a_mismatch_is_found_and_works(
    source: str, target: str, key: str, new: str
) -> None:
    sources, targets = [source + name for name in LAYERS], [target + name for name in LAYERS]
    found = suggest_rename(sources, targets)
    assert found is not None
    entries, gained = found
    assert gained == len(LAYERS)
    assert not match_names(sources, targets, entries).missing
    assert canonical_name(next(iter(entries))) == key
    assert canonical_name(entries[next(iter(entries))]) == new


@given(PLAIN_NAMES, st.sampled_from(["p.", "p.q.", ""]), st.sampled_from(["r.", "r.s.", ""]))
def test_a_rename_that_is_advised_matches_what_it_says(names: set[str], source: str, target: str) -> None:
    sources, targets = [source + name for name in names], [target + name for name in names]
    before = match_names(sources, targets)
    found = suggest_rename(sources, targets)
    if found is not None:
        entries, gained = found
        assert len(match_names(sources, targets, entries).missing) == len(before.missing) - gained
        assert gained > 0


def test_a_rename_is_advised_beside_those_that_were_given_and_never_against_the_shapes() -> None:
    sources = ["model.a.w", "model.b.w", "top"]
    found = suggest_rename(sources, ["a.w", "b.w", "head"], {"top": "head"})
    assert found == ({"top": "head", "model.": ""}, 2)
    assert as_option(found[0]) == 'rename={"top": "head", "model.": ""}'
    assert suggest_rename(sources, ["a.w", "b.w"], agree=lambda old, new: new != "b.w") is None
    assert suggest_rename(["x.a"], ["b", "c", "d"]) is None


def test_many_names_are_explained_in_no_time() -> None:
    names = [f"blocks.{index}.mlp.weight" for index in range(5_000)]
    began = time.process_time()
    assert suggest_rename([f"model.{name}" for name in names], names) == ({"model.": ""}, 5_000)
    assert time.process_time() - began < 2


@given(st.sets(st.text("ab.", min_size=1, max_size=4)), st.sets(st.text("ab.", min_size=1, max_size=4)))
def test_every_name_is_matched_or_told(source: set[str], target: set[str]) -> None:
    match = match_names(source, target)
    assert set(match.target_of) | set(match.unexpected) == source
    assert set(match.target_of.values()) | set(match.missing) == target
    assert source & target <= set(match.target_of) or len(match.target_of) >= len(source & target)
