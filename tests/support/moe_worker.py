"""Mixtures of experts: saves with DeepSpeed at one world size and restores at another; every rank runs each function.

As reshard_worker.py, but that ranks have different experts: what DeepSpeed reported before it saved is kept once for
each expert-parallel rank, under the names that its experts have there, and every rank compares its own.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from journey_worker import start_deepspeed
from moe_model import make_moe_engine
from rankload.loader import RankloadError, State, capture_rng, load
from reshard_worker import (
    RANK,
    WORLD_SIZE,
    differences,
    expected_state,
    numbers,
    say,
    slug,
    tensors_at,
    wrong_numbers,
    wrong_rng,
)
from zero_model import LATER_DATA_SEED, module_state, train

ADAM = ("exp_avg", "exp_avg_sq")
EP_2 = [[4, 2], [2, 2]]

SETTINGS: dict[str, dict[str, Any]] = {
    "0 fp32 ep 2": {"stage": 0, "dtype": "fp32", "layers": EP_2},
    "0 bf16 ep 2": {"stage": 0, "layers": EP_2},
    "1 bf16 ep 2": {"stage": 1, "layers": EP_2},
    "1 fp32 ep 2": {"stage": 1, "dtype": "fp32", "layers": EP_2},
    "1 BF16_Optimizer ep 2": {
        "stage": 1, "layers": EP_2, "config": {"data_types": {"grad_accum_dtype": "fp32"}},
    },
    "1 fp32 ep 2 data first": {
        "stage": 1, "dtype": "fp32", "layers": EP_2, "config": {"use_data_before_expert_parallelism": True},
    },
    "2 bf16 ep 2": {"stage": 2, "layers": EP_2},
    "2 fp32 ep 2 round-robin": {
        "stage": 2, "dtype": "fp32", "layers": EP_2, "zero": {"round_robin_gradients": True},
    },
    "2 bf16 ep 2 elastic aligned": {
        "stage": 2, "layers": EP_2, "zero": {"elastic_checkpoint": True, "parameter_alignment": True},
    },
    "1 bf16 ep 1": {"stage": 1, "layers": [[2, 1], [3, 1]]},
    "2 fp32 ep 4": {"stage": 2, "dtype": "fp32", "layers": [[4, 4], [8, 4]]},
    "1 fp32 ep 2 and 4": {"stage": 1, "dtype": "fp32", "layers": [[4, 2], [4, 4]]},
    "1 fp32 ep 4": {"stage": 1, "dtype": "fp32", "layers": [[4, 4], [2, 2]]},
    "1 fp32 ep 2, 8 experts": {"stage": 1, "dtype": "fp32", "layers": [[8, 2], [2, 2]]},
}  # fmt: skip


def main(*steps: str) -> None:
    """Does ``function argument function argument ...`` in one process group: starting the ranks costs most."""
    start_deepspeed()
    for function, argument in zip(steps[::2], steps[1::2], strict=True):
        globals()[function](json.loads(argument))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def engine_of(setting: str, seed: int) -> Any:
    return make_moe_engine(seed=seed, **SETTINGS[setting])


def dtype_of(setting: str) -> str:
    return str(SETTINGS[setting].get("dtype", "bf16"))


def ep_rank_of(engine: Any) -> int:
    """This rank within the widest expert group: ranks that agree in it have the same experts throughout."""
    widest = max(engine.module.moes, key=lambda moe: moe.ep_size)
    return int(torch.distributed.get_rank(widest.deepspeed_moe.ep_group))


def report(engine: Any, setting: str) -> dict[str, torch.Tensor]:
    return dict(tensors_at(engine, SETTINGS[setting]["stage"], ADAM))


def save(told: dict[str, Any]) -> None:
    """`told`: ``root`` and ``settings``. Those that are there already are left."""
    for setting in told["settings"]:
        folder = Path(told["root"], slug(setting, WORLD_SIZE))
        if (folder / "losses.json").exists():
            continue
        engine = engine_of(setting, seed=0)
        train(engine, 3, rank=0)
        torch.manual_seed(1000 + RANK)
        engine.save_checkpoint(str(folder), client_state={"epoch": 3, "rng": capture_rng()})
        kept = {"state": report(engine, setting), "numbers": numbers(engine)}
        losses = train(engine, 2, rank=0, seed=LATER_DATA_SEED)
        ep_ranks = gathered(ep_rank_of(engine))
        if ep_ranks.index(ep_ranks[RANK]) == RANK:
            torch.save(kept, folder / f"oracle{ep_ranks[RANK]}.pt")
        torch.distributed.barrier()
        if RANK == 0:
            (folder / "losses.json").write_text(json.dumps(losses))
        del engine, kept
        gc.collect()
        say({"saved": setting})


def restore(told: dict[str, Any]) -> None:
    """`told`: ``root`` (a folder or URL), ``oracles`` (a folder) and ``cases``: [source, N, target]."""
    for source, saved_world_size, target in told["cases"]:
        name = slug(source, saved_world_size)
        folder = Path(told["oracles"], name)
        engine = engine_of(target, seed=5)
        oracle = torch.load(folder / f"oracle{ep_rank_of(engine)}.pt", weights_only=True)
        expected = expected_state(oracle["state"], dtype_of(source), dtype_of(target))
        begin = time.perf_counter()
        result = load(f"{told['root']}/{name}", State(engine))
        seconds = time.perf_counter() - begin
        problems = differences(expected, report(engine, target)) + wrong_numbers(engine, oracle["numbers"])
        problems += wrong_rng(result, 0, saved_world_size) + without_state(engine)
        losses = train(engine, 2, rank=0, seed=LATER_DATA_SEED)
        same = (source, saved_world_size) == (target, WORLD_SIZE)
        allowed = 0.0 if same else 1e-3 if dtype_of(source) == dtype_of(target) else 2e-2
        wanted = json.loads((folder / "losses.json").read_text())
        apart = max(abs(a / b - 1) for a, b in zip(losses, wanted, strict=True))
        if apart > allowed:
            problems.append(f"losses {losses}, expected {wanted}")
        everyones = gathered([f"rank {RANK}: {problem}" for problem in problems])
        say(
            {
                "source": source,
                "n": saved_world_size,
                "target": target,
                "m": WORLD_SIZE,
                "problems": [problem for each in everyones for problem in each],
                "apart": apart,
                "seconds": seconds,
                "tensors": sum(gathered(len(expected))),
                "notes": list(result.receipt.notes),
            }
        )
        del engine, result
        gc.collect()


def without_state(engine: Any) -> list[str]:
    """Flat tensors of this rank, those of padding alone too, for which the optimizer was given no state."""
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    flats = [flat for group in base.param_groups for flat in group["params"]]
    return [
        f"no state for flat tensor {index}"
        for index, flat in enumerate(flats)
        if not {"step", *ADAM} <= base.state.get(flat, {}).keys()
    ]


def parts(told: dict[str, Any]) -> None:
    """Weights alone into engines of every layout of as many experts, and an expert's weights left out by name."""
    source, saved_world_size = told["source"]
    folder = Path(told["root"], slug(source, saved_world_size))
    for target in told["targets"]:
        engine = engine_of(target, seed=5)
        load(str(folder), State(engine), load_weights_only=True)
        say(
            {
                "target": target,
                "problems": [p for each in gathered(wrong_experts(engine, folder)) for p in each],
            }
        )
    engine = engine_of(source, seed=5)
    left = "moes.0.deepspeed_moe.experts.deepspeed_experts.1.up.weight"
    before = dict(engine.module.named_parameters())[left].detach().clone()
    result = load(str(folder), State(engine), ignore_keys=f"state/model/{left}")
    after = dict(engine.module.named_parameters())
    oracle = torch.load(folder / f"oracle{ep_rank_of(engine)}.pt", weights_only=True)["state"]
    say(
        {
            "kept": gathered(torch.equal(before, after[left])),
            "restored": gathered(
                all(
                    torch.equal(value.float(), oracle[f"module/{name}"])
                    for name, value in after.items()
                    if name != left
                )
            ),
            "ignored": list(result.receipt.ignored),
        }
    )


