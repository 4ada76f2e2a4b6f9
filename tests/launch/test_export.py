"""``rankload export``, as it is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from places import DATA
from rankload.launch.cli import run
from safetensors.torch import load_file
from zero_folders import unpack_zero

ONE = str(DATA / "composer-monolithic-w2" / "ep2-ba8-rank0.pt")


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = run(["export", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_text_says_what_was_written_and_what_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = unpack_zero(1, tmp_path), tmp_path / "out"
    code, text, err = said(capsys, source, out, "--dtype", "fp32", "--max-shard-size", "20KB")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        str(out),
        f"from {source}/step3",
        "weights 18 tensors of 9,806 elements; 15 from the optimizer's fp32 masters",
        "cast 1 bfloat16 to float32",
        "tied head.weight = wte.weight",
        "all but the model weights and buffers are exported; --all exports the rest too",
    ):
        assert line in lines
    for file in out.iterdir():
        assert file.name == "SHA256SUMS" or f"{file.name} {file.stat().st_size:,}" in lines


def test_json_has_the_documented_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = said(
        capsys, ONE, tmp_path / "out", "--json", "--rename", "module.=", "--ignore", "state/model/module.6.*"
    )
    told = json.loads(text)
    assert code == 0
    assert list(told) == [
        *(
            "schema_version",
            "command",
            "source",
            "kind",
            "out",
            "format",
            "dtype",
            "everything",
            "step",
            "files",
        ),
        *(
            "tensors",
            "parameters",
            "tensor_bytes",
            "from_masters",
            "casts",
            "aliases",
            "left_out",
            "lost",
            "notes",
        ),
        *("seconds", "bytes"),
    ]
    assert (told["schema_version"], told["command"], told["step"]) == (1, "export", 8)
    assert list(told["files"][0]) == ["name", "bytes", "sha256"]
    assert told["left_out"]["state/model/module.6.bias"] == "left out as asked for"
    assert "0.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.ones(2), "odd": torch.ones(2, dtype=torch.complex128)}, tmp_path / "saved.pt")
    code, text, _ = said(capsys, tmp_path / "saved.pt", tmp_path / "out")
    assert code == 1
    assert "state/model/odd" in text
    code, _, err = said(capsys, tmp_path / "saved.pt", tmp_path / "out")
    assert (code, err.split(":")[0]) == (2, "OptionError")
    assert "is not empty" in err
    assert said(capsys, tmp_path / "saved.pt", tmp_path / "out", "--force", "--format", "dcp")[0] == 0
    assert said(capsys, tmp_path / "nothing", tmp_path / "other")[0] == 3
    assert said(capsys, ONE, tmp_path / "other", "--rename", "x")[0] == 2
    assert said(capsys, ONE, tmp_path / "other", "--max-shard-size", "0")[0] == 2
    assert not (tmp_path / "other").exists()
