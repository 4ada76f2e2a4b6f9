"""Jobs of Lightning that save at step 4, and others that resume there by rankload; every rank runs each function.

`resume` runs the lines that docs/frameworks.md gives, as they stand.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import lightning
import lightning.fabric.strategies.deepspeed as fabric_deepspeed
import lightning.pytorch.strategies.deepspeed as trainer_deepspeed
import torch
from framework_lines import run_lines
from framework_model import (
    GLOBAL_BATCH,
    SAVED_AT,
    Tokens,
    batches,
    differences,
    held,
    held_by_engine,
    hold,
    numbers,
    of_all_ranks,
    rank,
    tell,
    tiny_gpt2,
    world_size,
)  # fmt: skip
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningsStrategy

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
CPU = torch.device("cpu", 0)
RANKS = world_size()
"""Lightning takes it out of the environment at its end."""


def on_cpu() -> None:
    """Lets Lightning run DeepSpeed without a GPU, which it refuses by name; DeepSpeed itself does."""
    for module in (trainer_deepspeed, fabric_deepspeed):
        module.CUDAAccelerator = lightning.pytorch.accelerators.CPUAccelerator
        module._validate_device_index_selection = lambda _: None
        module.DeepSpeedStrategy.root_device = property(lambda _: CPU)
    fabric_deepspeed.CUDAAccelerator = lightning.fabric.accelerators.CPUAccelerator


class Counting(lightning.Callback):  # type: ignore[misc]
    """A callback of the user's with a state."""

    batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "note": ("a", [1, 2])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["note"] == ("a", [1, 2]), state
        self.batches = state["batches"]


class Watch(lightning.Callback):  # type: ignore[misc]
    """Keeps what the job held after `SAVED_AT` steps, and what it holds as it starts."""

    def __init__(self, folder: str, *, saves: bool) -> None:
        self.folder = folder
        self.saves = saves
        self.held: dict[str, Any] = {}
        self.start: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        counting = next(one for one in trainer.callbacks if isinstance(one, Counting))
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        self.start = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "last_epoch": scheduler.last_epoch,
            "rates": scheduler.get_last_lr(),
            "counted": counting.batches,
        }
        if not self.saves:
            self.held = what_is_held(trainer, module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if self.saves and trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(f"{self.folder}/step-4.ckpt")
            self.held = what_is_held(trainer, module)


def what_is_held(trainer: Any, module: Any) -> dict[str, torch.Tensor]:
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    return held(module, trainer.optimizers) if engine is None else held_by_engine(engine)


class Job(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = tiny_gpt2(seed)
        self.losses: list[float] = []
        self.numbers: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.losses.append(of_all_ranks(float(loss.detach())))
        self.numbers.append(index)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self.losses.append(of_all_ranks(float(self.model(**batch).loss)))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Ordered(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The samples in the order in which a job of this many ranks takes all of them, from number `first` on.

    With a plain DataLoader Lightning begins again with the first sample, so the tests hand it those that come next.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.tokens = Tokens()

    def __len__(self) -> int:
        return GLOBAL_BATCH * 2 * SAVED_AT

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.tokens[(self.first + index) % len(self.tokens)]


class Dealt(torch.utils.data.Sampler):  # type: ignore[type-arg]
    """This rank's samples of each batch, as `batches` deals them."""

    def __iter__(self) -> Any:
        each = GLOBAL_BATCH // world_size()
        for start in range(0, GLOBAL_BATCH * 2 * SAVED_AT, GLOBAL_BATCH):
            yield from range(start + rank() * each, start + (rank() + 1) * each)

    def __len__(self) -> int:
        return GLOBAL_BATCH // world_size() * 2 * SAVED_AT


def samples(first: int) -> Any:
    return torch.utils.data.DataLoader(
        Ordered(first), batch_size=GLOBAL_BATCH // world_size(), sampler=Dealt()
    )


def arguments(*callbacks: Any, max_steps: int = 2 * SAVED_AT) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "devices": world_size(),
        "max_steps": max_steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "callbacks": list(callbacks),
    }


def save(folder: str, kind: str) -> None:
    """Leaves ``step-4.ckpt`` in `folder`: a folder where `kind` is ``zero2``, a file where it is ``ddp``, or ``noted``,
    by rankload's ``CheckpointIO``."""
    from rankload.integrations.lightning import CheckpointIO

    os.makedirs(folder, exist_ok=True)
    on_cpu()
    strategy = (
        DDPStrategy(process_group_backend="gloo")
        if kind in ("ddp", "noted")
        else LightningsStrategy(stage=int(kind[-1]), process_group_backend="gloo")
    )
    watch, job, counting = Watch(folder, saves=True), Job(), Counting()
    plugins = [CheckpointIO()] if kind == "noted" else None
    lightning.Trainer(strategy=strategy, plugins=plugins, **arguments(counting, watch)).fit(job, samples(0))
    hold(folder, watch.held, losses=job.losses, start={**watch.start})


def resume(folder: str, kind: str, path: str) -> None:
    """Rank 0 prints what a resumed job holds otherwise than the one that saved, and how it goes on."""
    on_cpu()
    watch, module, counting = Watch(folder, saves=False), Job(seed=7), Counting()
    names = {
        "stage": int(kind[-1]) if kind.startswith("zero") else 0,
        "arguments": arguments(counting, watch),
        "module": module,
        "loader": samples(GLOBAL_BATCH * SAVED_AT),
        "path": path,
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run_lines("lightning-deepspeed" if kind.startswith("zero") else "lightning-file", names)
    tell(
        differences=differences(folder, watch.held, without=("step/",) if kind.startswith("zero") else ()),
        start=watch.start,
        losses=module.losses,
        batch_numbers=module.numbers,
        expected=numbers(folder)["losses"][SAVED_AT:],
        whole=GLOBAL_BATCH % RANKS == 0,
        batch_known=kind.startswith("zero"),
        warnings=[str(one.message) for one in told if "a step was" in str(one.message)],
    )


def validate(folder: str, kind: str, path: str) -> None:
    """Rank 0 prints the weights that ``validate(ckpt_path=)`` finds otherwise, and the losses."""
    from rankload.integrations.lightning import DeepSpeedStrategy

    on_cpu()
    module, mine = Job(seed=7), list(batches(0, 1))
    strategy = DeepSpeedStrategy(stage=int(kind[-1]), process_group_backend="gloo")
    trainer = lightning.Trainer(strategy=strategy, limit_val_batches=1, **arguments())
    trainer.validate(module, samples(0), ckpt_path=path, verbose=False)
    engine = trainer.strategy.deepspeed_engine
    result = engine.rankload_result
    expected = torch.load(Path(folder, "held.pt"), weights_only=True)
    reference = tiny_gpt2(seed=9)
    names = {f"model/{name}" for name, _ in module.named_parameters()}
    reference.load_state_dict(
        {name.removeprefix("model/model."): expected[name] for name in names}, strict=False
    )
    reference.tie_weights()
    (batch,) = mine
    with torch.no_grad():
        os.environ["WORLD_SIZE"] = str(RANKS)
        loss = of_all_ranks(float(reference(**batch).loss))
    tell(losses=module.losses, expected=[loss], step=result.step, extra=sorted(map(str, result.extra)))
