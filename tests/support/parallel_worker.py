"""Saves with pipeline stages and tensor parallelism, and restores; every rank runs each function.

`save` keeps, beside each checkpoint, what DeepSpeed reported of every part of the model before it saved, and the
losses of two further steps. `restore` makes engines, loads, compares every tensor of every rank's part bit for bit,
and trains two steps.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from journey_worker import start_deepspeed
from parallel_model import SETTINGS, engine_of, train
from rankload.loader import RankloadError, State, capture_rng, load
from reshard_worker import differences, expected_state, say, slug, tensors_at, wrong_numbers
from reshard_worker import numbers as numbers_of
from zero_model import DATA_SEED, LATER_DATA_SEED, module_state

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
KINDS = ("exp_avg", "exp_avg_sq")


def main(*steps: str) -> None:
    """Does ``function argument function argument ...`` in one process group: starting the ranks costs most."""
    start_deepspeed()
    torch.set_num_threads(1)
    for function, argument in zip(steps[::2], steps[1::2], strict=True):
        globals()[function](json.loads(argument))
    dist.barrier()
    dist.destroy_process_group()


def reported(engine: Any, setting: str) -> dict[str, torch.Tensor]:
    """Whole tensors of this rank's part, as they are in `engine`. Every rank must call."""
    return dict(tensors_at(engine, SETTINGS[setting]["stage"], KINDS))


def dtype_of(setting: str) -> str:
    return str(SETTINGS[setting].get("dtype", "bf16"))


def place(engine: Any) -> tuple[int, int]:
    """This rank's part of the model, and its place among the data-parallel ranks."""
    return engine.checkpoint_mp_rank, dist.get_rank(engine.seq_data_parallel_group)


def save(told: dict[str, Any]) -> None:
    """`told`: ``root`` and ``settings``. Those that are there already are left."""
    for setting in told["settings"]:
        folder = Path(told["root"], slug(setting, WORLD_SIZE))
        if (folder / "oracle-0.pt").exists():
            continue
        engine = engine_of(setting, seed=0)
        train(engine, 3, DATA_SEED)
        torch.manual_seed(1000 + RANK)
        engine.save_checkpoint(str(folder), client_state={"epoch": 3, "rng": capture_rng()})
        state, counts = reported(engine, setting), numbers_of(engine)
        losses = train(engine, 2, LATER_DATA_SEED)
        places: list[Any] = [None] * WORLD_SIZE
        dist.all_gather_object(places, [*place(engine), RANK])
        if place(engine)[1] == 0:
            kept = {"state": state, "numbers": counts, "losses": losses, "places": places}
            torch.save(kept, folder / f"oracle-{place(engine)[0]}.pt")
        dist.barrier()
        del engine
        gc.collect()
        say({"saved": setting})


def restore(told: dict[str, Any]) -> None:
    """`told`: ``root`` (a folder or URL), ``oracles`` (a folder) and ``cases``: [source, N, target]."""
    for source, saved_world_size, target in told["cases"]:
        name = slug(source, saved_world_size)
        engine = engine_of(target, seed=5)
        part, rank = place(engine)
        oracle = torch.load(Path(told["oracles"], name, f"oracle-{part}.pt"), weights_only=True)
        begin = time.perf_counter()
        result = load(f"{told['root']}/{name}", State(engine), options=told.get("options"))
        seconds = time.perf_counter() - begin
        expected = expected_state(oracle["state"], dtype_of(source), dtype_of(target))
        problems = differences(expected, reported(engine, target))
        problems += wrong_numbers(engine, oracle["numbers"])
        problems += wrong_rng(engine, result, SETTINGS[source]["stage"], oracle["places"])
        losses = train(engine, 2, LATER_DATA_SEED)
        same = (source, saved_world_size) == (target, WORLD_SIZE)
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
                "problems": _of_all([f"rank {RANK}: {problem}" for problem in problems]),
                "apart": apart,
                "seconds": seconds,
                "tensors": len(_of_all([f"{part}/{name}" for name in expected] if rank == 0 else [])),
                "files": sorted(Path(file.name).name for file in result.receipt.files),
                "notes": list(result.receipt.notes),
                "derived": list(result.receipt.derived),
                "saved_world_size": result.receipt.saved_world_size,
            }
        )
        del engine, result
        gc.collect()


def wrong_rng(engine: Any, result: Any, stage: int, saved: list[list[int]]) -> list[str]:
    """Each rank gets the state of the one that stood where it stands, if the files have it; others differ."""
    here: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(here, place(engine))
    kept = {(part, rank): saver for part, rank, saver in saved if stage == 3 or rank == 0}
    states = [state["torch"].numpy().tobytes() for state in result.rng_states]
    problems = []
    for rank, stands in enumerate(here):
        if stands in kept:
            expected = torch.Generator().manual_seed(1000 + kept[stands]).get_state().numpy().tobytes()
            if states[rank] != expected:
                problems.append(f"random state of rank {rank}")
    if len(set(states)) != WORLD_SIZE or len(states) != WORLD_SIZE:
        problems.append(f"random states: {len(set(states))} different of {len(states)}")
    if len(result.receipt.derived) != sum(stands not in kept for stands in here):
        problems.append(f"derived: {result.receipt.derived}")
    return problems


def _of_all(own: list[str]) -> list[str]:
    """What all ranks say, in order."""
    each: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(each, own)
    return [one for said in each for one in said]


def refuse(told: dict[str, Any]) -> None:
    """`told`: ``cases``: [path, target, keyword arguments]. What each rank's load raises; nothing may change."""
    for path, target, options in told["cases"]:
        split = target != "module"
        model: Any = engine_of(target, seed=5) if split else torch.nn.Linear(2, 2)
        before = module_state(model) if split else {}
        error = ""
        try:
            load(path, State(model), **options)
        except RankloadError as found:
            error = f"{type(found).__name__}: {found.message}"
        changed = differences(before, module_state(model)) if split else []
        say({"path": path, "target": target, "errors": _of_all([error]), "changed": _of_all(changed)})
        del model
        gc.collect()


def partly(told: dict[str, Any]) -> None:
    """`told`: ``cases``: [path, target, keyword arguments, names that stay], restored without the optimizer."""
    for path, target, options, kept in told["cases"]:
        engine = engine_of(target, seed=5)
        parts = [
            torch.load(one, weights_only=True)["state"] for one in sorted(Path(path).glob("oracle-*.pt"))
        ]
        if SETTINGS[target]["kind"] == "pipeline":
            # A stage may have other layers than the one that saved.
            oracle = {name: value for part in parts for name, value in part.items()}
        else:
            oracle = parts[place(engine)[0]]
        before = module_state(engine)
        result = load(path, State(engine), **options)
        found = module_state(engine)
        stay = [name for name in found if name.startswith(tuple(kept))]
        expected = {name: before[name] if name in stay else oracle[name] for name in found}
        say(
            {
                "path": path,
                "target": target,
                "problems": _of_all([f"rank {RANK}: {one}" for one in differences(expected, found)]),
                "stay": len(_of_all(stay)),
                "compared": len(_of_all(list(found))),
                "steps": engine.global_steps,
                "files": sorted(Path(file.name).name for file in result.receipt.files),
            }
        )
        del engine
        gc.collect()


if __name__ == "__main__":
    from processes import end_together

    main(*sys.argv[1:])
    end_together()
