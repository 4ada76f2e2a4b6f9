"""Saves with DeepSpeed at one world size and restores at another; every rank runs each function.

A setting is what an engine is made with. `save` keeps, beside each checkpoint, what DeepSpeed itself reported before
it saved, and the losses of two further steps. `restore` makes engines of other settings, loads, compares every tensor
bit for bit, and trains two steps. All ranks train on the same batch, so that the losses do not depend on how many
there are, but for the order in which floats are added.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from journey_worker import classifier_engine, forward_of_linspace, start_deepspeed
from rankload.loader import LayoutError, State, capture_rng, load
from rankload.loader.targets.deepspeed import weight_regions
from rankload.loader.verify import joint
from torch.nn import functional
from zero_model import LATER_DATA_SEED, make_engine, module_tensors, train

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))

_LINEAR = functional.linear

# So that tensors of this size are handled as those of real models are: summed and brought to a node together.
weight_regions.MIN_REGION_BYTES = 1
joint.ALONE_BYTES = joint.SHARED_FROM_BYTES = 0

_LEGACY = {"config": {"checkpoint": {"checkpoint_serialization": False}}}
_SGD: dict[str, Any] = {"optimizer": "SGD", "config": {"zero_allow_untested_optimizer": True}}
_OFFLOAD: dict[str, Any] = {
    "zero": {"offload_optimizer": {"device": "cpu"}},
    "config": {"zero_force_ds_cpu_optimizer": False},
}

SETTINGS: dict[str, dict[str, Any]] = {
    "0 fp32": {"stage": 0, "dtype": "fp32"},
    "0 bf16": {"stage": 0},
    "1 bf16": {"stage": 1},
    "1 fp32": {"stage": 1, "dtype": "fp32"},
    "1 bf16 round-robin": {"stage": 1, "zero": {"round_robin_gradients": True}},
    "1 BF16_Optimizer": {"stage": 1, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "1 fp32 SGD": {"stage": 1, "dtype": "fp32", **_SGD},
    "1 bf16 client optimizer": {"stage": 1, "client": True},
    "2 bf16": {"stage": 2},
    "2 fp32 round-robin": {"stage": 2, "dtype": "fp32", "zero": {"round_robin_gradients": True}},
    "2 bf16 elastic": {"stage": 2, "zero": {"elastic_checkpoint": True}},
    "2 bf16 aligned": {"stage": 2, "zero": {"parameter_alignment": True}},
    "2 bf16 offloaded": {"stage": 2, **_OFFLOAD},
    "2 bf16 legacy files": {"stage": 2, **_LEGACY},
    "3 bf16": {"stage": 3},
    "3 bf16 subgroups": {"stage": 3, "zero": {"sub_group_size": 2000}},
    "3 fp32": {"stage": 3, "dtype": "fp32"},
    "3 bf16 offloaded": {"stage": 3, **_OFFLOAD},
    "3 fp32 SGD": {"stage": 3, "dtype": "fp32", **_SGD},
}  # fmt: skip


def engine_of(
    setting: str,
    seed: int,
    *,
    sizes: dict[str, int] | None = None,
    zero: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Any:
    """A new engine. DeepSpeed's stage 3 leaves a linear function of its own in torch, which rounds otherwise: an
    engine after it would not compute what it computes in a process of its own."""
    functional.linear = _LINEAR
    told = dict(SETTINGS[setting])
    told["zero"] = {**(zero or {}), **told.get("zero", {})}
    told["config"] = {**(config or {}), **told.get("config", {})}
    return make_engine(seed=seed, sizes=sizes, **told)


def kind_of(setting: str) -> str:
    """Settings can only be restored into those of the same kind of optimizer."""
    return "SGD" if "SGD" in setting else "AdamW"


def dtype_of(setting: str) -> str:
    return str(SETTINGS[setting].get("dtype", "bf16"))


def slug(setting: str, world_size: int) -> str:
    return f"{setting.replace(' ', '-')}-of-{world_size}"


def main(*steps: str) -> None:
    """Does ``function argument function argument ...`` in one process group: starting the ranks costs most."""
    start_deepspeed()
    for function, argument in zip(steps[::2], steps[1::2], strict=True):
        globals()[function](argument)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# --- what is compared ------------------------------------------------------------------------------------------------


def reported(engine: Any, setting: str) -> dict[str, torch.Tensor]:
    """Whole tensors by ``kind/name`` in float32, as they are in `engine`. Every rank must call."""
    return dict(tensors_of(engine, setting))


def tensors_of(engine: Any, setting: str, *, sound: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """What `reported` tells, one after the other. Every rank must take them all. `sound`: the engine must be so."""
    kinds = ("momentum_buffer",) if kind_of(setting) == "SGD" else ("exp_avg", "exp_avg_sq")
    return tensors_at(engine, SETTINGS[setting]["stage"], kinds, sound=sound)


def tensors_at(
    engine: Any, stage: int, kinds: tuple[str, ...], *, sound: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """`tensors_of` for an engine of `stage` whose optimizer keeps `kinds`."""
    if stage == 0:
        yield from _of_stage_0(engine, kinds)
    elif getattr(engine.optimizer, "round_robin_gradients", False):
        yield from _of_the_row(engine, kinds, sound)
    else:
        yield from _as_deepspeed_says(engine, kinds)
    yield from module_tensors(engine)


def _as_deepspeed_says(engine: Any, kinds: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links parameters to their state after the first group's step, when others have none yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield f"fp32/{name}", _plain(safe_get_full_fp32_param(parameter))
            for kind in kinds:
                yield f"{kind}/{name}", _plain(safe_get_full_optimizer_state(parameter, kind))


def _of_stage_0(engine: Any, kinds: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each rank has everything, in the optimizer itself."""
    outer = engine.optimizer
    base = getattr(outer, "optimizer", outer)
    if hasattr(outer, "fp32_groups"):
        low = [p for group in outer.fp16_groups for p in group]
        masters = [p for group in outer.fp32_groups for p in group]
    else:
        low = masters = [p for group in base.param_groups for p in group["params"]]
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for parameter, master in zip(low, masters, strict=True):
        name = names[id(parameter)]
        yield f"fp32/{name}", _plain(master)
        for kind in kinds:
            yield f"{kind}/{name}", _plain(base.state[master][kind])


