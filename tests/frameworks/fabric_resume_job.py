"""Jobs of Fabric with DeepSpeed that save at step 4, and others that resume there; every rank runs each function."""

from __future__ import annotations

import os
import warnings
from typing import Any

import lightning
import torch
from framework_lines import run_lines
from framework_model import (
    GLOBAL_BATCH,
    SAVED_AT,
    batches,
    differences,
    held_by_engine,
    hold,
    numbers,
    of_all_ranks,
    tell,
    tiny_gpt2,
)  # fmt: skip
from lightning.fabric.strategies import DeepSpeedStrategy as FabricsStrategy
from lightning_resume_job import RANKS, on_cpu


def train(fabric: Any, model: Any, optimizer: Any, first: int) -> list[float]:
    losses = []
    for batch in batches(first, SAVED_AT):
        loss = model(**batch).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(of_all_ranks(float(loss.detach())))
    return losses


def config(kind: str) -> dict[str, Any]:
    """DeepSpeed's; of a kind such as ``fabric-untold2`` without the batch."""
    found: dict[str, Any] = {
        "zero_optimization": {"stage": int(kind[-1])},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // RANKS,
    }
    if "untold" in kind:
        del found["train_micro_batch_size_per_gpu"]
    return found


def save(folder: str, kind: str) -> None:
    """Leaves ``step-4`` in `folder`; `kind` is ``fabric-zero2`` or ``fabric-zero3``."""
    os.makedirs(folder, exist_ok=True)
    on_cpu()
    strategy = FabricsStrategy(config=config(kind), process_group_backend="gloo")
    fabric = lightning.Fabric(accelerator="cpu", devices=RANKS, strategy=strategy)
    fabric.launch()
    module = tiny_gpt2()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-3))
    train(fabric, model, optimizer, 0)
    state = {"model": model, "optimizer": optimizer, "step": SAVED_AT, "note": {"a": [1]}, "left": (1, 2)}
    fabric.save(f"{folder}/step-4", state)
    found = held_by_engine(model._forward_module)
    hold(folder, found, losses=train(fabric, model, optimizer, SAVED_AT))


def resume(folder: str, kind: str, path: str) -> None:
    """Rank 0 prints what a resumed job holds otherwise than the one that saved, and how it goes on."""
    on_cpu()
    names: dict[str, Any] = {
        "config": config(kind),
        "arguments": {"accelerator": "cpu", "devices": RANKS},
        "module": tiny_gpt2(seed=7),
        "path": path,
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run_lines("fabric", names)
    found = held_by_engine(names["model"]._forward_module)
    tell(
        differences=differences(folder, found),
        losses=train(names["fabric"], names["model"], names["optimizer"], SAVED_AT),
        expected=numbers(folder)["losses"],
        whole=GLOBAL_BATCH % RANKS == 0,
        batch_known=True,
        warnings=[str(one.message) for one in told if "a step was" in str(one.message)],
        step=names["state"]["step"],
        rest={key: names["rest"][key] for key in sorted(names["rest"]) if key in ("note", "left", "step")},
    )
