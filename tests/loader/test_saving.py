"""What `save_checkpoint` writes, and that `load` restores it, at any world size."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from deepspeed_ranks import ENVIRONMENT, WITHOUT, needs_deepspeed
from places import SUPPORT
from processes import run_ranks
from rankload.distributed.watchdog import EXIT_CODE
from saving_worker import check, job, train, values

from rankload import LayoutError, LoadOptions, OptionError, State, TemplateError, load, save_checkpoint

WORKER = str(SUPPORT / "saving_worker.py")


def ranks(function: str, world_size: int, *args: object, **more: Any) -> list:
    of_modules = {"plain", "ddp", "fsdp2"} & {*map(str, args)}
    more = {"deadline_s": 120, "env": WITHOUT if of_modules else ENVIRONMENT, **more}
    return run_ranks(f"{WORKER}:{function}", world_size, args=args, **more)


def all_well(function: str, world_size: int, *args: object) -> list:
    finished = ranks(function, world_size, *args)
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    return finished


@pytest.fixture
def trained() -> State:
    state = job("plain")
    train(state, 2)
    return state


def test_a_file_is_written_that_torch_and_sha256sum_read(tmp_path: Path, trained: State):
    trained.run_name = "a b"
    path = save_checkpoint(tmp_path / "new" / "{run_name}.pt", trained, extra={"epoch": 3, "loss": 0.5})
    assert path == f"{tmp_path}/new/a b.pt"
    assert sorted(os.listdir(tmp_path / "new")) == ["a b.pt", "a b.pt.sha256"]
    subprocess.run(["sha256sum", "--check", "--strict", "a b.pt.sha256"], cwd=tmp_path / "new", check=True)
    whole = torch.load(path, weights_only=False)
    assert set(whole) == {"state", "rng", "epoch", "loss"}
    assert len(whole["rng"]) == 1
    assert torch.equal(whole["state"]["model"]["odd"], trained.model.odd)
    fresh = job("plain", seed=9)
    check(load(path, fresh), fresh, values(trained))


def test_permissions_are_those_of_the_umask(tmp_path: Path, trained: State):
    before = os.umask(0o027)
    try:
        path = save_checkpoint(tmp_path / "last.pt", trained)
    finally:
        os.umask(before)
    assert [os.stat(name).st_mode & 0o777 for name in (path, f"{path}.sha256")] == [0o640, 0o640]


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path, trained: State):
    (tmp_path / "first.pt").write_bytes(b"mine")
    (tmp_path / "last.pt").symlink_to("first.pt")
    path = save_checkpoint(tmp_path / "last.pt", trained)
    assert not os.path.islink(path)
    assert (tmp_path / "first.pt").read_bytes() == b"mine"


def test_memory_gets_the_object_and_its_manifest(trained: State):
    store = fsspec.filesystem("memory")
    store.pipe_file("/saving/last.pt.sha256", b"0" * 64 + b"  last.pt\n")
    for _ in range(2):
        path = save_checkpoint("memory://saving/last.pt", trained, extra={"epoch": 3, "loss": 0.5})
        assert sorted(store.ls("/saving", detail=False)) == ["/saving/last.pt", "/saving/last.pt.sha256"]
        fresh = job("plain", seed=9)
        result = load(path, fresh)
        check(result, fresh, values(trained))
        assert "sha256 of last.pt.sha256" in result.receipt.as_dict()["files"][0]["verified_by"]
    store.rm("/saving", recursive=True)


def test_an_upload_that_fails_leaves_the_old_object(trained: State, monkeypatch: pytest.MonkeyPatch):
    store = fsspec.filesystem("memory")
    save_checkpoint("memory://saving/last.pt", trained)
    old = store.cat_file("/saving/last.pt")

    def refuse(*args: object, **more: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(type(store), "put_file", refuse)
    with pytest.raises(Exception, match=r"memory:///saving/last\.pt: the store refused access"):
        save_checkpoint("memory://saving/last.pt", job("plain", seed=9))
    assert store.ls("/saving", detail=False) == ["/saving/last.pt"]
    assert store.cat_file("/saving/last.pt") == old
    store.rm("/saving", recursive=True)


def test_s3(seaweedfs_server, trained: State):
    options = LoadOptions(storage_options=seaweedfs_server.options)
    path = "s3://checkpoints/saved/last.pt"
    save_checkpoint(path, trained, extra={"epoch": 3, "loss": 0.5}, options=options)
    fresh = job("plain", seed=9)
    check(load(path, fresh, options=options), fresh, values(trained))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_saved_at_one_world_size_and_restored_at_another(tmp_path: Path, kind: str):
    for saved, restored in ((2, (2, 1)), (1, (2,))):
        path = tmp_path / f"{kind}-{saved}.pt"
        all_well("save", saved, path, kind)
        for world_size in restored:
            all_well("restore", world_size, path, kind)
        fresh = job("plain", seed=9)
        check(load(path, fresh), fresh, torch.load(f"{path}.expected")[0])


@needs_deepspeed
def test_engines_of_stages_1_and_3_with_a_manifest(tmp_path: Path):
    for rank in all_well("engines", 2, tmp_path):
        assert "sha256 of SHA256SUMS" in rank.stdout or "zip CRC-32" in rank.stdout
    for stage in (1, 3):
        folder = tmp_path / f"stage{stage}" / "global_step2"
        listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
        assert listed == set(os.listdir(folder)) - {"SHA256SUMS"}
        assert len(listed) == (3 if stage == 1 else 4)
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)
        assert (tmp_path / f"stage{stage}" / "latest").read_text() == "global_step2"


@needs_deepspeed
def test_nodes_upload_an_engines_files_and_latest_comes_last(tmp_path: Path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    finished = run_ranks(
        f"{WORKER}:uploads",
        2,
        args=[tmp_path],
        deadline_s=120,
        nodes=(1, 1),
        env={**ENVIRONMENT, "TMPDIR": str(temporary)},
    )
    assert [rank.returncode for rank in finished] == [0, 0], finished
    assert os.listdir(temporary) == []
    run = tmp_path / "run"
    assert sorted(os.listdir(run)) == ["a", "latest"]
    assert (run / "latest").read_text() == "a/b"
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=run / "a" / "b", check=True)
    last = sorted(path for path in run.rglob("*") if path.is_file())
    assert max(last, key=lambda path: path.stat().st_mtime_ns).name == "latest"


@pytest.mark.parametrize(
    "tag", ["step3 ", "latest", "step3.0123abcd.part", "a" * 5000, "../step3", "a//b", ""]
)
def test_a_tag_that_no_load_would_find_is_refused(tag: str):
    from rankload.loader.saving import _tag

    with pytest.raises(OptionError, match="tag is"):
        _tag(tag, None)


@needs_deepspeed
def test_nodes_with_disks_of_their_own_have_each_a_manifest_of_their_files(tmp_path: Path):
    for node in (0, 1):
        (tmp_path / f"disk{node}").mkdir()
    finished = run_ranks(
        f"{WORKER}:saves_on_own_disks", 2, args=[tmp_path], deadline_s=120, nodes=(1, 1), env=ENVIRONMENT
    )
    assert [rank.returncode for rank in finished] == [0, 0], finished
    for node in (0, 1):
        folder = tmp_path / f"disk{node}" / "run" / "step1"
        listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
        there = set(os.listdir(folder)) - {"SHA256SUMS"}
        assert there < listed if node == 0 else there == listed  # rank 0's has all files of the checkpoint
        assert any(f"_rank_{node}_mp" in name for name in listed)


def resumed_from(folder: Path, stage: int, point: str, world_size: int = 1) -> int:
    """The step that a job resumed from, which saves the next one and is killed at `point`; 0 where there was none."""
    finished = ranks("is_killed", world_size, folder, stage, point, fork=True)
    assert {rank.returncode for rank in finished} <= (
        {-9, 0} if point.startswith("after") else {-9 if point else 0}
    ), finished
    lines = [line for line in finished[0].stdout.splitlines() if line.isdigit()]
    return int(lines[-1]) if lines else 0


@needs_deepspeed
@pytest.mark.takes_long
@pytest.mark.parametrize("stage", [1, 3])
def test_sigkill_of_all_ranks_at_random_times(tmp_path: Path, stage: int):
    assert resumed_from(tmp_path, stage, "", 2) == 0
    resumed, unfinished = 1, 0
    for kill in range(int(os.environ.get("KILLS", "25"))):
        at_latest = int((tmp_path / "latest").read_text().removeprefix("step"))
        subprocess.run(
            ["sha256sum", "--quiet", "--check", "--strict", "SHA256SUMS"],
            cwd=tmp_path / f"step{at_latest}",
            check=True,
        )
        resumed = resumed_from(tmp_path, stage, f"after:{kill % 25 * 0.01}", 2)
        assert resumed == at_latest
        unfinished += any(name.endswith(".part") for name in os.listdir(tmp_path))
    print(f"stage {stage}: latest names step {resumed}; {unfinished} kills left an unfinished folder")
    assert unfinished > 0


@needs_deepspeed
@pytest.mark.whole_jobs
@pytest.mark.parametrize(
    "stage",
    [
        1,
        pytest.param(3, marks=pytest.mark.takes_long),
    ],
)
def test_sigkill_in_an_engines_save_leaves_the_newest_whole_one_at_latest(tmp_path: Path, stage: int):
    def run(point: str) -> int:
        """The step that the job resumed from; 0 where there was nothing."""
        (rank,) = run_ranks(
            f"{WORKER}:is_killed", 1, args=(tmp_path, stage, point), deadline_s=60, env=ENVIRONMENT
        )
        assert rank.returncode == (-9 if point else 0), rank
        lines = [line for line in rank.stdout.splitlines() if line.isdigit()]
        return int(lines[-1]) if lines else 0

    assert run("saving:take_name") == 0
    # It was whole, but for its name: the next save gave it that, and wrote it anew.
    assert run("") == 0
    assert run("engine:_save_zero_checkpoint") == 1
    assert not (tmp_path / "step2").exists()
    assert run("saving:_write_manifest") == 1
    assert run("saving:_write_latest") == 1
    assert (tmp_path / "step2" / "SHA256SUMS").exists()
    assert run("second rename") == 1
    assert not (tmp_path / "step2").exists()
    assert run("") == 1
    assert run("saving:_write_latest") == 2
    assert (tmp_path / "latest").read_text() == "step2"
    assert {name for name in os.listdir(tmp_path) if not name.endswith(".py")} == {
        "latest",
        "step1",
        "step2",
        "step3",
    }


@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
@pytest.mark.parametrize("how", ["dies", "raises"])
def test_a_rank_that_fails_is_every_ranks_error(tmp_path: Path, kind: str, how: str):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    begin = time.monotonic()
    first, second = ranks("fails", 2, path, kind, how, deadline_s=60)
    assert time.monotonic() - begin < 45
    if how == "dies":
        assert second.returncode == -9
        assert (first.returncode, "rank 1" in first.stdout, "PeerError" in first.stdout) == (3, True, True), (
            first
        )
    elif kind == "plain":
        assert (first.returncode, second.returncode) == (3, 3), (first, second)
        assert "this rank's own" in first.stdout
    else:
        assert second.returncode == 3
        assert first.returncode == EXIT_CODE, first
        assert "ends with exit code 75" in first.stderr
        assert "this rank's own" in first.stderr
    assert os.listdir(tmp_path) == ["last.pt"]
    assert path.read_bytes() == b"old"


@needs_deepspeed
@pytest.mark.parametrize("how", ["dies", "raises"])
def test_a_rank_that_fails_inside_deepspeeds_collectives_ends_the_others(tmp_path: Path, how: str):
    first, second = ranks("fails", 2, tmp_path, "engine", how, deadline_s=60)
    assert second.returncode == (-9 if how == "dies" else 3), second
    assert first.returncode in (3, EXIT_CODE), first
    told = first.stdout + first.stderr
    assert "rank 1" in told
    assert ("PeerError" in told) if how == "dies" else ("this rank's own" in told)
    if how == "raises":
        assert first.returncode == EXIT_CODE
        assert "ends with exit code 75" in first.stderr
    assert not (tmp_path / "latest").exists()


def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path, trained: State):
    path = tmp_path / "last.pt"
    for match, kind, arguments, more in (
        ("rank", TemplateError, (f"{tmp_path}/ep1-rank{{rank}}.pt", trained), {}),
        ("nope", TemplateError, (f"{tmp_path}/{{nope}}.pt", trained), {}),
        ("run name", TemplateError, (f"{tmp_path}/{{run_name}}.pt", trained), {}),
        ("expected a rankload.State", OptionError, (path, trained.model), {}),
        ("every field of it is empty", OptionError, (path, State(None)), {}),
        ("http", OptionError, ("https://example.com/last.pt", trained), {}),
        ("extra has 'rng'", OptionError, (path, trained), {"extra": {"rng": 1}}),
        (r"extra\['hook'\] cannot be saved", OptionError, (path, trained), {"extra": {"hook": lambda: 0}}),
        ("expected a mapping", OptionError, (path, trained), {"extra": [1]}),
        ("tag names a folder", OptionError, (path, trained), {"tag": "step1"}),
        ("is a folder", Exception, (tmp_path, trained), {}),
        ("unknown option", OptionError, (path, trained), {"options": {"nope": 1}}),
    ):
        with pytest.raises(kind, match=match):
            save_checkpoint(*arguments, **more)
    assert os.listdir(tmp_path) == []


def test_parts_beside_an_engine_are_refused():
    from rankload.loader.saving import _refuse_parts

    class Engine:
        lr_scheduler = None

    with pytest.raises(LayoutError, match=r"callbacks, timestamp beside a DeepSpeed engine"):
        _refuse_parts(State(Engine(), callbacks=[object()], timestamp={"batch": 1}), Engine())
