"""Which checkpoint of a run is taken, and why others are not: every kind, whole and broken."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from bad_server import Behaviour, bad_server
from http_server import Served, counting_server
from places import DATA
from rankload.loader import AccessError, FormatError, State, save_checkpoint
from rankload.loader.candidates.found import FoundCheckpoint
from rankload.loader.finding import find
from rankload.loader.stores.manifest import manifest_of
from torch import nn


def taken(found: list[FoundCheckpoint]) -> FoundCheckpoint:
    return next(one for one in found if one.proven)


def names(found: list[FoundCheckpoint]) -> list[str]:
    return [Path(one.path).name for one in found]


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    with tarfile.open(DATA / "deepspeed-zero1-w4.tar") as archive:
        archive.extractall(folder, filter="data")
    return folder / "s1-w4" / "step3"


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.glob(pattern)).unlink()


def cut(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = next(folder.glob(pattern))
        os.truncate(path, path.stat().st_size * 2 // 3)

    return change


def empty(pattern: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(next(folder.glob(pattern)), 0)


KILLED = {
    "an optimizer file is missing": (remove("*rank_2*optim*"), r"rank_2.*optim_states\.pt is not there"),
    "an optimizer file is cut": (cut("*rank_3*optim*"), "zip directory"),
    "an optimizer file is empty": (empty("*rank_1*optim*"), "is empty"),
    "the first one is missing": (remove("*rank_0*optim*"), "optimizer file of rank 0"),
    "the model file is cut": (cut("mp_rank_00*"), "zip directory"),
    "the model file is missing": (remove("mp_rank_00*"), "no checkpoint"),
}


@pytest.mark.parametrize("case", KILLED)
def test_a_deepspeed_tag_that_a_kill_left(zero: Path, tmp_path: Path, case: str) -> None:
    change, reason = KILLED[case]
    for tag in ("global_step3", "global_step6"):
        shutil.copytree(zero, tmp_path / tag)
    change(tmp_path / "global_step6")
    (tmp_path / "latest").write_text("global_step6")
    found = find(str(tmp_path))
    assert names(found) == ["global_step6", "global_step3"]
    assert found[0].pointer == "latest"
    assert found[0].proven is False
    assert re.search(reason, found[0].reason), found[0]
    assert taken(found).path == str(tmp_path / "global_step3")
    assert (taken(found).kind, taken(found).world_size, taken(found).step) == ("deepspeed", 4, 3)


def test_the_pointer_goes_first_where_it_is_proven_and_newest_turns_that_off(
    zero: Path, tmp_path: Path
) -> None:
    for tag in ("global_step3", "global_step20", "global_step100"):
        shutil.copytree(zero, tmp_path / tag)
    (tmp_path / "latest").write_text("global_step20")
    assert names(find(str(tmp_path))) == ["global_step20", "global_step100", "global_step3"]
    found = find(str(tmp_path), newest=True)
    assert names(found) == ["global_step100", "global_step20", "global_step3"]
    assert [one.proven for one in found] == [True, None, None]
    assert [one.proven for one in find(str(tmp_path), newest=True, every=True)] == [True, True, True]


def test_what_is_newer_than_the_pointers_is_examined_too(zero: Path, tmp_path: Path) -> None:
    """A killed save of DeepSpeed's leaves ``latest`` on the older tag: the reason why the newer one is not taken."""
    for tag in ("global_step1", "global_step3", "global_step6", "global_step9"):
        shutil.copytree(zero, tmp_path / tag)
    (tmp_path / "latest").write_text("global_step3")
    cut("*rank_1*optim*")(tmp_path / "global_step6")
    found = find(str(tmp_path))
    assert names(found) == ["global_step3", "global_step9", "global_step6", "global_step1"]
    assert [one.proven for one in found] == [True, True, False, None]
    assert re.search(r"rank_1.*optim_states\.pt is damaged.*zip directory", found[2].reason), found[2]


