"""Jobs of torchtitan's own Trainer that save at step 4, and others that resume there by rankload; every rank runs each
function.

torchtitan knows accelerators alone: `on_cpu` gives it a CPU, which has no memory statistics to report.
"""

from __future__ import annotations

import os
import types
import warnings
from typing import Any

import torch
from framework_lines import run_lines
from framework_model import (
    SAVED_AT,
    SHARED_BATCH,
    by_step,
    differences,
    held,
    hold,
    numbers,
    tell,
    world_size,
)  # fmt: skip

LENGTH = 12
VOCABULARY = 97


def on_cpu() -> None:
    """Before torchtitan is imported: it looks for its device there."""
    torch._utils._get_available_device_type = lambda: "cpu"  # type: ignore[assignment]
    device: Any = torch.cpu
    device.get_device_name = lambda *_: "cpu"
    device.get_device_properties = lambda *_: types.SimpleNamespace(total_memory=1 << 30)
    device.memory_stats = lambda *_: {}
    device.reset_peak_memory_stats = device.empty_cache = lambda *_: None
    from torchtitan.distributed import utils

    utils.set_pg_timeouts = lambda *_, **__: None  # it names a device to gloo, which takes none


class Samples(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """This rank's samples, which tell their number by their first token, from step `first` on."""

    def __init__(self, first: int, place: tuple[int, int], batch: int) -> None:
        self.done = first * batch
        self.rank, self.ranks = place
        self.batch = batch
        self.seen: list[int] = []

    def __iter__(self) -> Any:
        while True:
            step, place = divmod(self.done, self.batch)
            number = (step * self.ranks + self.rank) * self.batch + place
            self.done += 1
            self.seen.append(number)
            drawn = torch.Generator().manual_seed(number)
            tokens = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=drawn)
            yield {"input": tokens[:-1]}, tokens[1:]

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


def register(first: int) -> None:
    """Registers the model ``tiny``, whose data begin at step `first`."""
    from torchtitan.components.dataloader import ParallelAwareDataloader
    from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec
    from torchtitan.protocols import train_spec

    def loader(dp_world_size: int, dp_rank: int, job_config: Any, **_: Any) -> Any:
        each = job_config.training.local_batch_size
        return ParallelAwareDataloader(
            Samples(first, (dp_rank, dp_world_size), each), dp_rank, dp_world_size, batch_size=each
        )

    spec = get_train_spec()
    spec.model_args = {
        "tiny": TransformerModelArgs(dim=16, n_layers=2, n_heads=2, vocab_size=VOCABULARY, max_seq_len=16)
    }
    spec.build_dataloader_fn, spec.build_tokenizer_fn, spec.state_dict_adapter = loader, None, None
    train_spec.register_train_spec("tiny", spec)


def config(folder: str, batch: int, seed: int) -> Any:
    from torchtitan.config import JobConfig

    made = JobConfig()
    made.job.dump_folder = folder
    made.model.name, made.model.flavor = "tiny", "tiny"
    made.training.seq_len = LENGTH
    made.training.local_batch_size = batch // world_size()
    made.training.steps = 2 * SAVED_AT
    made.training.mixed_precision_param = "float32"
    made.lr_scheduler.warmup_steps = 2
    made.metrics.log_freq = 1
    made.debug.seed = seed
    made.checkpoint.enable = True
    made.checkpoint.interval = SAVED_AT
    made.checkpoint.last_save_model_only = False
    return made


