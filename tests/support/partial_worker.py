"""What the ranks of test_partial_restores.py do: loads that fail, and what each of them left changed."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from rankload.distributed.changes import Changes
from rankload.loader import PartialRestoreError, RankloadError, State, load
from rankload.loader.fetch import parts, plan
from rankload.loader.materialize import storages
from rankload.loader.ranges import engine as range_engine
from rankload.loader.targets.deepspeed.live import live_engine
from wide_model import a_module

RANK = int(os.environ["RANK"])


def job_of(kind: str, seed: int) -> State:
    """A job with the wide model; its optimizer has no state yet."""
    model: Any = a_module(seed)
    if kind.startswith("zero"):
        return State(engine_of(int(kind[-1]), model))
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    elif kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    return State(model, torch.optim.Adam(model.parameters()))


def engine_of(stage: int, model: torch.nn.Module) -> Any:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 100_000,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    optimizer = torch.optim.Adam(model.parameters())
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def save_engines(folder: str) -> None:
    for stage in (1, 3):
        engine = engine_of(stage, a_module(9))
        engine.backward(engine(torch.ones(1, 1024)).sum())
        engine.step()
        engine.save_checkpoint(f"{folder}/zero{stage}", tag="tag")
    print(json.dumps("saved"), flush=True)


def tensors_of(state: State) -> dict[str, list[Any]]:
    """By part, as a `PartialRestoreError` names it, copies of all that a load could change."""
    if hasattr(state.model, "basic_optimizer"):
        live = live_engine(state.model)
        held = [live.optimizer.state.get(flat.master, {}) for flat in live.flats]
        low = [one.flat for each in live.low.values() for one in each]
        return {
            "model": [flat.clone() for flat in low],
            "fp32 masters": [flat.master.detach().clone() for flat in live.flats],
            "optimizer": [torch.as_tensor(value).clone() for each in held for value in each.values()],
            "engine's counters": [live.engine.global_steps],
        }
    local = [getattr(one, "_local_tensor", one).detach().clone() for one in state.model.parameters()]
    return {"model": local, "optimizer Adam": [json.dumps(list(state.optimizers[0].state_dict()["state"]))]}


@torch.no_grad()
def unlike_the_file(state: State) -> None:
    """Makes weights other ones than those that a case before may have restored in part."""
    if hasattr(state.model, "basic_optimizer"):
        live = live_engine(state.model)
        weights = [one.flat for each in live.low.values() for one in each]
        weights += [flat.master for flat in live.flats]
        for flat in live.flats:
            live.optimizer.state.pop(flat.master, None)
        state.model.global_steps = 0
    else:
        weights = [getattr(one, "_local_tensor", one) for one in state.model.parameters()]
    for tensor in weights:
        tensor.fill_(3)


def changed(before: dict[str, list[Any]], now: dict[str, list[Any]]) -> list[str]:
    def same(one: Any, other: Any) -> bool:
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    return sorted(
        part
        for part in before
        if len(before[part]) != len(now[part]) or not all(map(same, before[part], now[part]))
    )


def fail(cases: str, gates: str) -> None:
    """Loads each of `cases`, a kind of job, a URL, options and whether files count as small; tells how that ended."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    # Files of a few MiB come in many requests, as large ones do.
    range_engine.read_ranges.__kwdefaults__["chunk_bytes"] = 1 << 18
    note, small_bytes = Changes.note, storages.READY_BYTES
    told: dict[str, Any] = {}
    jobs: dict[str, State] = {}
    for name, (kind, url, options, weights_only, small) in json.loads(Path(cases).read_text()).items():
        jobs[kind] = jobs.get(kind) or job_of(kind, seed=1)
        storages.READY_BYTES = parts.READY_BYTES = plan.READY_BYTES = small_bytes if small else 0

        def noted(changes: Changes, part: str, name: str = name) -> None:
            note(changes, part)
            Path(gates, name).touch()

        Changes.note = noted  # type: ignore[method-assign]
        unlike_the_file(jobs[kind])
        before, random = tensors_of(jobs[kind]), torch.get_rng_state()
        one: dict[str, Any] = {"error": None}
        try:
            load(url, jobs[kind], load_weights_only=weights_only, options=options)
        except RankloadError as error:
            one = {"error": type(error).__name__, "message": str(error), "cause": error.details.get("cause")}
            if isinstance(error, PartialRestoreError):
                one["by_rank"] = {str(rank): list(parts) for rank, parts in error.changed_by_rank.items()}
        one["changed"] = changed(before, tensors_of(jobs[kind]))
        assert torch.equal(random, torch.get_rng_state())
        told[name] = one
    print(json.dumps(told), flush=True)
    sys.stdout.flush()
    os._exit(0)
