"""What the ranks of killed_saves.py do: jobs that save three times and are killed meanwhile, and one that resumes.

Each job writes down what it holds before it saves, and waits for its parent before the second save. After the third it
waits to be killed.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy
import torch
import torch.distributed as dist
from torch import nn

RANK = int(os.environ.get("RANK", "0"))
SIZES = {"vocabulary": 3000, "width": 224, "blocks": 4}
"""Of the model of all writers but Trainer: files of a few megabytes."""
STEPS = (1, 2, 3)
WAITS_BEFORE = 2
_PATIENCE_S = 300.0
"""A job whose parent is gone ends by itself."""

Tensors = dict[str, torch.Tensor]


class Parent:
    """The killing parent, which shares the folder `aside` with the job."""

    def __init__(self, aside: str) -> None:
        self._aside = Path(aside)

    def before_save(self, step: int, tensors: Tensors) -> None:
        """Writes down what the job holds at `step`; waits before the save that may be killed."""
        if RANK == 0:
            torch.save(tensors, self._aside / f"held-{step}.pt")
        if step == WAITS_BEFORE:
            (self._aside / f"ready-{RANK}").touch()
            self._wait_for("go")

    def after_save(self, step: int) -> None:
        """Tells that this rank's part of a save is over; waits to be killed after the last."""
        (self._aside / f"saved-{step}-{RANK}").touch()
        if step == STEPS[-1]:
            self._wait_for("never")

    def _wait_for(self, name: str) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not (self._aside / name).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(name)
            time.sleep(0.001)


# --- jobs that save --------------------------------------------------------------------------------------------------


def save_by_deepspeed(folder: str, parent: Parent, stage: int) -> None:
    from journey_worker import start_deepspeed
    from zero_model import full_state, make_engine, train

    start_deepspeed()
    engine = make_engine(stage, "fp32", seed=3, sizes=SIZES)
    for step in STEPS:
        train(engine, 1, RANK, seed=step)
        found = full_state(engine)
        parent.before_save(step, {_as_plain(name): one for name, one in found.items() if name[:4] != "fp32"})
        engine.save_checkpoint(folder)
        parent.after_save(step)


def _as_plain(name: str) -> str:
    kind, _, rest = name.partition("/")
    return f"model/{rest}" if kind in ("module", "buffer") else name


def save_by_dcp(folder: str, parent: Parent) -> None:
    import torch.distributed.checkpoint as dcp
    from mesh_jobs import whole
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = _model(3)
    for block in model.blocks:
        fully_shard(block)
    state = _with_optimizer(fully_shard(model))
    for step in STEPS:
        _train(state, step)
        parent.before_save(step, whole(state))
        model, optimizer = get_state_dict(state.model, state.optimizers[0])
        dcp.save(
            {"model": model, "optimizer": optimizer, "step": step}, checkpoint_id=f"{folder}/step-{step}"
        )
        parent.after_save(step)


def save_by_save_checkpoint(folder: str, parent: Parent) -> None:
    from mesh_jobs import whole

    from rankload import save_checkpoint

    dist.init_process_group("gloo")
    state = _with_optimizer(_model(3))
    for step in STEPS:
        _train(state, step)
        parent.before_save(step, whole(state))
        save_checkpoint(f"{folder}/step{step}.pt", state, extra={"step": step})
        parent.after_save(step)


def save_by_trainer(folder: str, parent: Parent) -> None:
    import deepspeed
    from framework_model import Tokens, held_by_engine, world_size
    from transformers import Trainer, TrainerCallback, TrainingArguments

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=4 // world_size(),
        max_steps=STEPS[-1],
        save_steps=1,
        logging_steps=1,
        learning_rate=1e-3,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        report_to=[],
        disable_tqdm=True,
        seed=3,
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": 2},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True},
            },
        },
    )

    class Saves(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            parent.before_save(state.global_step, held_by_engine(trainer.model_wrapped))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            parent.after_save(state.global_step)

    trainer = Trainer(
        model=_gpt2(seed=3), args=arguments, train_dataset=Tokens(), callbacks=[saves := Saves()]
    )
    assert saves in trainer.callback_handler.callbacks
    trainer.train()


JOBS: dict[str, Callable[[str, Parent], None]] = {
    "deepspeed-1": lambda folder, parent: save_by_deepspeed(folder, parent, 1),
    "deepspeed-3": lambda folder, parent: save_by_deepspeed(folder, parent, 3),
    "dcp": save_by_dcp,
    "trainer": save_by_trainer,
    "save_checkpoint": save_by_save_checkpoint,
}


def save(writer: str, folder: str, aside: str) -> None:
    """Saves three times in `folder`, and waits to be killed; every rank runs it."""
    torch.set_num_threads(1)
    random.seed(RANK)  # its state has another size each time
    numpy.random.seed(RANK)
    JOBS[writer](folder, Parent(aside))


# --- the job that resumes --------------------------------------------------------------------------------------------


def resume(writer: str, folder: str, aside: str) -> None:
    """Looks at `folder`, resumes from it, and compares with what the killed job held; prints all as JSON.

    One process without DeepSpeed, with an optimizer: all weights and moments are restored.
    """
    from rankload.loader.finding import find

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found = {name: find(folder, newest=name == "newest", every=True) for name in ("pointed", "newest")}
    taken = {name: next((one.path for one in each if one.proven), None) for name, each in found.items()}
    resumed = {"pointed": _resumed(writer, folder, aside)}
    if taken["newest"] != taken["pointed"]:
        resumed["newest"] = _resumed(writer, folder, aside, newest=True)
    print(
        json.dumps(
            {
                "found": [[Path(one.path).name, one.step, one.proven, one.reason] for one in found["newest"]],
                "resumed": resumed,
            }
        ),
        flush=True,
    )


def _resumed(writer: str, folder: str, aside: str, *, newest: bool = False) -> Mapping[str, Any]:
    from mesh_jobs import whole

    from rankload import autoresume

    state = _gpt2_job() if writer == "trainer" else _with_optimizer(_model(9))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = autoresume(folder, state, newest=newest, progress_bar=False)
    if result is None:
        return {"step": None, "passed": [], "differs": [], "warned": []}
    held = torch.load(Path(aside, f"held-{result.step}.pt"), weights_only=True)
    restored = whole(state)
    return {
        "step": result.step,
        "passed": [[Path(one.path).name, one.reason] for one in result.passed_over],
        "differs": [
            name
            for name, value in held.items()
            if name not in restored or not torch.equal(restored[name].float(), value.float())
        ],
        "compared": len(held),
        "warned": [str(one.message) for one in told if issubclass(one.category, UserWarning)],
    }


# --- models ----------------------------------------------------------------------------------------------------------


def _model(seed: int) -> Any:
    from zero_model import TinyModel

    return TinyModel(seed, **SIZES)


def _with_optimizer(model: nn.Module) -> Any:
    from modules_worker import optimizer_for

    from rankload import State

    optimizer = optimizer_for(model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    return State(model, optimizer)


def _train(state: Any, step: int) -> None:
    """One step, on the same data on each rank."""
    data = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, SIZES["vocabulary"], (2, 9), generator=data)
    state.model(tokens[:, :-1], tokens[:, 1:]).backward()
    state.optimizers[0].step()
    state.optimizers[0].zero_grad()


def _gpt2(seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=2000, n_positions=16, n_embd=160, n_layer=4, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def _gpt2_job() -> Any:
    from rankload import State

    model = _gpt2(seed=9)
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "weight_decay": 0.1}], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    return State(model, optimizer, scheduler)
