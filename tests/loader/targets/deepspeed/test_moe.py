"""Mixtures of experts that DeepSpeed saved, restored at the same and at other world sizes: moe_worker.py says what is
held."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_ranks import ENVIRONMENT, needs_deepspeed
from http_server import Served, counting_server
from places import SUPPORT
from processes import run_ranks

pytestmark = needs_deepspeed

WORKER = SUPPORT / "moe_worker.py"
Case = tuple[str, int, str]
"""Setting that saved, by how many ranks, setting that restores."""

CORE = ("1 bf16 ep 2", "2 fp32 ep 2 round-robin")
OTHERS = (
    "0 fp32 ep 2", "0 bf16 ep 2", "1 BF16_Optimizer ep 2", "1 fp32 ep 2 data first", "2 bf16 ep 2 elastic aligned",
)  # fmt: skip


def run(world_size: int, *steps: tuple[str, dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Runs functions of the worker on every rank, all of which must end well; what rank 0 printed."""
    extra = options.pop("env", lambda rank: {})
    finished = run_ranks(
        WORKER,
        world_size,
        args=[part for function, told in steps for part in (function, json.dumps(told))],
        deadline_s=options.pop("deadline_s", 300),
        # DeepSpeed puts groups of experts in the order of a set of names.
        env=lambda rank: {**ENVIRONMENT, "PYTHONHASHSEED": "0", **extra(rank)},
        **options,
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    return [json.loads(line) for line in finished[0].stdout.splitlines() if line.startswith("{")]


def restoring(root: Path, cases: Sequence[Case], url: str | None = None) -> tuple[str, dict[str, Any]]:
    return "restore", {"root": url or str(root), "oracles": str(root), "cases": cases}


def assert_restored(told: list[dict[str, Any]], count: int) -> None:
    restored = [one for one in told if "problems" in one]
    assert len(restored) == count
    assert not [(one["source"], one["target"], one["problems"]) for one in restored if one["problems"]]
    assert all(one["tensors"] >= 80 * one["m"] for one in restored if "tensors" in one)


@pytest.fixture(scope="module")
def saved_by_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("moe")
    run(2, ("save", {"root": str(root), "settings": CORE}))
    return root


@pytest.fixture(scope="module")
def on_4(saved_by_2: Path) -> list[dict[str, Any]]:
    """What four ranks told: they save, go back to where they were, take two ranks' files, and meet errors.

    Starting the ranks costs most, so they do all of it in one job.
    """
    root = saved_by_2
    source = CORE[1]
    refused = [
        [source, 4, "1 fp32 ep 4", None],
        [source, 4, "1 fp32 ep 2, 8 experts", None],
        [source, 4, "plain", None],
        [source, 4, source, "layer_0_expert_3_mp_rank_00_model_states.pt"],
    ]
    return run(
        4,
        ("save", {"root": str(root), "settings": CORE}),
        restoring(root, [(CORE[0], 4, CORE[0]), (CORE[1], 4, CORE[1])]),
        restoring(root, [(CORE[0], 2, CORE[0]), (CORE[1], 2, CORE[0])]),
        ("parts", {"root": str(root), "source": [source, 4], "targets": ["1 fp32 ep 4"]}),
        ("refuse", {"root": str(root), "cases": refused}),
    )


def test_back_at_the_own_size_and_two_ranks_checkpoints_on_four(on_4: list[dict[str, Any]]) -> None:
    restored = [one for one in on_4 if "apart" in one]
    assert_restored(restored, 4)
    assert [one["apart"] for one in restored[:2]] == [0.0, 0.0]
    assert "resharded from 2 ranks to 4 ranks" in restored[2]["notes"][0]


def test_what_is_compared_differs_between_ranks_of_other_experts(
    saved_by_2: Path, on_4: list[dict[str, Any]]
) -> None:
    first, second = (
        torch.load(saved_by_2 / "1-bf16-ep-2-of-4" / f"oracle{ep_rank}.pt")["state"] for ep_rank in (0, 1)
    )
    assert first.keys() == second.keys()
    same = {name for name in first if torch.equal(first[name], second[name])}
    trained = {name for name in first if "deepspeed_experts" in name and not name.endswith(".calls")}
    assert {name.partition("/")[0] for name in trained} == {"module", "fp32", "exp_avg", "exp_avg_sq"}
    assert same == first.keys() - trained


def test_weights_alone_at_any_expert_parallel_size(on_4: list[dict[str, Any]]) -> None:
    assert_restored([one for one in on_4 if "problems" in one and "apart" not in one], 1)


def test_an_experts_weight_is_left_out_by_its_name_on_each_rank(on_4: list[dict[str, Any]]) -> None:
    (told,) = (one for one in on_4 if "kept" in one)
    assert told["kept"] == told["restored"] == [True] * 4
    assert told["ignored"] == ["state/model/moes.0.deepspeed_moe.experts.deepspeed_experts.1.up.weight"]


def test_other_experts_are_an_error_that_names_both_layouts(on_4: list[dict[str, Any]]) -> None:
    size, number, plain, lost = (one["errors"] for one in on_4 if "errors" in one)
    for errors in (size, number, plain, lost):
        assert len({tuple(error) for error in errors}) == 1, errors
    kinds = [errors[0][0] for errors in (size, number, plain, lost)]
    assert kinds == ["LayoutError", "LayoutError", "LayoutError", "NotFoundError"]
    assert "moes.0: 4 experts, ep_size 2 saved and 4 here" in size[0][1]
    assert "saved by 2 MoE layers of 4, 2 experts, and this job has 2 MoE layers of 8, 2" in number[0][1]
    assert "saved by 2 MoE layers of 4, 2 experts, and this job has a module without" in plain[0][1]
    assert "layer_0_expert_3_mp_rank_00_model_states.pt: not there, needed by ranks 1, 3" in lost[0][1]


def test_over_http_each_node_fetches_its_own_experts(
    saved_by_2: Path, on_4: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Four ranks' checkpoints on two nodes of one rank each: half of the experts on either."""
    root, name = saved_by_2, "1-bf16-ep-2-of-4"
    served = {
        f"/{path.relative_to(root)}": Served(path.read_bytes())
        for source in (name, "2-fp32-ep-2-round-robin-of-4")
        for path in (root / source).rglob("*")
        if path.is_file() and path.suffix != ".py"
    }
    with counting_server(served) as server:
        told = run(
            2,
            restoring(root, [(CORE[0], 4, CORE[0]), (CORE[1], 4, CORE[0])], server.url("")),
            nodes=(1, 1),
            env=lambda rank: {"RANKLOAD_CACHE_DIR": str(tmp_path / f"cache{rank}")},
        )
        gets = {path.rsplit("/", 1)[1]: server.gets(path) for path in served if f"/{name}/" in path}
    assert_restored(told, 2)
    experts = {path: count for path, count in gets.items() if "expert" in path}
    assert len(experts) == 6
    assert set(experts.values()) == {1}, experts
    # A half of everything else: ranks 0 and 1, or 2 and 3; of the experts, ranks 0 and 2, or 1 and 3.
    shares = [gets[f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] for rank in range(4)]
    assert shares == [1, 2, 2, 1]


@pytest.mark.takes_long
def test_every_kind_of_engine_at_other_sizes(saved_by_2: Path) -> None:
    settings = (*CORE, *OTHERS)
    turned = [(source, settings[index - 1]) for index, source in enumerate(settings)]
    told = run(4, ("save", {"root": str(saved_by_2), "settings": settings}))
    for world_size in (2, 4, 8):
        cases = [(source, 4, target) for source, target in turned]
        if world_size == 4:
            cases += [(source, 4, source) for source in settings]
        told = run(world_size, restoring(saved_by_2, cases), deadline_s=600)
        assert_restored(told, len(cases))


@pytest.mark.parametrize(
    ("setting", "saved", "sizes"),
    [("1 bf16 ep 1", 2, (1, 2, 3)), ("2 fp32 ep 4", 4, (4, 8)), ("1 fp32 ep 2 and 4", 4, (4, 8))],
)
def test_other_expert_parallel_sizes(
    setting: str, saved: int, sizes: tuple[int, ...], saved_by_2: Path
) -> None:
    run(saved, ("save", {"root": str(saved_by_2), "settings": [setting]}))
    for world_size in sizes:
        assert_restored(run(world_size, restoring(saved_by_2, [(setting, saved, setting)])), 1)


def test_groups_of_experts_that_another_rank_had_in_another_order(tmp_path: Path) -> None:
    """Several ep_size in one module: DeepSpeed's order of groups is that of a set of strings on each rank."""
    setting = "1 fp32 ep 2 and 4"
    seeds = {0: "0", 1: "0", 2: "0", 3: "1"}
    told = run(
        4,
        ("save", {"root": str(tmp_path), "settings": [setting]}),
        ("refuse", {"root": str(tmp_path), "cases": [[setting, 4, setting, None]]}),
        env=lambda rank: {"PYTHONHASHSEED": seeds[rank]},
        fork=False,
    )
    (errors,) = (one["errors"] for one in told if "errors" in one)
    assert {tuple(error) for error in errors} == {tuple(errors[0])}
    assert errors[0][0] == "LayoutError"
    assert "PYTHONHASHSEED" in errors[0][1]
