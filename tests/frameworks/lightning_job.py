"""A job of Lightning that saves after step 4 and goes on to step 8; every rank runs each function."""

from __future__ import annotations

import os
from typing import Any

import lightning
import torch
from framework_model import SAVED_AT, batches, held, hold, of_all_ranks, tiny_gpt2, world_size
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy


class Job(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.kind = kind
        self.model = tiny_gpt2()
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.kind != "fsdp2":
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for block in self.model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.losses.append(of_all_ranks(float(loss.detach())))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(list(batches(0, 2 * SAVED_AT)), batch_size=None)


class Save(lightning.Callback):  # type: ignore[misc]
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, module: Job, *_: Any) -> None:
        if trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(f"{self.folder}/last.ckpt")
            self.found = held(module, trainer.optimizers)
            self.rate = trainer.optimizers[0].param_groups[0]["lr"]


def save(folder: str, kind: str) -> None:
    """Leaves ``last.ckpt`` in `folder`: a file where `kind` is ``ddp``, a folder where it is ``fsdp2``."""
    os.makedirs(folder, exist_ok=True)
    strategy = (
        DDPStrategy(process_group_backend="gloo")
        if kind == "ddp"
        else ModelParallelStrategy(
            data_parallel_size=world_size(), tensor_parallel_size=1, process_group_backend="gloo"
        )
    )
    saving, job = Save(folder), Job(kind)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size(),
        strategy=strategy,
        max_steps=2 * SAVED_AT,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[saving],
    )
    trainer.fit(job)
    hold(folder, saving.found, losses=job.losses, rates=[saving.rate])
