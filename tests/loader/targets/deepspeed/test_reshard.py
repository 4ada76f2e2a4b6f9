"""ZeRO checkpoints that DeepSpeed saved at one world size, restored at another: reshard_worker.py says what is held."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from deepspeed_ranks import needs_deepspeed
from http_server import Served, counting_server
from places import DATA
from reshard_runs import Case, run, save
from reshard_worker import SETTINGS, slug
from zero_model import is_older, lacking

pytestmark = needs_deepspeed

SAVED_BY_4 = (
    "0 bf16", "1 bf16 round-robin", "1 BF16_Optimizer", "2 bf16 aligned", "2 bf16 legacy files", "3 bf16 subgroups",
)  # fmt: skip
SAVED_BY_2 = (
    "1 fp32 SGD", "1 bf16 client optimizer", "2 bf16 elastic", "2 bf16 offloaded", "2 fp32 round-robin", "3 fp32",
)  # fmt: skip

FROM_4: tuple[Case, ...] = (
    ("0 bf16", 4, "2 bf16"),
    ("1 bf16 round-robin", 4, "3 bf16"),
    ("1 BF16_Optimizer", 4, "1 bf16"),
    ("2 bf16 aligned", 4, "2 bf16 aligned"),
    ("2 bf16 legacy files", 4, "0 bf16"),
    ("3 bf16 subgroups", 4, "1 bf16 round-robin"),
    ("3 bf16 subgroups", 4, "3 fp32"),
)
FROM_2: tuple[Case, ...] = (
    ("1 fp32 SGD", 2, "3 fp32 SGD"),
    ("1 bf16 client optimizer", 2, "1 BF16_Optimizer"),
    ("2 bf16 elastic", 2, "1 bf16 round-robin"),
    ("2 bf16 offloaded", 2, "3 bf16 subgroups"),
    ("2 fp32 round-robin", 2, "2 bf16 aligned"),
    ("3 fp32", 2, "3 bf16 offloaded"),
)


def possible(cases: Sequence[Case]) -> list[Case]:
    """Those whose engines this DeepSpeed can make and save."""
    return [
        case
        for case in cases
        if not lacking(SETTINGS[case[0]], saves=True) and not lacking(SETTINGS[case[2]])
    ]


def check(
    world_size: int, root: Path, cases: Sequence[Case], *, url: str | None = None, **options: Any
) -> list[Any]:
    request = {"root": url or str(root), "oracles": str(root), "cases": cases}
    told = run(world_size, "main", "restore", json.dumps(request), **options)
    assert len(told) == len(cases)
    problems = [(one["source"], one["target"], one["problems"]) for one in told if one["problems"]]
    assert not problems
    assert all(one["tensors"] > 40 for one in told)
    return told


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    save(root, 4, SAVED_BY_4)
    return save(root, 2, SAVED_BY_2)


def test_four_ranks_checkpoints_on_two(saved: Path) -> None:
    told = check(2, saved, possible(FROM_4))
    assert "4 ranks" in told[1]["notes"][0]
    assert "2 ranks" in told[1]["notes"][0]


def test_two_ranks_checkpoints_on_four(saved: Path) -> None:
    told = check(4, saved, possible(FROM_2))
    # Ranks 2 and 3 have no file of their own; at stages 1 and 2 only rank 0's state was kept.
    assert told[-1]["derived"] == [f"rng of rank {rank} (from rank 0's state)" for rank in (2, 3)]
    assert len(told[0]["derived"]) == 3


def test_on_one_rank_and_back_at_the_own_size(saved: Path) -> None:
    check(1, saved, (("3 bf16 subgroups", 4, "3 bf16"), ("2 bf16 elastic", 2, "2 bf16 elastic")))
    # Another stage at the same size takes other ranks' files too.
    check(2, saved, (("2 bf16 elastic", 2, "3 bf16"), ("3 fp32", 2, "3 fp32"), ("3 fp32", 2, "1 fp32")))


def test_on_three_ranks(saved: Path) -> None:
    check(3, saved, possible((*FROM_4, *FROM_2)))


def test_over_http_each_node_fetches_what_its_ranks_need_once(saved: Path, tmp_path: Path) -> None:
    """Four ranks' checkpoints on two nodes of one rank: each takes its half, and nothing twice."""
    setting = "2 bf16 legacy files" if is_older() else "1 BF16_Optimizer"
    names = (slug(setting, 4), "3-bf16-subgroups-of-4")
    served = {
        f"/{path.relative_to(saved)}": Served(path.read_bytes())
        for name in names
        for path in (saved / name).rglob("*")
        if path.is_file() and path.suffix != ".py"
    }
    with counting_server(served) as server:
        check(
            2,
            saved,
            ((setting, 4, setting), ("3 bf16 subgroups", 4, "3 bf16 subgroups")),
            url=server.url(""),
            nodes=(1, 1),
            env=lambda rank: {"RANKLOAD_CACHE_DIR": str(tmp_path / f"cache{rank}")},
        )
        gets = {path: server.gets(path) for path in served if path.endswith("states.pt")}
    whole = {path: count for path, count in gets.items() if names[0] in path}
    assert sorted(whole.values()) == [1, 1, 1, 1, 2], whole  # the model file is everybody's
    shares = {path.rsplit("/", 1)[1]: count for path, count in gets.items() if names[1] in path}
    for rank in range(4):
        assert shares[f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] == 1, shares
        # Saved rank 0's for its names; rank 1's for rank 0's half of a frozen weight, and for rank 1's own buffers.
        assert shares[f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"] == (2 if rank < 2 else 1), shares


@pytest.mark.parametrize("world_size", [1, 3])
def test_composers_archives_at_another_world_size(world_size: int) -> None:
    (told,) = run(world_size, "composer", DATA)
    assert told["saved"] == [2, 2]
    assert told["batches"] == [4, 4]
    assert told["derived"] == [[] if world_size == 1 else ["rng of rank 2 (from seed 17)"]] * 2
    assert "{rank} and {run_name} only" in told["error"]
