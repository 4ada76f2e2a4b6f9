"""``rankload plan``, as it is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import DATA
from rankload.launch.cli import run
from zero_folders import unpack_zero


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = run(["plan", *map(str, words)])
    return code, *capsys.readouterr()


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unpack_zero(1, tmp_path)
    code, out, err = said(capsys, folder, "--world-size", 4, "--nodes", 2, "--rank", 3)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == f"{folder}/step3"
    for line in (
        "restored into stage1 on 4 ranks of 2 nodes",
        "saved by 4 ranks",
        "node ranks reads cache, at most memory, at most",
        "what rank 3 keeps",
        "weights wte.weight bfloat16 (97, 24) all",
    ):
        assert line in lines
    assert "masters blocks.1.up.weight float32 (72, 24) elements 1,146 to 1,727 of 1,728" in lines
    assert any(line.startswith("1 bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt ") for line in lines)


def test_json_has_the_documented_fields(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, DATA / "dcp-fsdp2-w2/ckpt", "--world-size", 2, "--rank", 0, "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found) == [
        *("schema_version", "command", "path", "kind", "layout", "target", "world_size", "saved_world_size", "local"),
        *("mode", "verify", "fetched_bytes", "nodes", "ranks"),
    ]  # fmt: skip
    assert (found["target"], found["local"], found["world_size"]) == ("fsdp2", True, 2)
    (node,) = found["nodes"]
    assert list(node) == [
        *(
            "node",
            "ranks",
            "fetched_bytes",
            "from_nodes_bytes",
            "cache_bytes",
            "shared_bytes",
            "memory_bytes",
            "files",
        )
    ]
    for file in node["files"]:
        assert file["fetched_bytes"] == sum(stop - start for start, stop in file["ranges"])
    first, second = found["ranks"]
    assert second["slices"] is None
    weights = [one for one in first["slices"] if one["name"] == "wte.weight"]
    assert weights == [
        {
            "part": "weights",
            "name": "wte.weight",
            "dtype": "float32",
            "shape": [53, 15],
            "size_bytes": 27 * 15 * 4,
            "elements": None,
            "starts": [0, 0],
            "sizes": [27, 15],
        }
    ]


def test_long_tables_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, DATA / "safetensors-single/ckpt", "--world-size", 40, "--target", "plain")
    assert code == 0
    assert "and 8 more ranks: --json has all" in out


def test_what_cannot_be_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, DATA / "dcp-fsdp2-w2/ckpt", "--world-size", 3, "--nodes", 2)
    assert (code, out) == (2, "")
    assert "as many ranks on each node" in err
    code, _, err = said(capsys, tmp_path / "nothing", "--world-size", 1)
    assert code == 3
    assert err.startswith("NotFoundError")
