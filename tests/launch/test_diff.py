"""``rankload diff``, as it is called."""

from __future__ import annotations

import json

import pytest
import torch
from every_kind import copy_kind
from rankload.launch.cli import run


@pytest.fixture
def two(tmp_path):
    a = {"up.weight": torch.ones(3, 4), "down.weight": torch.ones(2), "gone": torch.ones(1)}
    b = {"up.weight": torch.ones(3, 4), "down.weight": torch.ones(3), "new": torch.ones(1)}
    b["up.weight"][2, 1] = 1.5
    torch.save(a, tmp_path / "a.pt")
    torch.save(b, tmp_path / "b.pt")
    return tmp_path / "a.pt", tmp_path / "b.pt"


def said(capsys, *words) -> tuple[int, str]:
    code = run(["diff", *map(str, words)])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


def test_equal_ones(tmp_path, capsys):
    path = copy_kind("zero1", tmp_path)
    code, out = said(capsys, path, path)
    assert code == 0
    assert out.endswith("\nequal\n")
    code, out = said(capsys, path, path, "--keys-only")
    assert code == 0
    assert out.endswith("\nequal names, shapes and dtypes\n")


def test_text(two, capsys):
    code, out = said(capsys, *two)
    assert code == 1
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "only in A (1):" in lines
    assert "state/model/gone" in lines
    assert "only in B (1):" in lines
    assert "state/model/new" in lines
    assert "shape state/model/down.weight (2,) (3,)" in lines
    assert "1 12 0.5 [2, 1] state/model/up.weight" in lines
    assert lines[-1] == "different keys: 2 differ, 1 only in A, 1 only in B"
    assert "\x1b" not in out


def test_json_has_the_documented_fields(two, capsys):
    code, out = said(capsys, *two, "--json")
    found = json.loads(out)
    assert code == 1
    assert list(found) == [
        *(
            "schema_version",
            "command",
            "a",
            "b",
            "equal",
            "kind_a",
            "kind_b",
            "keys_only",
            "only_a",
            "only_b",
        ),
        *("differences", "equal_keys", "elements", "renamed", "notes"),
    ]
    assert list(found["differences"][0]) == [
        *(
            "key",
            "other_key",
            "what",
            "a",
            "b",
            "differing",
            "elements",
            "max_abs",
            "only_a_nan",
            "only_b_nan",
        ),
        "first",
    ]


def test_options(two, capsys):
    assert said(capsys, *two, "--grep", "up")[0] == 1
    assert said(capsys, *two, "--grep", "up", "--atol", "0.6")[0] == 0
    assert said(capsys, *two, "--grep", "up", "--rtol", "0.1")[0] == 1
    code, out = said(capsys, *two, "--grep", "no such")
    assert code == 0
    assert out.endswith("nothing was compared\n")
    assert said(capsys, *two, "--rename", "gone=new", "--grep", "new")[0] == 0


def test_wrong_arguments(two, capsys):
    assert run(["diff", *map(str, two), "--rename", "x"]) == 2
    assert run(["diff", *map(str, two), "--atol", "-1"]) == 2
    assert run(["diff", str(two[0]), str(two[0]) + "x"]) == 3
    capsys.readouterr()
