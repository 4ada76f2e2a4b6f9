"""Defines what a load restores into: `State`, the parts of a training job, and `ForeignState`, which loads itself."""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .errors import LayoutError
from .torch_modes import default_modes

if TYPE_CHECKING:
    from ..distributed.channel import Channel

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
            engine, which brings its optimizer, lr scheduler and loss scaler with it. None: the other parts are restored
            alone.
        optimizers: one, or a list. So are `schedulers`, `scaler` and `callbacks`: objects with ``state_dict`` and
            ``load_state_dict``.
        schedulers: lr schedulers.
        scaler: a ``GradScaler``.
        algorithms: algorithms that are applied to the model already (see `Algorithm`); those that the checkpoint needs
            are added to the list.
        callbacks: anything else with a state, restored by class name.
        timestamp: an object with ``load_state_dict``, or None. Left at None, this part and each one below takes the
            checkpoint's plain values: ``state.timestamp["batch"]``. The parts above are not restored when None.
        rank_zero_seed: rank 0's seed; a load derives missing random states from the one that was saved.
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

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """The parts in Composer's layout, as `save_checkpoint` saves them under ``state``, beside ``rng``.

        The model's own prefixes are left out where a wrapper added them; parts without a value are left out.
        Objects that share a class name are saved under ``NAME``, ``NAME.1``, ``NAME.2`` and so on.

        Tensors that are sharded over ranks (``fully_shard``), of the model and of its optimizers, are gathered one at a
        time into full ones on the CPU, and FullyShardedDataParallel gathers its own: then every rank must call. All
        other tensors are the live ones. A rank in a collective that waits for one that failed ends with exit code 75.

        Args:
            keep: whether this rank wants the result. A rank that passes False takes part in the gathering, keeps
                nothing, and gets an empty dict: so only those that write hold the whole model in memory.

        Raises `LayoutError` for a DeepSpeed engine, whose weights and optimizer are sharded over the ranks, and for its
        module or its optimizer where those are; for optimizers of FullyShardedDataParallel and for ``ShardedTensor``,
        which cannot be gathered so; and, on all ranks, where they have different sharded tensors, as the stages of a
        pipeline have.
        """
        # Not in the caller's modes: what is detached under inference_mode could not be gathered.
        with default_modes(), contextlib.ExitStack() as leaving:
            channel: Channel | None = None
            if _is_flattened(self.model) and _has_group():
                channel = leaving.enter_context(_gathering())  # its own state_dict() runs collectives
            found, sharded = self._with_shards()
            if not sharded:
                return found if keep else {}
            channel = channel or leaving.enter_context(_gathering())
            _check_same_shards(sharded, channel)
            return _kept(found, sharded, keep, channel)

    def _with_shards(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parts, and by their places in them the tensors of which this rank has a shard. Raises as `state_dict`."""
        if _in_shards_of_deepspeed(unwrap(self.model), self.optimizers):
            raise LayoutError(
                "State.state_dict() of a DeepSpeed engine: its weights and optimizer are in shards on all ranks; "
                "save it with save_checkpoint(folder, State(model=engine)), which load restores"
            )
        if self.optimizers and _is_flattened(self.model):
            raise LayoutError(
                "State.state_dict() of FullyShardedDataParallel with an optimizer: its state is this rank's part of "
                f"flattened parameters; {_FULL_STATE}"
            )
        found = self._parts()
        return found, dict(_sharded(found, ""))

    def _parts(self) -> dict[str, Any]:
        found: dict[str, Any] = {} if self.model is None else {"model": unwrap(self.model).state_dict()}
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


def full_state_dict(state: State, channel: Channel, *, keep: bool) -> dict[str, Any]:
    """`State.state_dict` inside a session: every rank of `channel` must call, whether it has shards or not."""
    found, sharded = state._with_shards()
    _check_same_shards(sharded, channel)
    return _kept(found, sharded, keep, channel)


@contextlib.contextmanager
def _gathering() -> Iterator[Channel]:
    """A block of collectives outside of a load or save; every rank must enter."""
    from ..distributed.session import open_session
    from ..distributed.watchdog import watched_collectives

    with (
        open_session() as session,
        session.channel.stage("State.state_dict"),
        watched_collectives(session.channel, "the gathering of shards by State.state_dict()"),
    ):
        yield session.channel


def _has_group() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _kept(found: dict[str, Any], sharded: Mapping[str, Any], keep: bool, channel: Channel) -> dict[str, Any]:
    whole: dict[str, Any] = _gathered(found, "", sharded, keep, channel) if sharded else found
    return whole if keep else {}


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


_FULL_STATE = (
    "gather it with torch.distributed.checkpoint.state_dict.get_state_dict(model, optimizer, options="
    "StateDictOptions(full_state_dict=True, cpu_offload=True)), and save {'model': ..., 'optimizer': ...}"
)


def _under(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def _is_flattened(model: Any) -> bool:
    # By name: a job without it is spared the time of importing it.
    parts = model.modules() if callable(getattr(model, "modules", None)) else ()
    return any(type(part).__name__ == "FullyShardedDataParallel" for part in parts)


def _sharded(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The tensors in `value` of which this rank has a shard, by their places, in an order that all ranks share."""
    kind = type(value).__name__
    if kind == "ShardedTensor":
        raise LayoutError(
            f"State.state_dict(): {path} is a ShardedTensor, this rank's part alone; {_FULL_STATE}"
        )
    if kind == "DTensor" and callable(getattr(value, "full_tensor", None)):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _sharded(item, _under(path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _sharded(item, _under(path, index))


def _check_same_shards(sharded: Mapping[str, Any], channel: Channel) -> None:
    """Raises `LayoutError` on all ranks unless each has the same sharded tensors; every rank must call.

    Otherwise their gathering would wait for ever, or the file would have one rank's tensors alone.
    """
    names = [f"{path} {tuple(tensor.shape)}" for path, tensor in sharded.items()]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    digests = channel.gather("State.state_dict", digest)
    if len(set(digests)) == 1:
        return
    each = channel.gather("State.state_dict names", names)
    other = next(rank for rank, found in enumerate(digests) if found != digests[0])
    apart = [name for name in [*each[0], *each[other]] if (name in each[0]) != (name in each[other])]
    shown = ", ".join(apart[:8]) or "the same ones in another order"
    raise LayoutError(
        f"State.state_dict(): rank 0 has {len(each[0])} sharded tensors and rank {other} has {len(each[other])}, and "
        f"they differ: {shown}. A model whose parts lie on different ranks (a pipeline) does not fit one file: "
        "save each part's state dict from a rank that has it"
    )


def _gathered(value: Any, path: str, sharded: Mapping[str, Any], keep: bool, channel: Channel) -> Any:
    """`value` with a full tensor on the CPU for each that is sharded; all else as it is. Nothing unless `keep`."""
    if path in sharded:
        full = sharded[path].detach().full_tensor()
        kept = full.cpu() if keep else None
        channel.moved()
        return kept
    if isinstance(value, Mapping):
        found: Any = OrderedDict() if isinstance(value, OrderedDict) else {}
        for key, item in value.items():
            found[key] = _gathered(item, _under(path, key), sharded, keep, channel)
        if hasattr(value, "_metadata"):
            found._metadata = value._metadata
        return found
    if isinstance(value, list | tuple) and any(place.startswith(f"{path}/") for place in sharded):
        items = [
            _gathered(item, _under(path, index), sharded, keep, channel) for index, item in enumerate(value)
        ]
        return items if isinstance(value, list) else tuple(items)
    return value


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
    ``module`` (as Composer's models do) stays as it is, and so does a DeepSpeed engine.
    """
    *_, inner = layers_of(model)
    return inner


def layers_of(model: Any) -> Iterator[Any]:
    """`model`, and what each of its wrappers holds, as `unwrap` takes them off: at last an engine, or the module."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        yield model
        if hasattr(type(model), "zero_optimization_stage"):
            return  # a DeepSpeed engine, which answers for its module's attributes
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return
