"""Composer's start from a checkpoint, at any world size and of any kind: a callback that loads before training.

    from rankload.integrations.composer import LoadCheckpoint

    trainer = Trainer(..., callbacks=[LoadCheckpoint("s3://bucket/run/ep0-ba4-rank0.pt")])  # without load_path

It loads at Composer's own event for that, ``before_load``: nothing is replaced. Random states are put back at the first
batch, on ranks that the checkpoint has none for as ones that follow from those that it has.

Not guaranteed: random states for what the data loader draws of that first batch in the main process, which has been
drawn by then. docs/frameworks.md lists what is the same.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..loader import LoadOptions, LoadResult, load, restore_rng
from .batches import warn_of_batch
from .versions import warn_of_version

TRIED = ("0.32",)
_core = importlib.import_module("composer.core")


class LoadCheckpoint(_core.Callback):  # type: ignore[misc, name-defined]
    """Loads the checkpoint at `path` before a Trainer trains.

    Leave the Trainer's ``load_path`` and ``autoresume`` unset: what they load comes after this, and in its place.

    Args:
        path: as `rankload.load` takes it: a file or folder of any kind that it knows, local or a URI.
        load_weights_only, strict_model_weights, ignore_keys, exclude_algorithms, algorithm_passes, object_store,
            options: as `rankload.load` takes them.

    Attributes:
        result: the `LoadResult`, once it was loaded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        load_weights_only: bool = False,
        strict_model_weights: bool = True,
        ignore_keys: Any = None,
        exclude_algorithms: Collection[str] | None = None,
        algorithm_passes: Sequence[Any] | None = None,
        object_store: Any = None,
        options: LoadOptions | Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.result: LoadResult | None = None
        self._arguments: dict[str, Any] = {
            "load_weights_only": load_weights_only,
            "strict_model_weights": strict_model_weights,
            "ignore_keys": ignore_keys,
            "exclude_algorithms": exclude_algorithms,
            "algorithm_passes": algorithm_passes,
            "object_store": object_store,
            "options": options,
        }
        self._has_started = False

    def before_load(self, state: Any, logger: Any) -> None:
        """Restores the checkpoint into `state`; every rank must call it. Raises as `rankload.load`."""
        warn_of_version("mosaicml", TRIED)
        run_name = state.run_name
        self.result = load(self.path, state, logger, progress_bar=False, **self._arguments)
        # As after a load of its own: the run is this one, whatever the saved one was called.
        state.run_name = run_name
        state.load_path = os.fspath(self.path)
        self._has_started = False

    def batch_start(self, state: Any, logger: Any) -> None:
        """Puts the random states back before the first batch is trained on; later ones are left alone."""
        if self.result is None or self._has_started:
            return
        self._has_started = True
        if self.result.rng_states is not None:
            restore_rng(self.result)
        warn_of_batch(
            _saved_batch(state.timestamp),
            _batch(state.dataloader),
            counted_by="Composer",
            remedy="Keep the batch by the DataLoader's batch_size",
        )


def _saved_batch(timestamp: Any) -> int | None:
    """Samples of a batch over all ranks in the epoch so far; None where they were not all the same, or none was."""
    samples, batches = int(timestamp.sample_in_epoch), int(timestamp.batch_in_epoch)
    return samples // batches if batches and samples % batches == 0 else None


def _batch(loader: Any) -> int | None:
    """Samples of a batch of `loader` over all ranks, where it tells those of one rank."""
    each = getattr(loader, "batch_size", None)
    world_size: int = importlib.import_module("composer.utils.dist").get_world_size()
    return each * world_size if isinstance(each, int) else None
