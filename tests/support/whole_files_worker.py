"""Restores files that no engine saved into DeepSpeed engines of every stage; every rank runs each function."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from modules_worker import plain_job, train
from rankload.loader import MismatchError, State, load
from reshard_worker import SETTINGS, engine_of, kind_of, reported, start_deepspeed
from zero_model import make_engine
from zero_model import train as train_engine

FORMS = ("numbers", "names", "parameter names", "with frozen", "Composer's")
"""How the file keeps the optimizer's state."""


def write(folder: Path) -> None:
    """Saves one job that trained two steps in each of `FORMS`, and what it held."""
    job = plain_job(seed=3)
    train(job, 2)
    (optimizer,) = job.optimizers
    named = dict(job.model.named_parameters())
    name_of = {parameter: name for name, parameter in named.items()}
    state = optimizer.state_dict()
    names = [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    model = job.model.state_dict()

    def renamed(key_of: dict[int, Any], **more: Any) -> dict[str, Any]:
        groups = [
            {**group, "params": [key_of[number] for number in group["params"]], **more}
            for group in state["param_groups"]
        ]
        return {
            "state": {key_of[number]: entry for number, entry in state["state"].items()},
            "param_groups": groups,
        }

    with_names = renamed(dict(enumerate(range(len(names)))))
    for group in with_names["param_groups"]:
        group["param_names"] = [f"module.{names[number]}" for number in group["params"]]
    # As where a job gives the optimizer all its parameters: what is not trained never has a state.
    shifted = renamed({number: number + 1 for number in range(len(names))})
    shifted["param_groups"][0]["params"].insert(0, 0)
    files: dict[str, Any] = {
        "numbers": {"model": model, "optimizer": state},
        "names": {"model": model, "optimizer": renamed(dict(enumerate(names)))},
        "parameter names": {"model": model, "optimizer": with_names},
        "with frozen": {"model": model, "optimizer": shifted},
        "Composer's": {
            "state": {"model": model, "optimizers": {"Adam": renamed(dict(enumerate(names)))}},
            "rng": [],
        },
    }
    assert tuple(files) == FORMS
    for form, file in files.items():
        torch.save(file, folder / f"{form}.pt")
    wrong = renamed(dict(enumerate(range(len(names)))))
    wrong["param_groups"][1]["params"].append(len(names))
    wrong["state"][len(names)] = {"step": torch.tensor(2.0)}
    torch.save({"model": model, "optimizer": wrong}, folder / "another.pt")
    rates = [group["lr"] for group in optimizer.param_groups]
    held = {f"fp32/{name}": value.detach().clone() for name, value in named.items() if value.requires_grad}
    for parameter, entry in optimizer.state.items():
        held |= {f"{key}/{name_of[parameter]}": entry[key] for key in ("exp_avg", "exp_avg_sq")}
    torch.save({"held": held, "rates": rates}, folder / "held")


def restore(folder: str) -> None:
    """Each form at one setting, and one form at each setting with AdamW."""
    start_deepspeed()
    saved = torch.load(Path(folder, "held"), weights_only=True)
    cases = [(form, "1 bf16") for form in FORMS]
    cases += [("numbers", setting) for setting in SETTINGS if kind_of(setting) == "AdamW"]
    for form, setting in cases:
        engine = engine_of(setting, seed=5)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            # The engine's scheduler is DeepSpeed's own, which no such file has.
            result = load(
                Path(folder, f"{form}.pt"), State(engine), strict_model_weights=False, progress_bar=False
            )
        missing = result.receipt.missing
        assert missing == ("schedulers/WarmupLR: the checkpoint has none",), (form, setting, missing)
        assert any("schedulers/WarmupLR" in str(one.message) for one in told), (form, setting)
        assert not result.receipt.not_restored, (form, setting, result.receipt.not_restored)
        found = reported(engine, setting)
        for name, value in saved["held"].items():
            assert torch.equal(found[name], value), (form, setting, name)
        base = getattr(engine.optimizer, "optimizer", engine.optimizer)
        steps = {float(entry["step"]) for entry in base.state.values()}
        assert steps == {2.0}, (form, setting, steps)
        assert [group["lr"] for group in base.param_groups] == saved["rates"], (form, setting)
        train_engine(engine, 1, torch.distributed.get_rank())
    engine = make_engine(1, seed=5)
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    try:
        load(Path(folder, "another.pt"), State(engine), progress_bar=False)
    except MismatchError as error:
        assert "expected parameter groups of [" in error.message, error
        assert "matched by position" in error.message, error
    else:
        raise AssertionError("an optimizer of other groups was restored")
    assert all(map(torch.equal, before, engine.module.parameters()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
