"""Defines what a load restores into: `State`, the parts of a training job, and `ForeignState`, which loads itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from .errors import LayoutError

PLAIN_PARTS = ("rank_zero_seed", "run_name", "dataset_state", "train_metrics", "eval_metrics")
"""Parts of a `State` that are saved as they are, or as their ``state_dict``."""

AlgorithmPass = Callable[[Sequence[Any], Any], Sequence[Any]]
"""Takes the algorithms and the event, returns the algorithms in the order in which they should run."""


@runtime_checkable
class ForeignState(Protocol):
    """A state object that restores itself, as Composer's own ``State`` does."""

    def load_state_dict(
        self, state: dict[str, Any], logger: Any, *, exclude_algorithms: Any, algorithm_passes: Any
    ) -> None: ...

    def load_model_state(
        self,
        state_dict: dict[str, Any],
        logger: Any,
        *,
        strict: bool,
        exclude_algorithms: Any,
        algorithm_passes: Any,
    ) -> None: ...


class State:
    """A training job's parts; a load restores each where the checkpoint has it.

    An object here that the checkpoint has nothing for, or a state of another kind, is an error under
    ``strict_model_weights``; else it stays as it is, with a warning.

    Attributes:
        model: a module (plain, DDP-wrapped, compiled, sharded with ``fully_shard``, on the meta device), or a DeepSpeed
            engine, which brings its optimizer, lr scheduler and loss scaler with it.
        optimizers: one, or a list. So are `schedulers`, `scaler` and `callbacks`: objects with ``state_dict`` and
            ``load_state_dict``.
        schedulers: lr schedulers.
        scaler: a ``GradScaler``.
        algorithms: algorithms that are applied to the model already (see `Algorithm`); those that the checkpoint needs
            are added to the list.
        callbacks: anything else with a state, restored by class name.
        timestamp: an object with ``load_state_dict``, or None. Left at None, this part and each one below takes the
            checkpoint's plain values: ``state.timestamp["batch"]``. The parts above are not restored when None.
        rank_zero_seed: rank 0's seed; missing random states are derived from it.
        run_name: stands for ``{run_name}`` in the path.
        dataset_state: the position in the data.
        train_metrics: metrics of the training set.
        eval_metrics: metrics of the evaluation sets.
    """

    def __init__(
        self,
        model: Any,
        optimizers: Any = None,
        schedulers: Any = None,
        scaler: Any = None,
        algorithms: Any = None,
        callbacks: Any = None,
        timestamp: Any = None,
        rank_zero_seed: int | None = None,
        run_name: str | None = None,
        dataset_state: Any = None,
        train_metrics: Any = None,
        eval_metrics: Any = None,
    ) -> None:
        self.model = model
        self.optimizers = as_list(optimizers)
        self.schedulers = as_list(schedulers)
        self.scaler = as_list(scaler)
        self.algorithms = as_list(algorithms)
        self.callbacks = as_list(callbacks)
        self.timestamp = timestamp
        self.rank_zero_seed = rank_zero_seed
        self.run_name = run_name
        self.dataset_state = dataset_state
        self.train_metrics = train_metrics
        self.eval_metrics = eval_metrics

    def state_dict(self) -> dict[str, Any]:
        """The parts in Composer's layout, for ``torch.save({"state": state.state_dict(), "rng": gather_rng()}, path)``.

        The model's own prefixes are left out where a wrapper added them; parts without a value are left out.
        Objects that share a class name are saved under ``NAME``, ``NAME.1``, ``NAME.2`` and so on.

        Raises `LayoutError` for a DeepSpeed engine, whose weights and optimizer are sharded over the ranks, and for its
        module or its optimizer where those are.
        """
        if _in_shards_of_deepspeed(unwrap(self.model), self.optimizers):
            raise LayoutError(
                "State.state_dict() of a DeepSpeed engine: its weights and optimizer are in shards on all ranks; "
                "save it with engine.save_checkpoint(folder), which load_checkpoint restores"
            )
        found: dict[str, Any] = {"model": unwrap(self.model).state_dict()}
        for part in ("optimizers", "schedulers", "scaler", "callbacks"):
            objects = getattr(self, part)
            if objects:
                found[part] = {name: saved_form(item) for name, item in by_class_name(objects).items()}
        if self.algorithms:
            found["algorithms"] = [(type(item).__qualname__, item.state_dict()) for item in self.algorithms]
        if self.timestamp is not None:
            name = "Timestamp" if isinstance(self.timestamp, Mapping) else type(self.timestamp).__qualname__
            found["timestamp"] = {name: saved_form(self.timestamp)}
        for part in PLAIN_PARTS:
            value = getattr(self, part)
            if value is not None:
                found[part] = saved_form(value)
        return found


def _in_shards_of_deepspeed(model: Any, optimizers: Sequence[Any]) -> bool:
    """Whether `model` is an engine, or DeepSpeed has spread its parameters or one of `optimizers` over the ranks."""
    parameters = model.parameters() if callable(getattr(model, "parameters", None)) else ()
    return (
        hasattr(model, "zero_optimization_stage")
        or any(hasattr(one, "ds_id") for one in parameters)
        or any(
            base.__module__.startswith("deepspeed.runtime.") and hasattr(one, "optimizer")
            for one in optimizers
            for base in type(one).__mro__
        )
    )


def as_list(value: Any) -> list[Any]:
    """None as no object, a list or tuple as its items, anything else as one object."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def by_class_name(objects: list[Any]) -> dict[str, Any]:
    """`objects` by class name, the second of a name as ``NAME.1``; the objects in a dict by its keys."""
    named: dict[str, Any] = {}
    for item in objects:
        if isinstance(item, Mapping) and any(callable(getattr(v, "state_dict", None)) for v in item.values()):
            named.update(item)
            continue
        base = type(item).__qualname__
        name, count = base, 0
        while name in named:
            count += 1
            name = f"{base}.{count}"
        named[name] = item
    return named


def saved_form(value: Any) -> Any:
    """What is saved of `value`: its ``state_dict()``, of a mapping each item's saved form, of anything else itself."""
    if callable(getattr(value, "state_dict", None)):
        return value.state_dict()
    if isinstance(value, Mapping):
        return {key: saved_form(item) for key, item in value.items()}
    return value


def unwrap(model: Any) -> Any:
    """The module inside DataParallel, DistributedDataParallel and torch.compile wrappers, at any depth.

    Only those wrappers are taken off: a module of the user's that keeps another one in an attribute named
    ``module`` (as Composer's models do) stays as it is.
    """
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model
