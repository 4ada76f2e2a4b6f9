"""Path templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.errors import TemplateError
from rankload.loader.template import (
    VARIABLES,
    expand_for_rank_zero,
    expand_path,
    template_variables,
)


def expand(template: str, **changes: object) -> str:
    values = {"rank": 5, "local_rank": 1, "node_rank": 2, "run_name": "run", **changes}
    return expand_path(template, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("ep1-rank{rank}.tar", "ep1-rank5.tar"),
        ("ep1-rank<rank>.tar", "ep1-rank5.tar"),
        ("{rank:05d}/{local_rank}/{node_rank:x}", "00005/1/2"),
        ("<node_rank>-<local_rank>-<run_name>", "2-1-run"),
        ("{run_name:>5}", "  run"),
        ("{{rank}}{rank}}}", "{rank}5}"),
        ("a < b > c <1> <", "a < b > c <1> <"),
        ("dir#1/what?.pt", "dir#1/what?.pt"),
        ("s3://bucket/{run_name}/r{rank}?x=1", "s3://bucket/run/r5?x=1"),
        ("../up/{rank}", "../up/5"),
    ],
)
def test_expands(template: str, path: str) -> None:
    assert expand(template) == path


@pytest.mark.parametrize("template", ["{epoch}", "<epoch>", "{Rank}", "ep{}"])
def test_unknown_variable_lists_the_known_ones(template: str) -> None:
    with pytest.raises(TemplateError) as caught:
        expand(template)
    assert all(name in str(caught.value) for name in VARIABLES)


@pytest.mark.parametrize(
    "template",
    [
        "{rank.__class__}", "{rank[0]}", "{rank!r}", "{0}", "{rank", "rank}", "{rank:{local_rank}}",
        "{rank:99999d}", "{rank:z}", "{rank:/>9d}", "a\0b", "{ rank}",
    ],
)  # fmt: skip
def test_refuses(template: str) -> None:
    with pytest.raises(TemplateError):
        expand(template)


def test_run_name_missing_says_how_to_set_it() -> None:
    with pytest.raises(TemplateError, match=r"State\(run_name="):
        expand("{run_name}/x", run_name=None)
    assert expand("{rank}", run_name=None) == "5"


@pytest.mark.parametrize(
    ("template", "run_name"),
    [
        ("c/{run_name}/x", ".."),
        ("c/{run_name}/x", "a/../../b"),
        ("c/.{run_name}", "./x"),
        ("{run_name}.", "."),
    ],
)
def test_run_name_cannot_lead_out_of_its_folder(template: str, run_name: str) -> None:
    with pytest.raises(TemplateError, match="run_name"):
        expand(template, run_name=run_name)


def test_run_name_is_not_expanded_again() -> None:
    assert expand("{run_name}", run_name="{rank}<rank>") == "{rank}<rank>"


def test_in_a_uri_a_run_name_is_percent_encoded() -> None:
    run_name = "a b#1?/100%"
    encoded = "a%20b%231%3F/100%25"
    for start in ("https://host/", "HTTP://host/", "file:///x/", "file:/"):
        assert (
            expand(start + "{run_name}/{rank}.pt?s=%2F", run_name=run_name) == f"{start}{encoded}/5.pt?s=%2F"
        )
    assert expand("s3://b/{run_name}", run_name=run_name) == f"s3://b/{run_name}"


def test_the_uri_of_a_template() -> None:
    uri = Path("/a b/ck{rank:02d}-<local_rank>.pt").as_uri()
    assert expand(uri) == "file:///a%20b/ck05-1.pt"
    assert template_variables(uri) == {"rank", "local_rank"}
    assert expand("/a/%7Brank%7D") == "/a/%7Brank%7D"


def test_rank_zero_for_all() -> None:
    assert expand_for_rank_zero("{rank}-{local_rank}-{node_rank}-{run_name}", run_name="r") == "0-0-0-r"


def test_variables() -> None:
    assert template_variables("{{x}} {rank:03d} <run_name>") == {"rank", "run_name"}


@given(st.text(alphabet=st.characters(exclude_characters="<\0", exclude_categories=["Cs"])))
def test_literal_text_is_unchanged(text: str) -> None:
    assert expand(text.replace("{", "{{").replace("}", "}}")) == text


@given(st.integers(0, 10**6), st.integers(0, 64), st.integers(0, 10**4), st.sampled_from(["{%s}", "<%s>"]))
def test_values_come_back_out(rank: int, local_rank: int, node_rank: int, spelling: str) -> None:
    template = "/".join(spelling % name for name in ("rank", "local_rank", "node_rank"))
    path = expand(template, rank=rank, local_rank=local_rank, node_rank=node_rank)
    assert tuple(map(int, path.split("/"))) == (rank, local_rank, node_rank)


@pytest.mark.parametrize(
    "end", ["{epoch}", "{rank", "{rank[0]}", "{rank:z}", "{rank:/>9d}", "\0", "{run_name}"]
)
def test_errors_tell_no_secrets(end: str) -> None:
    with pytest.raises(TemplateError) as caught:
        expand(f"https://me:secret@host/a{end}?sig=secret", run_name=None)
    assert "secret" not in str(caught.value)
    assert caught.value.path is not None
    assert "secret" not in caught.value.path
    assert "host/a" in str(caught.value)


@given(st.text())
def test_any_text_expands_or_is_refused(text: str) -> None:
    try:
        expand(text)
    except TemplateError:
        return
