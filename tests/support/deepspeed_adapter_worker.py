"""Ranks that save an engine by DeepSpeed itself, and load it by rankload's adapter for it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from framework_lines import run_lines
from journey_worker import start_deepspeed
from rankload.integrations import deepspeed as adapter

from rankload import NotFoundError, OptionError, gather_rng

RANK = int(os.environ.get("RANK", "0"))


def save(folder: str, stage: str) -> None:
    """Trains two steps, saves, keeps the whole state aside, and trains on."""
    start_deepspeed()
    from zero_model import full_state, make_engine, train

    engine = make_engine(int(stage), seed=3)
    train(engine, 2, RANK)
    engine.save_checkpoint(folder, client_state={"epoch": 5, "note": [1, 2], "rng": gather_rng()})
    kept = {"state": full_state(engine), "scheduler": engine.lr_scheduler.state_dict(), "lr": engine.get_lr()}
    kept["losses"] = train(engine, 2, RANK, seed=99)
    torch.save(kept, f"{folder}/kept-{RANK}.pt")
    leave()


def resume(folder: str, stage: str, path: str, how: str) -> None:
    start_deepspeed()
    from deepspeed import DeepSpeedEngine
    from zero_model import full_state, make_engine, train

    same = int(os.environ["WORLD_SIZE"]) == 2
    kept = torch.load(f"{folder}/kept-{RANK if same else 0}.pt")
    engine = make_engine(int(stage), seed=8)
    own = DeepSpeedEngine.load_checkpoint
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "attached":
            found, client = adapter.attach(engine).load_checkpoint(path)
        elif how == "replaced":
            with adapter.replaced():
                found, client = engine.load_checkpoint(path, tag="global_step2")
        else:
            names = run_lines("deepspeed", {"engine": engine, "load_dir": path})
            found, client = names["path"], names["client_state"]
    assert DeepSpeedEngine.load_checkpoint is own
    assert found.endswith("global_step2"), found
    assert {key: client[key] for key in ("epoch", "note")} == {"epoch": 5, "note": [1, 2]}
    assert len(client["rng"]) == int(os.environ["WORLD_SIZE"])
    assert (engine.global_steps, engine.lr_scheduler.state_dict()) == (2, kept["scheduler"])
    assert engine.get_lr() == kept["lr"]
    assert engine.rankload_result.step == 2
    told = [str(one.message) for one in caught if "a step was" in str(one.message)]
    assert bool(told) != same, told
    if told:
        assert "a step was 4 samples when the checkpoint was saved" in told[0]
    compare(full_state(engine), kept["state"])
    losses = train(engine, 2, RANK, seed=99)
    if same:
        assert losses == kept["losses"]
    leave()


def parts(folder: str, stage: str) -> None:
    """What is left out stays as it was."""
    start_deepspeed()
    from zero_model import full_state, make_engine, module_state, train

    kept = torch.load(f"{folder}/kept-{RANK}.pt")
    engine = make_engine(int(stage), seed=8)
    train(engine, 1, RANK)
    before = full_state(engine)
    scheduler = engine.lr_scheduler.state_dict()
    _, client = adapter.load_checkpoint(engine, folder, load_module_only=True)
    assert client["epoch"] == 5
    assert (engine.global_steps, engine.lr_scheduler.state_dict()) == (1, scheduler)
    after = full_state(engine)
    compare({key: value for key, value in after.items() if key.startswith("exp_avg")}, before)
    compare(module_state(engine), kept["state"])
    adapter.load_checkpoint(engine, folder, load_lr_scheduler_states=False)
    assert (engine.global_steps, engine.lr_scheduler.state_dict()) == (2, scheduler)
    compare(full_state(engine), kept["state"])
    adapter.load_checkpoint(engine, folder, load_optimizer_states=False)
    assert engine.lr_scheduler.state_dict() == kept["scheduler"]
    refused(OptionError, "custom_load_fn", engine, folder, custom_load_fn=print)
    Path(folder, "empty").mkdir(exist_ok=True)
    refused(NotFoundError, "latest", engine, f"{folder}/empty")
    leave()


def refused(kind: type[Exception], match: str, engine: object, path: str, **arguments: object) -> None:
    try:
        adapter.load_checkpoint(engine, path, **arguments)  # type: ignore[arg-type]
    except kind as error:
        assert match in str(error), error
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def leave() -> None:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
