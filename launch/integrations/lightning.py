"""Lightning's loads at any world size and from any URI: a `DeepSpeedStrategy` and a `CheckpointIO` for its Trainer.

    from rankload.integrations.lightning import CheckpointIO, DeepSpeedStrategy

    trainer = Trainer(strategy=DeepSpeedStrategy(stage=2), ...)              # folders of DeepSpeed
    trainer = Trainer(strategy="ddp", plugins=[CheckpointIO()], ...)         # .ckpt files
    trainer.fit(module, ckpt_path="s3://bucket/run/epoch=0-step=4.ckpt")

Both are Lightning's own extension points: nothing is replaced. They save as Lightning does; a ``.ckpt`` file gets the
number of ranks besides. Importing this module imports Lightning: ``lightning.pytorch``, or ``pytorch_lightning`` where
the job has imported that one alone.

Not guaranteed: what Lightning does not save (random states, and the position in the data of a plain DataLoader);
docs/frameworks.md lists it. Its FSDP strategies read their folders without a `CheckpointIO`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..distributed.session import current_topology
from ..loader import LoadOptions, OptionError, read
from . import deepspeed
from .batches import warn_of_batch, warn_of_unknown_batch
from .inert import warn_of_inert
from .lightning_home import TRIED, import_home
from .native import native_load
from .versions import warn_of_version

_home, _distribution = import_home("lightning.pytorch", "pytorch_lightning")
_strategies = _home("strategies")
_io = _home("plugins.io")
_RANKS = "rankload_world_size"
"""The ranks that saved a file by our `CheckpointIO`: Lightning's own files tell neither them nor the batch."""
_REMEDY = "Keep the batch by the DataLoader's batch_size or by accumulate_grad_batches"


class DeepSpeedStrategy(_strategies.DeepSpeedStrategy):  # type: ignore[misc, name-defined]
    """Lightning's, whose `load_checkpoint` restores a folder at any world size and from any path or URI.

    Args:
        object_store, options: as `rankload.load` takes them.

    All other arguments are Lightning's. After a load ``strategy.deepspeed_engine.rankload_result`` has the
    `LoadResult`.
    """

    def __init__(
        self,
        *args: Any,
        object_store: Any = None,
        options: LoadOptions | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._object_store = object_store
        self._options = options

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Restores the engine, and returns what Lightning restores the rest from; every rank must call it.

        While fitting, the optimizer is restored too; else (``validate``, ``test``, ``predict``) the weights are. With
        ``load_full_weights`` at stage 3 `checkpoint_path` is one file, which Lightning itself loads.

        Args:
            checkpoint_path: the folder that Lightning saved, whatever its stage and its number of ranks.
            weights_only: not needed: no pickle is ever run.

        Raises:
            RankloadError: as `rankload.load`.
        """
        if self.load_full_weights and self.zero_stage_3:
            with native_load("Lightning", self._options):
                whole: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
                return whole
        warn_of_version(_distribution, TRIED)
        fitting = self.lightning_module.trainer.state.fn == "fit"
        engine = self.deepspeed_engine
        _, client_state = deepspeed.load_checkpoint(
            engine,
            checkpoint_path,
            load_module_strict=self.lightning_module.strict_loading,
            load_optimizer_states=fitting,
            load_lr_scheduler_states=False,  # Lightning restores it from what is returned
            object_store=self._object_store,
            options=self._options,
            warns_of_batch=False,
        )
        if fitting:
            warn_of_batch(
                engine.rankload_result.batch_size,
                engine.train_batch_size(),
                counted_by="Lightning",
                remedy=_REMEDY,
            )
        warn_of_inert(client_state, ("callbacks", "lr_schedulers", "loops"))
        return client_state


class CheckpointIO(_io.TorchCheckpointIO):  # type: ignore[misc, name-defined]
    """Reads a ``.ckpt`` file by `rankload.read`: from any path or URI, without running its pickle, fetched once per
    node and compared with its checksums. It writes and removes files as Lightning's own does; what it writes tells the
    number of ranks besides, so that a load at another one warns: such a file does not tell the batch.

    Args:
        object_store: the store that paths name objects of; None: the one that each path itself names.
        options: as `rankload.read` takes them. ``safe_types`` are the types of yours that a file may hold.
    """

    def __init__(
        self, *, object_store: Any = None, options: LoadOptions | Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._object_store = object_store
        self._options = options

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes `checkpoint` as Lightning does, with the number of ranks in it; rank 0 calls it."""
        noted = {**checkpoint, _RANKS: current_topology().world_size}
        super().save_checkpoint(noted, path, storage_options)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The whole dict of the file at `path`, as it was saved; every rank must call it.

        Args:
            path: a local path or a URI.
            map_location: the device that tensors are put on. None, or a callable (what Lightning itself passes): the
                CPU.
            weights_only: not needed: no pickle is ever run.

        Raises:
            RankloadError: as `rankload.read`; `OptionError` for a mapping of devices as `map_location`.
        """
        if isinstance(map_location, Mapping):
            raise OptionError(
                "map_location is a mapping of devices: pass one device, or None for the CPU; where tensors were when "
                "they were saved does not matter to rankload"
            )
        warn_of_version(_distribution, TRIED)
        found: dict[str, Any] = read(
            path, object_store=self._object_store, progress_bar=False, options=self._options
        )
        ranks = found.get(_RANKS) if isinstance(found, Mapping) else None
        warn_of_unknown_batch(
            ranks if isinstance(ranks, int) else None,
            current_topology().world_size,
            counted_by="Lightning",
            remedy=_REMEDY,
        )
        if map_location is None or callable(map_location):
            return found
        moved: dict[str, Any] = _home("utilities").move_data_to_device(found, map_location)
        return moved
