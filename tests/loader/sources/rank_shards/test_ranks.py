"""One file a rank, saved by torch alone on four ranks, into jobs of other kinds and sizes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import rank_shards_worker
import torch
from deepspeed_ranks import ENVIRONMENT, WITHOUT
from modules_worker import plain_job
from places import SUPPORT
from processes import run_ranks
from rankload.loader import LayoutError, State, load

WORKER = str(SUPPORT / "rank_shards_worker.py")
KINDS = ("fsdp2", "hsdp", "tp")


def run(function: str, world_size: int, *args: object) -> None:
    env = ENVIRONMENT if function == "engines" else WITHOUT
    finished = run_ranks(f"{WORKER}:{function}", world_size, args=args, deadline_s=180, env=env)
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
        rank_shards_worker.check(str(path), plain_job(seed=11))


def test_into_shards_of_two_ranks(root: Path) -> None:
    run("restore", 2, root, *(f"{kind}:fsdp2" for kind in KINDS), "fsdp2:plain")


def test_into_shards_of_as_many_and_of_more_ranks(root: Path) -> None:
    run("restore", 4, root, "fsdp2:fsdp2:exact", "hsdp:hsdp:exact", "tp:hsdp", "hsdp:fsdp2")
    run("restore", 5, root, "fsdp2:plain")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_into_deepspeed_engines(root: Path, world_size: int) -> None:
    run("engines", world_size, root, "fsdp2", "tp")


def test_uneven_and_empty_shards_of_every_placement(tmp_path: Path) -> None:
    run("write_uneven", 8, tmp_path)
    wanted = rank_shards_worker.layers()
    found = torch.nn.ModuleDict(
        {name: torch.nn.Linear(*size) for name, size in rank_shards_worker.SIZES.items()}
    )
    load(tmp_path / "uneven-{rank}.pt", State(found), progress_bar=False)
    for name, layer in wanted.items():
        assert torch.equal(found[name].weight, layer.weight), name
        assert torch.equal(found[name].bias, layer.bias), name


def test_what_fsdp1_saves_of_each_rank(tmp_path: Path) -> None:
    run("write_fsdp1", 2, tmp_path)
    for form in ("sharded", "placed"):
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        optimizer = torch.optim.AdamW(model.parameters())
        load(tmp_path / f"{form}-{{rank}}.pt", State(model, optimizer), progress_bar=False)
        found = {f"model/{name}": parameter for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            found |= {f"{key}/{name}": optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")}
        wanted = torch.load(tmp_path / f"{form}-whole")
        assert found.keys() == wanted.keys()
        assert not [name for name, value in wanted.items() if not torch.equal(found[name].flatten(), value)]
    with pytest.raises(LayoutError, match=r"local-0\.pt: model/_flat_param is what FSDP1 has flattened"):
        load(tmp_path / "local-{rank}.pt", State(torch.nn.Linear(3, 5)), progress_bar=False)
