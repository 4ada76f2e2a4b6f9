"""Fabric's load of a DeepSpeed folder at any world size and from any URI: a `DeepSpeedStrategy` for ``Fabric``.

    from rankload.integrations.fabric import DeepSpeedStrategy

    fabric = Fabric(strategy=DeepSpeedStrategy(stage=2), ...)
    rest = fabric.load("s3://bucket/run/step-4", {"model": model, "optimizer": optimizer, "step": 0})

It is Fabric's own extension point: nothing is replaced. It saves as Fabric does. For the files of its other strategies,
``plugins=[CheckpointIO()]`` of `rankload.integrations.lightning` does as well. Importing this module imports Fabric:
``lightning.fabric``, or ``lightning_fabric`` where the job has imported that one alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..distributed.printable import warn
from ..loader import LoadOptions, LoadResult, OptionError
from . import deepspeed
from .batches import warn_of_batch, warn_of_unknown_batch
from .inert import warn_of_inert
from .lightning_home import TRIED, import_home
from .native import native_load
from .versions import warn_of_version

_home, _distribution = import_home("lightning.fabric", "lightning_fabric")
_strategies = _home("strategies")
_TAG = "checkpoint"
"""The folder that Fabric gives every DeepSpeed checkpoint inside of its own."""
_MICRO_BATCH = "train_micro_batch_size_per_gpu"
_ENGINES_OWN = ("optimizer", "lr_scheduler")
"""What DeepSpeed's files have under these keys is the engine's, and no value of the user's."""


class DeepSpeedStrategy(_strategies.DeepSpeedStrategy):  # type: ignore[misc, name-defined]
    """Fabric's, whose `load_checkpoint` restores a folder at any world size and from any path or URI.

    Args:
        object_store, options: as `rankload.load` takes them.

    All other arguments are Fabric's. After a load the engine's ``rankload_result`` has the `LoadResult`.
    """

    def __init__(
        self,
        *args: Any,
        object_store: Any = None,
        options: LoadOptions | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._knows_batch = _MICRO_BATCH in (self.config or {})
        self._object_store = object_store
        self._options = options

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        state: Any = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Restores the engine in `state`, and fills the plain values of `state`; every rank must call it.

        The optimizer is restored where `state` has one. A `state` that is a module or an optimizer, and with
        ``load_full_weights`` at stage 3 any, is Fabric's own to load from one file.

        Args:
            path: the folder that Fabric saved, whatever its stage and its number of ranks.
            state: a dict with one model that ``fabric.setup`` returned.
            strict: whether missing and unexpected weights are an error.
            weights_only: not needed: no pickle is ever run.

        Returns:
            What the checkpoint holds beyond the keys of `state`.

        Raises:
            OptionError: `state` has no model of DeepSpeed, or several.
            RankloadError: as `rankload.load`.
        """
        if not isinstance(state, Mapping) or (self.load_full_weights and self.zero_stage_3):
            with native_load("Fabric", self._options):
                whole: dict[str, Any] = super().load_checkpoint(path, state, strict, weights_only)
                return whole
        warn_of_version(_distribution, TRIED)
        engines = [found for value in state.values() for found in _engines_in(value)]
        if len(engines) != 1:
            raise OptionError(
                f"fabric.load of a DeepSpeed folder needs a state with one model that fabric.setup returned; of its "
                f"{len(state)} values {len(engines)} hold one"
            )
        (engine,) = engines
        _, client_state = deepspeed.load_checkpoint(
            engine,
            path,
            tag=_TAG,
            load_module_strict=strict,
            load_optimizer_states=any(hasattr(value, "param_groups") for value in state.values()),
            load_lr_scheduler_states=False,
            object_store=self._object_store,
            options=self._options,
            warns_of_batch=False,
        )
        result: LoadResult = engine.rankload_result
        words = {
            "counted_by": "a script that counts its batches",
            "remedy": "Keep the batch, or count samples",
        }
        # Fabric tells DeepSpeed of a batch of one sample where nobody told it, and DeepSpeed's files that.
        if self._knows_batch or engine.train_micro_batch_size_per_gpu() > 1:
            warn_of_batch(result.batch_size, engine.train_batch_size(), **words)
        else:
            warn_of_unknown_batch(result.receipt.saved_world_size, result.receipt.world_size, **words)
        warn_of_inert(client_state, tuple(state))
        if "lr_scheduler" in state:
            warn(
                "state['lr_scheduler'] is not restored, by Fabric neither: DeepSpeed's files have the engine's own "
                "under that name. Save it under another key",
                stacklevel=2,
            )
        for key in [key for key in state if key in client_state and key not in _ENGINES_OWN]:
            value, saved = state[key], client_state.pop(key)
            if callable(getattr(value, "load_state_dict", None)):
                value.load_state_dict(saved)
            else:
                state[key] = saved  # type: ignore[index]
        return client_state


def _engines_in(value: Any) -> list[Any]:
    """The DeepSpeed engines that `value`, one item of a state, is or wraps."""
    if not hasattr(value, "modules"):
        return []
    return [one for one in value.modules() if hasattr(type(one), "zero_optimization_stage")]
