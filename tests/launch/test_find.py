"""``rankload find``, as it is called."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from places import DATA
from rankload.launch.cli import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (4, 8, 12):
        shutil.copytree(DATA / "trainer-plain-w2" / "ckpt", tmp_path / f"checkpoint-{step}")
    os.truncate(tmp_path / "checkpoint-12" / "model.safetensors", 1000)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = run(["find", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_what_is_taken_and_why_not_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, folder)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[1].startswith(f"{folder}/checkpoint-12 12 passed over")
    assert "1,000 bytes" in lines[1] or "cut short" in lines[1] or "ends" in lines[1]
    # The step is the checkpoint's own.
    assert lines[2].startswith(f"{folder}/checkpoint-8 4 monolithic taken")
    assert lines[3].startswith(f"{folder}/checkpoint-4 4 not examined")
    assert said(capsys, folder, "--every")[1].count("whole") == 1


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, folder, "--json")
    told = json.loads(out)
    assert (code, told["schema_version"], told["command"]) == (0, 1, "find")
    assert told["taken"] == told["found"][1]
    assert list(told["taken"]) == ["path", "step", "kind", "world_size", "proven", "reason", "pointer"]
    assert [one["proven"] for one in told["found"]] == [False, True, None]


def test_where_a_run_would_start_cold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, tmp_path)[:2] == (1, "no checkpoint: a run would start cold\n")
    (tmp_path / "step1.pt").write_bytes(b"PK\3\4")
    code, out, _ = said(capsys, tmp_path, "--json")
    assert (code, json.loads(out)["taken"]) == (1, None)
    code, _, err = said(capsys, f"{tmp_path}/*/x*.pt")
    assert code == 3
    assert "one part of the path alone" in err
