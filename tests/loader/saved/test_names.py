from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.errors import OptionError
from rankload.loader.saved.names import match_names


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
    began = time.monotonic()
    assert not match_names(names, names).missing
    assert not match_names(names, list(rename.values()), rename).missing
    assert time.monotonic() - began < 1


def test_two_names_that_become_one_are_an_error() -> None:
    with pytest.raises(OptionError, match="would both become 'c'"):
        match_names(["a", "b"], ["c"], {"a": "c", "b": "c"})


@given(st.sets(st.text("ab.", min_size=1, max_size=4)), st.sets(st.text("ab.", min_size=1, max_size=4)))
def test_every_name_is_matched_or_told(source: set[str], target: set[str]) -> None:
    match = match_names(source, target)
    assert set(match.target_of) | set(match.unexpected) == source
    assert set(match.target_of.values()) | set(match.missing) == target
    assert source & target <= set(match.target_of) or len(match.target_of) >= len(source & target)
