"""A job of transformers' Trainer that saves at step 4 and goes on to step 8; every rank runs each function."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch
from framework_model import (
    GLOBAL_BATCH,
    SAVED_AT,
    Tokens,
    group_names,
    held,
    held_by_engine,
    hold,
    tiny_gpt2,
    world_size,
)
from transformers import Trainer, TrainerCallback, TrainingArguments

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def arguments(folder: str, kind: str, batch: int = GLOBAL_BATCH) -> TrainingArguments:
    """`kind`: ``zero2``, ``zero3``, or any other without DeepSpeed; `batch`: samples of a step over all ranks."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": int(kind[-1]) if kind.startswith("zero") else 0},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True
            },
        },
    }  # fmt: skip
    return TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=batch // world_size(),
        max_steps=2 * SAVED_AT,
        save_steps=SAVED_AT,
        save_total_limit=2,
        logging_steps=1,
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup_steps=2,
        lr_scheduler_type="linear",
        report_to=[],
        disable_tqdm=True,
        seed=3,
        deepspeed=config if kind.startswith("zero") else None,
    )


class Held(TrainerCallback):  # type: ignore[misc]
    """Writes down what the job holds when it saves."""

    def __init__(self, folder: str, kind: str) -> None:
        self.folder = folder
        self.kind = kind
        self.trainer: Trainer | None = None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step != SAVED_AT or self.trainer is None:
            return
        trainer = self.trainer
        if self.kind.startswith("zero"):
            found, groups = held_by_engine(trainer.model_wrapped), None
        else:
            optimizer = trainer.optimizer.optimizer
            found, groups = held(trainer.model, [optimizer]), group_names(trainer.model, optimizer)
        rates = trainer.lr_scheduler.get_last_lr()
        hold(self.folder, found, rates=rates, step=state.global_step, groups=groups)


def save(folder: str, kind: str) -> None:
    """Leaves ``checkpoint-4`` and ``checkpoint-8`` in `folder`."""
    os.makedirs(folder, exist_ok=True)
    callback = Held(folder, kind)
    trainer = Trainer(
        model=tiny_gpt2(), args=arguments(folder, kind), train_dataset=Tokens(), callbacks=[callback]
    )
    callback.trainer = trainer
    trainer.train()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
