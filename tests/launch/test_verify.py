"""``rankload verify``, as it is called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from every_kind import copy_kind, serving
from rankload.launch.cli import run


def said(capsys, *words) -> tuple[int, str]:
    code = run(["verify", *map(str, words)])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


def damaged(folder: Path) -> Path:
    """One bit of the largest optimizer file is another."""
    from rankload.loader.formats.torch_file import read_index

    file = max(folder.rglob("*optim_states.pt"), key=lambda one: (one.stat().st_size, one.name))
    storage = max(read_index(file).storages, key=lambda one: one.nbytes)
    data = bytearray(file.read_bytes())
    data[storage.offset + 17] ^= 4
    file.write_bytes(data)
    return file


def test_text(tmp_path, capsys):
    path = copy_kind("zero1", tmp_path)
    code, out = said(capsys, path)
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == f"{path}/step3"
    assert "compared 160 KB of 160 KB that have checksums" in lines
    assert sum(line.startswith("whole ") for line in lines) == 5
    assert lines[-1] == "complete, and as it was written"
    assert "\x1b" not in out


def test_damage_is_said_with_file_tensor_and_offsets(tmp_path, capsys):
    path = Path(copy_kind("zero1", tmp_path))
    file = damaged(path)
    code, out = said(capsys, path)
    assert code == 1
    assert f"{file} is damaged\n  record data/" in out
    assert "optimizer_state_dict/" in out
    assert "expected CRC-32 " in out
    assert out.endswith("1 of 5 files wrong\n")
    code, out = said(capsys, path, "--json")
    found = json.loads(out)
    assert code == 1
    assert not found["sound"]
    (wrong,) = (one for one in found["files"] if one["state"] == "damaged")
    assert wrong["file"] == str(file)
    assert wrong["damages"][0]["tensors"]
    assert 0 < wrong["damages"][0]["start"] < wrong["damages"][0]["stop"] <= wrong["size_bytes"]


def test_json_has_the_documented_fields(tmp_path, capsys):
    found = json.loads(
        said(capsys, copy_kind("dcp", tmp_path), "--json", "--subset", "50%", "--seed", "3")[1]
    )
    assert list(found) == [
        *("schema_version", "command", "path", "sound", "kind", "step", "world_size", "subset", "seed"),
        *("compared_bytes", "total_bytes", "problems", "notes", "written", "files"),
    ]
    assert list(found["files"][0]) == [
        *("file", "state", "size_bytes", "compared_bytes", "compared_by", "reason", "left_out", "damages"),
    ]
    assert (found["subset"], found["seed"]) == ("50%", 3)


def test_a_random_subset_says_its_seed_and_a_part_has_none(tmp_path, capsys):
    path = copy_kind("zero3", tmp_path)
    out = said(capsys, path, "--subset", "5%")[1]
    assert "5%, with --seed " in out
    assert "what was compared is as it was written" in out
    assert "--seed" not in said(capsys, path, "--subset", "1/7")[1]


def test_what_has_no_checksums_is_not_called_whole(tmp_path, capsys):
    code, out = said(capsys, copy_kind("sharded", tmp_path))
    assert code == 0
    assert "whole" not in out
    assert out.endswith("complete; there was nothing to compare its bytes with\n")


def test_files_in_several_folders_are_told_apart(tmp_path, capsys):
    out = said(capsys, copy_kind("accelerate-zero", tmp_path))[1]
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert any(line.startswith("whole pytorch_model/mp_rank_00_model_states.pt ") for line in lines)
    assert any(line.startswith("whole random_states_0.pkl ") for line in lines)
    out = said(capsys, copy_kind("trainer", tmp_path))[1]
    assert out.endswith(
        "complete; 4 of 6 files are as they were written; 2 had nothing to be compared with\n"
    )


def test_a_manifest_is_written_and_compared_from_then_on(tmp_path, capsys):
    path = copy_kind("sharded", tmp_path)
    code, out = said(capsys, path, "--write-manifest")
    assert code == 0
    assert f"written: {path}/SHA256SUMS" in out
    code, out = said(capsys, path)
    assert out.endswith("complete, and as it was written\n")


@pytest.mark.parametrize("words", [["--subset", "0%"], ["--subset", "5%", "--write-manifest"]])
def test_wrong_arguments(words, tmp_path, capsys):
    assert run(["verify", copy_kind("composer", tmp_path), *words]) == 2
    assert "OptionError" in capsys.readouterr().err


def test_no_checkpoint_is_another_exit_code_than_a_damaged_one(tmp_path, capsys):
    assert run(["verify", str(tmp_path / "nothing")]) == 3
    assert "NotFoundError" in capsys.readouterr().err


def test_a_url_says_no_secret(tmp_path, capsys):
    copy_kind("composer", tmp_path)
    with serving(tmp_path) as server:
        url = server.url("/composer-monolithic-w2/ep2-ba8-rank0.pt?X-Amz-Signature=hush")
        code, out = said(capsys, url, "--cache-dir", tmp_path / "cache")
    assert code == 0
    assert "hush" not in out


def test_it_starts_and_ends_without_torch(tmp_path):
    code = (
        "import sys\nfrom rankload.launch.cli import run\n"
        "assert run(['verify', sys.argv[1]]) == 0\n"
        "assert not {'torch', 'numpy', 'fsspec'} & set(sys.modules)\n"
    )
    path = copy_kind("zero1", tmp_path)
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60, stdout=subprocess.DEVNULL)
