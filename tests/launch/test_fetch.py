"""``rankload fetch``, as it is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bad_server import Behaviour, bad_server
from places import DATA
from rankload.launch.cli import run
from rankload.loader import State, load
from torch import nn
from zero_folders import unpack_zero


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = run(["fetch", *map(str, words)])
    return code, *capsys.readouterr()


def test_what_it_fetched_is_there_for_one_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = (DATA / "safetensors-single/ckpt/model.safetensors").read_bytes()
    cache = tmp_path / "cache"
    served = Behaviour(body, headers={"ETag": '"v1"'})
    with bad_server({"/model.safetensors": served}) as server:
        url = server.url("/model.safetensors")
        code, out, err = said(capsys, url, "--cache-dir", cache, "--json")
        assert (code, err) == (0, "")
        assert json.loads(out) == {
            "schema_version": 1,
            "command": "fetch",
            "path": url,
            "fetched_bytes": len(body),
            "held_bytes": len(body),
            "files": 1,
            "folder": str(cache),
            "taken_over": False,
            "missing": [],
            "not_kept": [],
        }
        code, out, _ = said(capsys, url, "--cache-dir", cache)
        assert code == 0
        assert [" ".join(line.split()) for line in out.splitlines()][1] == "fetched 0 bytes"
        before = server.sent_bytes
        model = nn.Module()
        model.odd = nn.Parameter(torch.zeros(7))
        load(
            url,
            State(model),
            load_weights_only=True,
            strict_model_weights=False,
            options={"cache_dir": str(cache)},
        )
        assert server.sent_bytes - before < 64
    assert not list(cache.iterdir())


def test_what_lacks_a_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unpack_zero(1, tmp_path)
    lost = "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"
    files = {
        f"/{path.relative_to(folder)}": Behaviour(path.read_bytes(), headers={"ETag": '"v1"'})
        for path in folder.rglob("*")
        if path.is_file() and path.name != lost
    }
    with bad_server(files) as server:
        code, out, _ = said(capsys, server.url(""), "--cache-dir", tmp_path / "cache")
        assert code == 1
        assert f"missing: {server.url('')}/step3/{lost}" in out
        code, out, _ = said(
            capsys, server.url(""), "--cache-dir", tmp_path / "cache", "--world-size", 4, "--nodes", 4,
            "--node-rank", 1, "--target", "stage2",
        )  # fmt: skip
        assert code == 0
        code, _, err = said(capsys, server.url(""), "--target", "stage2")
        assert code == 2
        assert "--world-size" in err


def test_a_local_path_needs_no_fetching(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, DATA / "dcp-fsdp2-w2/ckpt")
    assert code == 0
    assert "nothing to fetch" in out