class Watched:
    """What a Trainer holds after `SAVED_AT` steps or when it has loaded, and the losses of its steps."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        for module in trainer.model_parts[0].modules():
            if hasattr(module, "set_force_sum_reduction_for_comms"):
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale as it sums
        self.losses: list[float] = []
        self.start: dict[str, Any] = {}
        self.held: dict[str, torch.Tensor] = {}
        log, save, load = trainer.metrics_processor.log, trainer.checkpointer.save, trainer.checkpointer.load

        def logged(step: int, loss: float, *args: Any, **kwargs: Any) -> Any:
            self.losses.append(float(loss))
            return log(step, loss, *args, **kwargs)

        def saved(step: int, *args: Any, **kwargs: Any) -> Any:
            if step == SAVED_AT:
                self.note()
            return save(step, *args, **kwargs)

        def loaded(*args: Any, **kwargs: Any) -> bool:
            done: bool = load(*args, **kwargs)
            if done:
                self.note()
                self.seen.clear()
            return done

        trainer.metrics_processor.log = logged
        trainer.checkpointer.save = saved
        trainer.checkpointer.load = loaded

    @property
    def seen(self) -> list[int]:
        found: list[int] = self.trainer.dataloader.dataset.seen
        return found

    def note(self) -> None:
        trainer = self.trainer
        self.held = held(trainer.model_parts[0], list(trainer.optimizers))
        rates = trainer.lr_schedulers.schedulers[0].get_last_lr()
        tokens = torch.tensor(trainer.ntokens_seen)
        if world_size() > 1:
            torch.distributed.all_reduce(tokens)
        self.start = {"step": trainer.step, "tokens": int(tokens), "rates": rates}

    def by_step(self, batch: int) -> list[list[int]]:
        each = batch // world_size()
        return by_step([self.seen[at : at + each] for at in range(0, len(self.seen), each)])


def save(folder: str, kind: str) -> None:
    """Leaves ``checkpoint/step-4`` in `folder`; `kind` is ``trainer``."""
    os.makedirs(folder, exist_ok=True)
    on_cpu()
    register(0)
    from torchtitan.train import Trainer

    trainer = Trainer(config(folder, SHARED_BATCH, seed=3))
    watched = Watched(trainer)
    trainer.train()
    hold(folder, watched.held, start=watched.start, losses=watched.losses, seen=watched.by_step(SHARED_BATCH))
    trainer.close()


def undone() -> None:
    """The block that the lines have undoes itself after an error, and within another one."""
    import torchtitan.train as titan
    from rankload.integrations import torchtitan

    theirs = titan.CheckpointManager
    try:
        with torchtitan.replaced(), torchtitan.replaced():
            assert titan.CheckpointManager is not theirs
            raise KeyError
    except KeyError:
        assert titan.CheckpointManager is theirs


def resume(folder: str, path: str, batch: str) -> None:
    """Rank 0 prints what a resumed job holds otherwise than the one that saved, and how it goes on.

    `path` is ``-`` for the job's own folder, else what ``initial_load_path`` names.
    """
    on_cpu()
    # At another number of ranks the data begin again: so those that come next are handed to it.
    register(0 if world_size() == 2 else SAVED_AT)
    import torchtitan.train as titan

    made = config(folder, int(batch), seed=7)
    made.checkpoint.load_only = True
    made.checkpoint.load_step = SAVED_AT
    if path != "-":
        made.checkpoint.folder, made.checkpoint.initial_load_path = "elsewhere", path
        made.checkpoint.initial_load_model_only = False
    theirs, watched = (titan.Trainer, titan.CheckpointManager), []
    undone()

    class Trainer(theirs[0]):  # type: ignore[misc, name-defined]
        def __init__(self, job_config: Any) -> None:
            super().__init__(job_config)
            watched.append(Watched(self))

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        titan.Trainer = Trainer
        try:
            trainer = run_lines("torchtitan", {"config": made})["trainer"]
        finally:
            titan.Trainer = theirs[0]
    assert theirs == (titan.Trainer, titan.CheckpointManager)
    (found,) = watched
    texts = [str(one.message) for one in told if one.category is UserWarning]
    tell(
        differences=differences(folder, found.held),
        start=found.start,
        losses=found.losses,
        seen=found.by_step(int(batch)),
        expected=numbers(folder),
        position=[one for one in texts if "position in the data" in one],
        batch=[one for one in texts if "a step was" in one],
        kind=trainer.checkpointer.rankload_result.receipt.kind,
    )
    trainer.close()