def wrong_experts(engine: Any, folder: Path) -> list[str]:
    """Parameters that are not what DeepSpeed's own files hold, by each expert's number over all ranks."""
    (tag,) = (path for path in folder.iterdir() if path.is_dir())
    problems = []
    for index, moe in enumerate(engine.module.moes):
        ep_rank = torch.distributed.get_rank(moe.deepspeed_moe.ep_group)
        for local, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
            number = ep_rank * moe.num_local_experts + local
            saved = torch.load(tag / f"layer_{index}_expert_{number}_mp_rank_00_model_states.pt")
            for name, value in expert.state_dict().items():
                whole = f"moes.{index}.deepspeed_moe.experts.deepspeed_experts.{number}.{name}"
                if not torch.equal(value, saved[whole].to(value.dtype)):
                    problems.append(f"rank {RANK}: {whole}")
    return problems


def refuse(told: dict[str, Any]) -> None:
    """What every rank raises: ``cases`` are [source, N, setting or ``plain``, a file that is lost or None]."""
    for source, saved_world_size, target, lost in told["cases"]:
        folder = Path(told["root"], slug(source, saved_world_size))
        if lost is not None:
            whole, folder = folder, folder.with_name("incomplete")
            if RANK == 0:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(whole, folder)
                next(folder.glob(f"*/{lost}")).unlink()
            torch.distributed.barrier()
        model = torch.nn.Linear(2, 2) if target == "plain" else engine_of(target, seed=5)
        before = module_state(model) if target != "plain" else {}
        error: list[str] = ["nothing", ""]
        try:
            load(str(folder), State(model))
        except RankloadError as found:
            error = [type(found).__name__, str(found)]
        if before and differences(before, module_state(model)):
            error[0] += ", and something was changed"
        say({"errors": gathered(error)})
        del model
        gc.collect()


def gathered(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    found: list[Any] = [None] * WORLD_SIZE
    torch.distributed.all_gather_object(found, value)
    return found


if __name__ == "__main__":
    from processes import end_together

    main(*sys.argv[1:])
    end_together()
