"""A job that resumes by itself, on several ranks: all take the newest checkpoint that is whole, or none does."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_ranks import WITHOUT
from places import DATA, SUPPORT
from processes import run_ranks
from rankload.loader import (
    FoundCheckpoint,
    NotFoundError,
    OptionError,
    State,
    autoresume,
    find_checkpoints,
    save_checkpoint,
)
from torch import nn

WORKER = str(SUPPORT / "resume_worker.py")


def run(
    function: str, world_size: int, *args: object, env: dict[str, str] | None = None, **more: Any
) -> list[Any]:
    finished = run_ranks(
        f"{WORKER}:{function}",
        world_size,
        args=args,
        deadline_s=120,
        env={**WITHOUT, **(env or {})},
        **more,
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    return [json.loads(rank.stdout.strip().splitlines()[-1]) for rank in finished]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three saves of a plain job, whose weights tell which one was restored."""
    for step in (1, 2, 3):
        torch.manual_seed(step)
        model = nn.Linear(4, 4)
        with torch.no_grad():
            model.weight.fill_(step)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        save_checkpoint(tmp_path / f"step{step}.pt", State(model, optimizer), extra={"step": step})
    return tmp_path


def flip(path: Path, at: int) -> None:
    """Flips a bit, as a disk does it: the time of the last write stays, so that no manifest is looked up for it."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def in_weights(path: Path) -> int:
    """Where the weights of a file lie in it."""
    step = float(path.stem.removeprefix("step"))
    return path.read_bytes().index(torch.full((16,), step).numpy().tobytes())


def test_all_ranks_take_the_newest(folder: Path) -> None:
    for one in run("resume", 2, folder):
        assert (one["step"], one["weight"], one["passed"], one["warned"]) == (3, 48.0, [], [])


def test_all_ranks_pass_over_what_is_cut_and_say_why(folder: Path) -> None:
    os.truncate(folder / "step3.pt", 700)
    ranks = run("resume", 2, folder)
    for rank, one in enumerate(ranks):
        assert (one["step"], one["weight"]) == (2, 32.0)
        assert one["passed"][0][0] == "step3.pt"
        assert "zip directory" in one["passed"][0][1]
        assert len(one["warned"]) == (rank == 0)


def test_damage_that_only_the_load_finds_is_passed_over_before_anything_changed(folder: Path) -> None:
    flip(folder / "step3.pt", in_weights(folder / "step3.pt"))
    for one in run("resume", 2, folder, '{"verify": "before"}'):
        assert (one["step"], one["weight"]) == (2, 32.0)
        assert "its bytes are not those that were stored" in one["passed"][0][1]


def test_damage_that_shows_after_the_first_change_raises_and_is_counted(folder: Path, tmp_path: Path) -> None:
    flip(folder / "step3.pt", in_weights(folder / "step3.pt"))
    options = json.dumps({"cache_dir": str(tmp_path / "cache")})
    for _ in range(2):
        assert [one["error"] for one in run("resume_few_times", 2, folder, options)] == [
            "PartialRestoreError"
        ] * 2
    for one in run("resume_few_times", 2, folder, options):
        assert (one["step"], one["weight"]) == (2, 32.0)
        assert "2 loads of it ended in CorruptError" in one["passed"][0][1]
    kept = json.loads((tmp_path / "cache" / "attempts.json").read_text())
    assert kept == {str(folder / "step3.pt"): ["CorruptError", "CorruptError"]}


@pytest.mark.parametrize("held", ["[" * 100_000, "[]", '{"%s": 3}', '{"%s": [[], {}]}', '{"%s": null}'])
def test_a_damaged_count_of_failed_loads_is_begun_anew(folder: Path, tmp_path: Path, held: str) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / "attempts.json").write_text(held.replace("%s", str(folder / "step3.pt")))
    options = {"cache_dir": str(tmp_path / "cache"), "leave_out": ["optimizer"]}
    result = autoresume(folder, State(nn.Linear(4, 4)), options=options, max_attempts=2)
    assert result.step == 3


def test_a_pointer_goes_first_and_a_newer_one_is_told(folder: Path) -> None:
    (folder / "latest.pt").symlink_to("step2.pt")
    one = run("resume", 1, folder)[0]
    assert (one["step"], one["weight"]) == (2, 32.0)
    assert len(one["warned"]) == 1
    assert "step3.pt" in one["warned"][0]
    assert run("resume_newest", 1, folder)[0]["step"] == 3


def test_a_cold_start_is_loud_and_may_be_forbidden(tmp_path: Path) -> None:
    finished = run_ranks(f"{WORKER}:resume", 2, args=(tmp_path,), deadline_s=60, env=WITHOUT)
    assert [json.loads(rank.stdout.splitlines()[-1])["step"] for rank in finished] == [None, None]
    assert [rank.stderr.count("COLD START") for rank in finished] == [1, 0]
    (tmp_path / "step1.pt").write_bytes(b"PK\3\4 cut")
    for one in run("resume_or_raise", 2, tmp_path):
        assert one["error"] == "NotFoundError"
        assert "step1.pt" in one["message"]


def test_a_checkpoint_that_does_not_fit_raises_instead_of_going_back(folder: Path) -> None:
    save_checkpoint(folder / "step4.pt", State(nn.Linear(5, 5)), extra={"step": 4})
    assert [one["error"] for one in run("resume", 2, folder)] == ["MismatchError"] * 2


def test_what_the_launcher_was_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in run("resume_where_told", 2, env={"RANKLOAD_RESUME": str(folder)}):
        assert one == {"step": 3, "found": 3}
    monkeypatch.delenv("RANKLOAD_RESUME", raising=False)
    assert autoresume(None, State(nn.Linear(4, 4))) is None
    with pytest.raises(NotFoundError, match="RANKLOAD_RESUME is not set"):
        autoresume(None, State(nn.Linear(4, 4)), require=True)


@pytest.mark.parametrize(
    ("how", "told"), [("require", "argument require differs"), ("path", "path is empty")]
)
def test_ranks_that_ask_for_different_things_are_told_at_once(folder: Path, how: str, told: str) -> None:
    for one in run("resume_unlike_others", 2, folder, how):
        assert one["error"] == "OptionError"
        assert told in one["message"]


def test_a_path_with_a_secret_is_shown_without() -> None:
    found = FoundCheckpoint("https://host/run?sig=hush", 3, proven=True, shown="https://host/run")
    assert "hush" not in f"{found!r} {found}"


def test_nodes_with_disks_of_their_own(tmp_path: Path) -> None:
    """Each node has what its own ranks saved: no node has all of it, and together they do."""
    with tarfile.open(DATA / "deepspeed-zero1-w4.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    whole = tmp_path / "s1-w4" / "step3"
    for node, ranks in ((0, (0, 1)), (1, (2, 3))):
        folder = tmp_path / f"disk{node}" / "global_step3"
        folder.mkdir(parents=True)
        for path in whole.iterdir():
            if path.name.startswith("mp_rank") or any(f"_rank_{rank}_mp" in path.name for rank in ranks):
                shutil.copy(path, folder)
    place = tmp_path / "disk{node_rank}"
    for one in run("look", 2, place, nodes=(1, 1)):
        assert one["found"] == [["global_step3", True, ""]]
    next((tmp_path / "disk1" / "global_step3").glob("*rank_3_mp*")).unlink()
    for one in run("look", 2, place, nodes=(1, 1)):
        assert one["found"][0][:2] == ["global_step3", False]
        assert "rank_3" in one["found"][0][2]


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="max_attempts is 0"):
        autoresume(tmp_path, State(nn.Linear(1, 1)), max_attempts=0)
    with pytest.raises(OptionError, match="path is empty"):
        find_checkpoints("")
    assert find_checkpoints(tmp_path) == []