def _of_the_row(engine: Any, kinds: tuple[str, ...], sound: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """With round_robin_gradients DeepSpeed's own report is wrong, so the partitions are put in a row here, and what
    they give must be what the module computes with."""
    outer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for index, members in enumerate(outer.round_robin_bit16_groups):
        flat = outer.single_partition_of_fp32_groups[index]
        rows = {"fp32": flat, **{kind: outer.optimizer.state[flat][kind] for kind in kinds}}
        for kind, own in rows.items():
            # Experts' rows are over the ranks that have them.
            group = outer.real_dp_process_group[index]
            parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
            torch.distributed.all_gather(parts, own.detach().contiguous(), group=group)
            row, offset = torch.cat(parts), 0
            for parameter in members:
                whole = row[offset : offset + parameter.numel()].view(parameter.shape)
                if kind == "fp32" and sound:
                    assert torch.equal(whole.to(parameter.dtype), parameter), names[id(parameter)]
                yield f"{kind}/{names[id(parameter)]}", _plain(whole)
                offset += parameter.numel()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu().clone()


def expected_state(oracle: dict[str, torch.Tensor], source: str, target: str) -> dict[str, torch.Tensor]:
    """What `target` must hold, given the dtypes: what was saved; in another precision, cast from the masters."""
    if source == target:
        return oracle
    found = dict(oracle)
    for name, value in oracle.items():
        kind, _, parameter = name.partition("/")
        if kind == "module":
            whole = oracle.get(f"fp32/{parameter}", value)
            found[name] = whole if target == "fp32" else whole.bfloat16().float()
    return found


def numbers(engine: Any) -> dict[str, Any]:
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    steps = {float(state["step"]) for state in base.state.values() if "step" in state}
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
        "rates": [[group["lr"], group["weight_decay"]] for group in base.param_groups],
        "steps": sorted(steps),
    }


# --- what the ranks do -----------------------------------------------------------------------------------------------


def save(request: str) -> None:
    """`request`: JSON of ``root`` and ``settings``. Those that are there already are left."""
    told = json.loads(request)
    for setting in told["settings"]:
        folder = Path(told["root"], slug(setting, WORLD_SIZE))
        if (folder / "oracle.pt").exists():
            continue
        engine = engine_of(setting, seed=0)
        train(engine, 3, rank=0)
        torch.manual_seed(1000 + RANK)
        engine.save_checkpoint(str(folder), client_state={"epoch": 3, "rng": capture_rng()})
        state, counts = reported(engine, setting), numbers(engine)
        losses = train(engine, 2, rank=0, seed=LATER_DATA_SEED)
        if RANK == 0:
            if "legacy" in setting:
                for path in folder.glob("*/*_optim_states.pt"):
                    path.rename(path.with_name(path.name.replace("_optim_states", "optim_states")))
            torch.save({"state": state, "numbers": counts, "losses": losses}, folder / "oracle.pt")
        torch.distributed.barrier()
        del engine
        gc.collect()
        say({"saved": setting})


