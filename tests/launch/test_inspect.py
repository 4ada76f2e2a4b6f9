"""``rankload inspect``, as it is called."""

from __future__ import annotations

import json

import pytest
from http_server import Served, counting_server
from places import DATA
from rankload.launch.cli import run
from zero_folders import unpack_zero

ONE = str(DATA / "composer-monolithic-w2" / "ep2-ba8-rank0.pt")


@pytest.fixture
def zero(tmp_path):
    return unpack_zero(1, tmp_path)


def said(capsys, *words) -> tuple[int, str]:
    code = run(["inspect", *map(str, words)])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


def test_text(zero, capsys):
    code, out = said(capsys, zero)
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == f"{zero}/step3"
    for line in (
        "kind deepspeed",
        "latest step3",
        "ZeRO stage 1",
        "saved by 4 ranks",
        "step 3",
        "model 9,806 elements in 17 bfloat16, 1 float32, 1 int64",
        "wte.weight (97, 24) bfloat16 4.66 KB",
        "global_steps int 3",
    ):
        assert line in lines
    for file in (zero / "step3").iterdir():
        assert f"{file.name} {file.stat().st_size:,}" in lines
    assert "\x1b" not in out
    assert not any(char in out for char in "─│┌└├")


def test_json_has_the_documented_fields(zero, capsys):
    code, out = said(capsys, zero, "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found) == [
        *(
            "schema_version",
            "command",
            "path",
            "kind",
            "layout",
            "tag",
            "zero_stage",
            "world_size",
            "model_parts",
        ),
        *(
            "step",
            "epoch",
            "parameters",
            "dtypes",
            "tensors",
            "tensor_bytes",
            "file_bytes",
            "files",
            "files_read",
        ),
        *("keys", "notes", "unfinished"),
    ]
    assert (found["schema_version"], found["command"]) == (1, "inspect")
    assert len(found["files"]) == 5
    assert sum(one["size_bytes"] for one in found["files"]) == found["file_bytes"]
    (wte,) = (key for key in found["keys"] if key["key"] == "state/model/wte.weight")
    assert wte == {
        "key": "state/model/wte.weight",
        "kind": "tensor",
        "dtype": "bfloat16",
        "shape": [97, 24],
        "size_bytes": 97 * 24 * 2,
        "value": None,
    }


def test_grep_shows_what_matches_and_finds_nothing_with_1(capsys):
    code, out = said(capsys, ONE, "--grep", "module.0", "--json")
    keys = [key["key"] for key in json.loads(out)["keys"]]
    assert code == 0
    assert keys
    assert all("module.0" in key for key in keys)
    assert said(capsys, ONE, "--grep", "state/model/*.bias")[1].count(".bias") == 3
    code, out = said(capsys, ONE, "--grep", "no_such_name")
    assert code == 1
    assert "no key matches 'no_such_name'" in out


def test_depth_cuts_the_tree_and_sums_what_is_below(zero, capsys):
    out = said(capsys, zero, "--depth", "2")[1]
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert any(line.startswith("model 19 tensors") for line in lines)
    assert "wte.weight" not in out
    assert said(capsys, zero, "--depth", "1")[1].count("tensors") >= 2


def test_files_alone(zero, capsys):
    code, out = said(capsys, zero, "--files")
    assert code == 0
    assert "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt" in out
    assert "wte.weight" not in out
    assert json.loads(said(capsys, zero, "--files", "--json")[1])["keys"] == []


def test_a_missing_file_is_marked_and_exits_with_1(zero, capsys):
    (zero / "step3" / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    code, out = said(capsys, zero, "--files")
    assert code == 1
    (line,) = (line for line in out.splitlines() if "MISSING" in line)
    assert line.startswith("bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt")


def test_a_path_that_is_not_there_exits_with_3(tmp_path, capsys):
    assert run(["inspect", str(tmp_path / "nothing"), "--json"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["error"]["type"] == "NotFoundError"


def test_no_secret_of_a_url_is_shown(tmp_path, capsys):
    with counting_server(
        {"/a.pt": Served((DATA / "composer-monolithic-w2/ep2-ba8-rank0.pt").read_bytes())}
    ) as server:
        url = server.url("/a.pt?X-Signature=hidden")
        for words in (["--json"], []):
            assert run(["inspect", url, "--cache-dir", str(tmp_path / "cache"), *words]) == 0
            out, err = capsys.readouterr()
            assert "a.pt" in out
            assert "hidden" not in out + err
