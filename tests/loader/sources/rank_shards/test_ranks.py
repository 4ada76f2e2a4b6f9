"""One file a rank, saved by torch alone on four ranks, into jobs of other kinds and sizes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import rank_shards_worker
from deepspeed_ranks import ENVIRONMENT
from places import SUPPORT
from processes import run_ranks

WORKER = str(SUPPORT / "rank_shards_worker.py")
KINDS = ("fsdp2", "hsdp", "tp")


def run(function: str, world_size: int, *args: object) -> None:
    finished = run_ranks(f"{WORKER}:{function}", world_size, args=args, deadline_s=180, env=ENVIRONMENT)
    assert [rank.returncode for rank in finished] == [0] * world_size, finished


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    run("write", 4, folder, *KINDS)
    # Two saves in one folder: the files of two ranks are from a job of another kind.
    broken = folder / "broken"
    broken.mkdir()
    for rank in range(4):
        name = f"model_world_size_4_rank_{rank}.pt"
        shutil.copy(folder / KINDS[rank % 2] / name, broken / name)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_into_a_job_of_one_rank(root: Path, kind: str) -> None:
    for path in (root / kind, root / kind / "by-hand-{rank}.pt"):
        rank_shards_worker.check(str(path), rank_shards_worker.plain_job(seed=11))


def test_into_shards_of_two_ranks(root: Path) -> None:
    run("restore", 2, root, *(f"{kind}:fsdp2" for kind in KINDS), "fsdp2:plain")


def test_into_shards_of_as_many_and_of_more_ranks(root: Path) -> None:
    run("restore", 4, root, "fsdp2:fsdp2:exact", "hsdp:hsdp:exact", "tp:hsdp", "hsdp:fsdp2")
    run("restore", 5, root, "fsdp2:plain")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_into_deepspeed_engines(root: Path, world_size: int) -> None:
    run("engines", world_size, root, "fsdp2", "tp")