def restore(request: str) -> None:
    """`request`: JSON of ``root`` (a folder or URL), ``oracles`` (a folder) and ``cases``: [source, N, target]."""
    told = json.loads(request)
    for source, saved_world_size, target in told["cases"]:
        name = slug(source, saved_world_size)
        oracle = torch.load(Path(told["oracles"], name, "oracle.pt"), weights_only=True)
        engine = engine_of(target, seed=5)
        begin = time.perf_counter()
        result = load(f"{told['root']}/{name}", State(engine), options=told.get("options"))
        seconds = time.perf_counter() - begin
        expected = expected_state(oracle["state"], dtype_of(source), dtype_of(target))
        problems = differences(expected, reported(engine, target))
        problems += wrong_numbers(engine, oracle["numbers"])
        problems += wrong_rng(result, 3 if source.startswith("3") else 0, saved_world_size)
        losses = train(engine, 2, rank=0, seed=LATER_DATA_SEED)
        same = (source, saved_world_size) == (target, WORLD_SIZE)
        # Another precision rounds otherwise at every step; otherwise only the order of sums differs.
        allowed = 0.0 if same else 1e-3 if dtype_of(source) == dtype_of(target) else 2e-2
        apart = max(abs(a / b - 1) for a, b in zip(losses, oracle["losses"], strict=True))
        if apart > allowed:
            problems.append(f"losses {losses}, expected {oracle['losses']}")
        say(
            {
                "source": source,
                "n": saved_world_size,
                "target": target,
                "m": WORLD_SIZE,
                "problems": problems,
                "apart": apart,
                "seconds": seconds,
                "tensors": len(oracle["state"]),
                "files": len(result.receipt.files),
                "notes": list(result.receipt.notes),
                "derived": list(result.receipt.derived),
            }
        )
        del engine, result
        gc.collect()


def differences(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> list[str]:
    return sorted(
        name
        for name in expected.keys() | got.keys()
        if name not in expected or name not in got or not _same_bits(expected[name], got[name])
    )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        one.contiguous().view(-1).view(torch.int32), other.contiguous().view(-1).view(torch.int32)
    )


def wrong_numbers(engine: Any, expected: dict[str, Any]) -> list[str]:
    found = numbers(engine)
    return [
        f"{key} is {found[key]}, expected {expected[key]}" for key in found if found[key] != expected[key]
    ]


def wrong_rng(result: Any, stage: int, saved_world_size: int) -> list[str]:
    """Ranks that saved get their own state where the files have it (stage 3; rank 0's below); others differ."""
    kept = saved_world_size if stage == 3 else 1
    states = [bytes(state["torch"].numpy().tobytes()) for state in result.rng_states]
    expected = [
        torch.Generator().manual_seed(1000 + rank).get_state().numpy().tobytes()
        for rank in range(min(kept, WORLD_SIZE))
    ]
    problems = []
    if len(states) != WORLD_SIZE or states[: len(expected)] != expected or len(set(states)) != WORLD_SIZE:
        problems.append(f"random states: {len(states)}, {len(set(states))} of them different")
    if len(result.receipt.derived) != max(0, WORLD_SIZE - kept):
        problems.append(f"derived: {result.receipt.derived}")
    return problems


def composer(data: str) -> None:
    """Restores Composer's archives of two ranks, whose forward pass is known, at this world size."""
    receipts, batches = [], []
    for stage in (1, 3):
        folder = Path(data, f"composer-zero{stage}-w2")
        wanted = torch.tensor(json.loads((folder / "expected.json").read_text())["forward_of_linspace"])
        for target in (stage, 2, 3):
            engine = classifier_engine(target)
            state = State(engine)
            result = load(str(folder / "ep1-ba4-rank{rank}.pt.tar"), state)
            assert torch.allclose(forward_of_linspace(engine), wanted)
            assert engine.global_steps == 4
            assert result.rng_states is not None
            assert len(result.rng_states) == WORLD_SIZE
        receipts.append(result.receipt)
        batches.append(state.timestamp["batch"])
    error = ""
    try:
        load(str(folder / "ep1-ba4-rank{local_rank}.pt.tar"), State(engine))
    except LayoutError as found:
        error = str(found)
    say(
        {
            "saved": [receipt.saved_world_size for receipt in receipts],
            "derived": [list(receipt.derived) for receipt in receipts],
            "batches": batches,
            "error": error,
        }
    )
    torch.distributed.destroy_process_group()


def say(line: dict[str, Any]) -> None:
    if RANK == 0:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    from processes import end_together

    main(*sys.argv[1:])
    end_together()