@pytest.mark.parametrize("text", ["", "../elsewhere", "gone"], ids=["empty", "elsewhere", "gone"])
def test_a_latest_that_names_nothing_is_passed_over(zero: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(zero, tmp_path / "global_step3")
    (tmp_path / "latest").write_text(text)
    found = find(str(tmp_path))
    assert taken(found).path == str(tmp_path / "global_step3")
    passed = [one for one in found if one.proven is False]
    assert len(passed) == 1
    assert passed[0].reason


def test_a_nested_tag(zero: Path, tmp_path: Path) -> None:
    shutil.copytree(zero, tmp_path / "epoch1" / "step3")
    (tmp_path / "latest").write_text("epoch1/step3")
    assert taken(find(str(tmp_path))).path == str(tmp_path / "epoch1" / "step3")


def test_dcp_is_whole_once_its_metadata_is_there(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        shutil.copytree(DATA / "dcp-fsdp2-w2" / "ckpt", tmp_path / f"step-{step}")
    (tmp_path / "step-30" / ".metadata").unlink()
    cut("__1_0.distcp")(tmp_path / "step-20")
    found = find(str(tmp_path))
    assert names(found) == ["step-30", "step-20", "step-10"]
    assert "was not finished" in found[0].reason
    assert "__1_0.distcp is cut short" in found[1].reason
    assert found[2].proven


def test_lightning_writes_its_meta_last(tmp_path: Path) -> None:
    for step in (10, 20):
        shutil.copytree(DATA / "lightning-mp-w2" / "ckpt", tmp_path / f"epoch=0-step={step}.ckpt")
    (tmp_path / "epoch=0-step=20.ckpt" / "meta.pt").unlink()
    found = find(str(tmp_path))
    assert "has no meta.pt, which Lightning writes last" in found[0].reason
    assert taken(found).path.endswith("step=10.ckpt")


def test_trainer_writes_its_state_last(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        shutil.copytree(DATA / "trainer-plain-w2" / "ckpt", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-12" / "rng_state_0.pth").unlink()
    (tmp_path / "checkpoint-100").mkdir()
    # What Trainer puts there at the end of a run, from which none goes on.
    shutil.copy(DATA / "trainer-plain-w2" / "ckpt" / "model.safetensors", tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "runs").mkdir()
    found = find(str(tmp_path))
    assert names(found) == ["checkpoint-100", "checkpoint-12", "checkpoint-8", "checkpoint-4"]
    assert "rng_state_0.pth" in found[1].reason
    assert "trainer_state.json, which Trainer writes last" in found[2].reason
    assert (taken(found).step, taken(found).path) == (4, str(tmp_path / "checkpoint-4"))
    assert names(find(str(tmp_path / "checkpoint-4"))) == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("writer", "name", "last"),
    [
        ("trainer-plain-w2", "checkpoint-{}", "trainer_state.json, which Trainer"),
        ("accelerate-plain-w2", "checkpoint_{}", "random_states_0.pkl, which Accelerate"),
    ],
)
@pytest.mark.parametrize("more", [(), ("config.json",)], ids=["weights", "and their configuration"])
def test_frameworks_write_the_weights_first(
    tmp_path: Path, writer: str, name: str, last: str, more: tuple[str, ...]
) -> None:
    """A kill right after them leaves a folder that would do for inference: no run goes on from it."""
    shutil.copytree(DATA / writer / "ckpt", tmp_path / name.format(4))
    killed = tmp_path / name.format(8)
    killed.mkdir()
    shutil.copy(DATA / writer / "ckpt" / "model.safetensors", killed)
    for each in more:
        (killed / each).write_text("{}")
    found = find(str(tmp_path))
    assert names(found) == [name.format(8), name.format(4)]
    assert f"has no {last} writes last: the save was not finished" in found[0].reason
    assert taken(found).path == str(tmp_path / name.format(4))


def test_accelerate_in_its_projects_folder(tmp_path: Path) -> None:
    project = tmp_path / "project" / "checkpoints"
    for number in (0, 1, 2):
        shutil.copytree(DATA / "accelerate-zero2-w2" / "ckpt", project / f"checkpoint_{number}")
    (project / "checkpoint_2" / "random_states_1.pkl").unlink()
    (project / "checkpoint_1" / "random_states_0.pkl").unlink()
    (project / "checkpoint_1" / "random_states_1.pkl").unlink()
    found = find(str(tmp_path / "project"))
    assert names(found) == ["checkpoint_2", "checkpoint_1", "checkpoint_0"]
    assert "saved by 2 ranks and has random states of 1" in found[0].reason
    assert "Accelerate writes last" in found[1].reason
    assert found[2].proven


def composer(folder: Path, *, ends: str = ".pt.tar") -> None:
    for rank in (0, 1):
        source = DATA / "composer-zero1-w2" / f"ep1-ba4-rank{rank}.pt.tar"
        for batch in (4, 8):
            shutil.copy(source, folder / f"ep1-ba{batch}-rank{rank}{ends}")


def test_composers_archives_and_its_links(tmp_path: Path) -> None:
    composer(tmp_path)
    for rank in (0, 1):
        (tmp_path / f"latest-rank{rank}.pt.tar").symlink_to(f"ep1-ba8-rank{rank}.pt.tar")
    found = find(str(tmp_path))
    assert [one.path for one in found] == [
        str(tmp_path / f"ep1-ba{batch}-rank{{rank}}.pt.tar") for batch in (8, 4)
    ]
    assert found[0].pointer == "latest-rank0.pt.tar"
    assert (found[0].proven, found[0].world_size, found[0].kind) == (True, 2, "composer-zero")
    for path in ("latest-rank{rank}.pt.tar", "ep*-ba*-rank{rank}.pt.tar", "ep1-ba8-rank{rank}.pt.tar"):
        assert taken(find(str(tmp_path / path))).path == found[0].path, path
    (tmp_path / "ep1-ba8-rank1.pt.tar").unlink()
    found = find(str(tmp_path / "latest-rank{rank}.pt.tar"))
    assert "ep1-ba8-rank1.pt.tar is not there" in found[0].reason
    assert taken(found).path == str(tmp_path / "ep1-ba4-rank{rank}.pt.tar")


def test_composers_links_in_a_store_without_links(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    folder = f"/run-{tmp_path.name}"
    composer(tmp_path)
    for path in tmp_path.iterdir():
        store.put_file(str(path), f"{folder}/{path.name}")
    store.pipe_file(f"{folder}/latest-rank0.pt.tar.symlink", f"{folder[1:]}/ep1-ba4-rank0.pt.tar".encode())
    found = find(f"memory:/{folder}")
    assert taken(found).path == f"memory:/{folder}/ep1-ba4-rank{{rank}}.pt.tar"
    assert taken(found).pointer == "latest-rank0.pt.tar.symlink"
    store.rm(folder, recursive=True)


def test_a_pattern_in_the_middle_of_a_path(tmp_path: Path) -> None:
    """As verl saves: a folder for each step, and in it one for each model."""
    for step in (10, 20):
        shutil.copytree(DATA / "rank-shards-w2", tmp_path / f"global_step_{step}" / "actor")
        (tmp_path / f"global_step_{step}" / "critic").mkdir()
    (tmp_path / "global_step_20" / "actor" / "model_world_size_2_rank_1.pt").unlink()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    found = find(f"{tmp_path}/global_step_*/actor")
    assert [one.path for one in found] == [f"{tmp_path}/global_step_{step}/actor" for step in (20, 10)]
    assert "model_world_size_2_rank_1.pt" in found[0].reason
    assert taken(found).step == 10


def test_files_of_scripts_and_lightning_by_what_they_tell_themselves(tmp_path: Path) -> None:
    for name, step in (("last.ckpt", 30), ("epoch=0-step=10.ckpt", 10), ("epoch=1-step=20.ckpt", 20)):
        weights = nn.Linear(2, 2).state_dict()
        torch.save(
            {"state_dict": weights, "pytorch-lightning_version": "2.6", "global_step": step}, tmp_path / name
        )
    assert names(find(str(tmp_path)))[0] == "last.ckpt"
    assert taken(find(str(tmp_path))).step == 30
    os.truncate(tmp_path / "last.ckpt", 500)
    found = find(str(tmp_path))
    assert taken(found).step == 20
    assert names([one for one in found if one.proven is False]) == ["last.ckpt"]


def test_our_own_saves_and_what_a_killed_one_leaves(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / f"step{step}.pt", State(nn.Linear(2, 2)), extra={"step": step})
    (tmp_path / "step3.pt.0123abcd.part").write_bytes(b"PK\3\4 and so on")
    found = find(str(tmp_path))
    assert names(found) == ["step2.pt", "step1.pt"]
    assert taken(found).step == 2


def test_a_manifest_decides_where_files_are_of_two_saves(tmp_path: Path) -> None:
    """A DCP folder that was saved again, and killed: sizes fit, and the manifest is of the save before."""
    for step in (10, 20):
        folder = tmp_path / f"step-{step}"
        shutil.copytree(DATA / "dcp-fsdp2-w2" / "ckpt", folder)
        names = sorted(path.name for path in folder.iterdir())
        sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
        (folder / "SHA256SUMS").write_bytes(manifest_of(sums))
    assert taken(find(str(tmp_path))).path.endswith("step-20")
    part = tmp_path / "step-20" / "__1_0.distcp"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    later = (tmp_path / "step-20" / "SHA256SUMS").stat().st_mtime + 1
    os.utime(part, (later, later))
    found = find(str(tmp_path))
    assert "__1_0.distcp was written after SHA256SUMS" in found[0].reason
    assert taken(found).path.endswith("step-10")
    # A copy may give every file a later time: what is the same stays whole.
    same = tmp_path / "step-10" / "__0_0.distcp"
    os.utime(same, (later, later))
    assert taken(find(str(tmp_path))).path.endswith("step-10")


def test_one_checkpoint_is_its_own_only_candidate(zero: Path) -> None:
    assert [one.path for one in find(str(zero))] == [str(zero)]
    for name in ("dcp-fsdp2-w2/ckpt", "rank-shards-w2", "accelerate-plain-w2/ckpt"):
        assert [(one.path, one.proven) for one in find(str(DATA / name))] == [(str(DATA / name), True)]
    file = DATA / "composer-monolithic-w2" / "ep2-ba8-rank0.pt"
    assert [(one.path, one.proven) for one in find(str(file))] == [(str(file), True)]


def test_over_http_the_pointer_is_all_that_is_known(zero: Path) -> None:
    objects = {f"/run/step3/{path.name}": Behaviour(path.read_bytes()) for path in zero.iterdir()}
    with bad_server({**objects, "/run/latest": Behaviour(b"step3")}) as server:
        found = find(server.url("/run"))
        assert [(one.path, one.proven, one.pointer) for one in found] == [
            (server.url("/run/step3"), True, "latest")
        ]
        lost = next(zero.glob("*rank_3*optim*")).name
        del server.objects[f"/run/step3/{lost}"]
        assert f"{lost} is not there" in find(server.url("/run"))[0].reason


def test_nothing_and_what_may_not_be_read(tmp_path: Path) -> None:
    assert find(str(tmp_path)) == []
    assert find(str(tmp_path / "not-there")) == []
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "logs").mkdir()
    assert find(str(tmp_path)) == []
    with pytest.raises(FormatError, match="one part of the path alone"):
        find(str(tmp_path / "*" / "*-rank{rank}.pt"))
    with pytest.raises(FormatError, match="cannot list"):
        find("https://example.com/run/*.pt")
    with counting_server({"/run/latest": Served(b"", status=403)}) as server, pytest.raises(AccessError):
        find(server.url("/run"))


def test_it_imports_no_torch(zero: Path) -> None:
    code = (
        "import sys\n"
        "from rankload.loader.finding import find\n"
        "assert find(sys.argv[1])[0].proven\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(zero)], check=True, timeout=60)
