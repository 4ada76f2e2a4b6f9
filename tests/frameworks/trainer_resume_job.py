"""A job of transformers' Trainer that saves at step 4, and one that goes on from there to step 8, as docs/frameworks.md
has it; every rank runs each function."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import warnings
from typing import Any

import deepspeed
import torch
from framework_lines import run_lines
from framework_model import (
    SAVED_AT,
    SHARED_BATCH,
    Tokens,
    by_step,
    differences,
    gathered,
    held,
    held_by_engine,
    hold,
    random_digest,
    rank,
    tell,
    tiny_gpt2,
)
from trainer_job import arguments
from transformers import Trainer, TrainerCallback

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
STALL_S = 5


class Watched(Trainer):  # type: ignore[misc]
    """Keeps the samples that this rank has trained on, and draws from its generators."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[int]] = []
        self.watch: Any = None

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.watch.at_first_step()
        torch.rand(rank() + 3)
        random.random()
        self.seen.append(inputs["input_ids"][:, 0].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


class Watch(TrainerCallback):  # type: ignore[misc]
    """What the job holds when it saves, and when it has been restored."""

    def __init__(self, kind: str, *, resumes: bool) -> None:
        self.kind = kind
        self.resumes = resumes
        self.trainer: Any = None
        self.first: dict[str, Any] | None = None
        self.at_save: dict[str, Any] = {}

    def found(self) -> dict[str, torch.Tensor]:
        trainer = self.trainer
        if self.kind.startswith("zero"):
            return held_by_engine(trainer.model_wrapped)
        return held(trainer.model, [trainer.optimizer.optimizer])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == SAVED_AT and not self.at_save:
            self.at_save = {
                "found": self.found(),
                "rates": self.trainer.lr_scheduler.get_last_lr(),
                "states": gathered(random_digest()),
            }

    def at_first_step(self) -> None:
        """Called where Trainer and its callbacks have restored all."""
        trainer = self.trainer
        if self.first is None and self.resumes:
            self.first = {
                "step": trainer.state.global_step,
                "found": self.found(),
                "rates": trainer.lr_scheduler.get_last_lr(),
                "states": gathered(random_digest()),
            }


def trainer_of(folder: str, kind: str, batch: int, *, resumes: bool) -> tuple[Watched, Watch]:
    watch = Watch(kind, resumes=resumes)
    trainer = Watched(
        model=tiny_gpt2(seed=7 if resumes else 0),
        args=arguments(folder, kind, batch),
        train_dataset=Tokens(),
        callbacks=[watch],
    )
    watch.trainer, trainer.watch = trainer, watch
    return trainer, watch


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def save(folder: str, kind: str) -> None:
    """Leaves ``checkpoint-4`` in `folder`, and what a killed save leaves under a higher number."""
    os.makedirs(folder, exist_ok=True)
    trainer, watch = trainer_of(folder, kind, SHARED_BATCH, resumes=False)
    trainer.train()
    losses = losses_of(trainer)
    seen = by_step(trainer.seen)
    at = watch.at_save
    hold(folder, at["found"], rates=at["rates"], states=at["states"], losses=losses, seen=seen)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if rank() == 0:
        shutil.rmtree(f"{folder}/checkpoint-8")
        os.mkdir(f"{folder}/checkpoint-9")


def resume(folder: str, kind: str, checkpoint: str, batch: str, out: str) -> None:
    """Goes on by the lines of docs/frameworks.md; rank 0 prints what it finds, as JSON."""
    trainer, watch = trainer_of(out, kind, int(batch), resumes=True)
    own = (Trainer.train, deepspeed.DeepSpeedEngine.load_checkpoint)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run_lines("transformers", {"trainer": trainer, "run": checkpoint})
    assert (Trainer.train, deepspeed.DeepSpeedEngine.load_checkpoint) == own
    assert watch.first is not None
    seen = by_step(trainer.seen)
    first = watch.first
    left = ("step/",) if kind.startswith("zero") else ()
    tell(
        differences=differences(folder, first["found"], without=left),
        step=first["step"],
        final=trainer.state.global_step,
        rates=first["rates"],
        states=first["states"],
        seen=seen,
        losses=losses_of(trainer),
        callbacks=[type(one).__name__ for one in trainer.callback_handler.callbacks],
        warnings=[str(one.message) for one in told if "a step was" in str(one.message)],
    )


def fails_on_one_rank(folder: str, kind: str) -> None:
    """Trainer's own load fails on rank 1 alone; prints what each rank raises, and after how long."""
    from rankload.integrations.transformers import replaced

    from rankload import RankloadError

    own = Trainer._load_optimizer_and_scheduler

    def load(self: Any, checkpoint: Any) -> Any:
        if rank() == 1:
            raise OSError("the disk of rank 1")
        return own(self, checkpoint)

    Trainer._load_optimizer_and_scheduler = load
    trainer, _ = trainer_of(f"{folder}/out", kind, SHARED_BATCH, resumes=True)
    begin = time.monotonic()
    try:
        with replaced(options={"stall_timeout_s": 60}):
            trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
    except (OSError, RankloadError) as error:
        assert "the disk of rank 1" in str(error), error
        assert isinstance(error, RankloadError) == (rank() == 0), error
        assert time.monotonic() - begin < 30
        assert "_load_optimizer_and_scheduler" not in vars(trainer)
        print("ended", flush=True)
        os._exit(0)  # the job's own group waits for nobody
    raise AssertionError("it went on")


def stops_on_one_rank(folder: str, kind: str, out: str) -> None:
    """Rank 1 is stopped in Trainer's own load, where the others run a collective, as FSDP's loads do."""
    from rankload.integrations.transformers import replaced

    own = Trainer._load_optimizer_and_scheduler

    def load(self: Any, checkpoint: Any) -> Any:
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        with open(out, "w") as file:
            file.write(str(time.monotonic()))
        torch.distributed.all_reduce(torch.zeros(1))
        return own(self, checkpoint)

    Trainer._load_optimizer_and_scheduler = load
    trainer, _ = trainer_of(f"{folder}/out", kind, SHARED_BATCH, resumes=True)
    with replaced(options={"stall_timeout_s": STALL_S}):
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-4")


def mistakes(folder: str) -> None:
    """What the block does where nothing can be resumed, and what it leaves behind after an error."""
    from rankload.integrations.accelerate import attach
    from rankload.integrations.transformers import newest, replaced

    from rankload import NotFoundError, OptionError

    trainer, _ = trainer_of(folder, "ddp", SHARED_BATCH, resumes=True)
    own = (Trainer.train, deepspeed.DeepSpeedEngine.load_checkpoint)
    before = list(trainer.callback_handler.callbacks)
    os.makedirs(f"{folder}/checkpoint-9")
    assert newest(folder) is None
    for checkpoint, kind in ((True, NotFoundError), (f"{folder}/checkpoint-9", FileNotFoundError)):
        try:
            with replaced():
                assert Trainer.train is not own[0]
                trainer.train(resume_from_checkpoint=checkpoint)
        except (kind, ValueError) as error:
            assert "checkpoint" in str(error), error
        else:
            raise AssertionError(f"{checkpoint} was resumed from")
        assert (Trainer.train, deepspeed.DeepSpeedEngine.load_checkpoint) == own
        assert trainer.callback_handler.callbacks == before
    with replaced(), replaced():
        assert Trainer.train is not own[0]
    assert (Trainer.train, deepspeed.DeepSpeedEngine.load_checkpoint) == own
    try:
        attach(trainer.model)
    except OptionError as error:
        assert "expected the Accelerator" in str(error), error
    else:
        raise AssertionError("a model was attached")
