"""Makes up the job that a load is planned for: what each of its ranks keeps, by the checkpoint's own names. Pure.

    plain     every rank has all of the model and of the optimizer's state
    fsdp2     ``fully_shard``: each rank has its chunk of each parameter's first dimension
    stage0    a DeepSpeed engine whose ranks each update all parameters
    stage1    an engine whose ranks each update a partition of each parameter group; ``stage2`` is the same here
    stage3    an engine whose ranks each have a share of each parameter

The rules of partition are those of `saved.partitions` and of `saved.shards`; ``round_robin_gradients`` and
``parameter_alignment``, which move elements between ranks, are taken to be off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import LayoutError
from ..saved.contents import Saved
from ..saved.demand import Demand, ParameterDemand, Shape, ShardDemand
from ..saved.model_parallel import Position
from ..saved.partitions import cut, padded_partition, shares
from ..saved.regions import Run
from ..saved.shards import chunk
from ..saved.strided import Box
from ..saved.tensor import SavedTensor, Unread

TargetName = Literal["plain", "fsdp2", "stage0", "stage1", "stage2", "stage3"]
TARGETS: tuple[TargetName, ...] = ("plain", "fsdp2", "stage0", "stage1", "stage2", "stage3")
STEP = "step"
"""The key of an optimizer's state that never lies along a parameter."""
_BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked", "inv_freq", "position_ids"})
"""Last parts of names that are buffers' in every model, so that they are not partitioned."""
_PARAMETERS = frozenset({"weight", "bias"})
"""Last parts of names that are parameters', whether or not the optimizer updates them."""

Runs = tuple[Run, ...]


@dataclass(frozen=True)
class Job:
    """A job of `world_size` ranks that has the checkpoint's model and optimizer."""

    target: TargetName
    world_size: int
    parameters: Mapping[str, SavedTensor]
    """By name, in the checkpoint's order; tied ones once."""
    trained: frozenset[str]
    """Those that the optimizer updates."""
    groups: tuple[tuple[str, ...], ...]
    """The optimizer's parameter groups."""
    aliases: Mapping[str, str]
    """Further names of tied parameters to those in ``parameters``."""
    others: tuple[str, ...]
    """Names of buffers and extra state."""
    keys: Mapping[tuple[Any, Any], str] = field(default_factory=dict)
    """Of an optimizer that numbers its parameters: its name and a number, to the parameter's name."""
    _partitions: tuple[Mapping[str, Runs], ...] = ()
    """Stages 1 and 2: by rank, the elements of each parameter in its partitions."""

    @property
    def by_engine(self) -> bool:
        """Whether a DeepSpeed engine is restored."""
        return self.target.startswith("stage")

    def updated(self, name: str, rank: int) -> Runs:
        """The elements of a parameter that `rank`'s optimizer updates, in an engine's job."""
        if name not in self.trained:
            return ()
        if self.target == "stage3":
            return self._share(name, rank)
        if self.target in ("stage1", "stage2"):
            return self._partitions[rank].get(name, ())
        return self._whole(name)

    def computed(self, name: str, rank: int) -> Runs:
        """The elements of a parameter that `rank`'s module holds, in an engine's job."""
        return self._share(name, rank) if self.target == "stage3" else self._whole(name)

    def shard(self, shape: Shape, rank: int) -> Box:
        """What `rank` keeps of a parameter of `shape` that ``fully_shard`` has cut."""
        first, length = chunk(shape[0], self.world_size, rank)
        rest = shape[1:]
        return Box((first, *(0 for _ in rest)), (length, *rest))

    def is_sharded(self, name: str) -> bool:
        """Whether each rank keeps a shard of the parameter."""
        return self.target == "fsdp2" and name in self.parameters and bool(self.parameters[name].shape)

    def demand(self, rank: int) -> Demand:
        """What `rank` asks of the checkpoint's source."""
        position = Position(rank, self.world_size)
        if self.by_engine:
            return Demand(
                position,
                parameters={
                    name: ParameterDemand(
                        one.shape, one.dtype, self.updated(name, rank), self.computed(name, rank)
                    )
                    for name, one in self.parameters.items()
                },
                aliases=self.aliases,
                others=self.others,
                groups=tuple(
                    tuple((name, self.parameters[name].shape) for name in group) for group in self.groups
                ),
            )
        sharded = {
            name: ShardDemand(one.shape, self.shard(one.shape, rank))
            for name, one in self.parameters.items()
            if self.is_sharded(name)
        }
        return Demand(position, shards=sharded, others=self._unsharded() if sharded else ())

    def _unsharded(self) -> tuple[str, ...]:
        whole = (name for name in self.parameters if not self.is_sharded(name))
        return (*whole, *self.aliases, *self.others)

    def _whole(self, name: str) -> Runs:
        numel = self.parameters[name].numel
        return (Run(0, numel),) if numel else ()

    def _share(self, name: str, rank: int) -> Runs:
        numel = self.parameters[name].numel
        return tuple(slot.run for slot in shares(numel, self.world_size, 0, [rank]))


def job_of(outline: Saved, target: TargetName, world_size: int) -> Job:
    """The job of `target` that has the model and the optimizer of `outline`.

    Of an optimizer that numbers its parameters, a number is that of the first parameter of its state's shape that no
    other has. Raises `LayoutError` where the checkpoint has no model.
    """
    model = outline.state.get("model")
    if not isinstance(model, Mapping) or not any(isinstance(one, SavedTensor) for one in model.values()):
        raise LayoutError(
            f"{outline.name} has no model, which a plan is made for; its parts: "
            f"{', '.join(map(str, outline.state)) or 'none'}",
            path=outline.name,
        )
    aliases = {name: owner for name, owner in _aliases(outline, model).items() if name != owner}
    held = {name: one for name, one in model.items() if isinstance(one, SavedTensor) and name not in aliases}
    by_optimizer = dict(_optimizers(outline))
    keys = _numbered(by_optimizer, held)
    named = {key for one in by_optimizer.values() for key in one.states if isinstance(key, str)}
    trained = {aliases.get(name, name) for name in (*named, *keys.values())} & held.keys()
    parameters = {name: one for name, one in held.items() if _is_parameter(name, one, trained)}
    if not trained:
        trained = set(parameters)
    groups = _groups(by_optimizer, keys, aliases, parameters) or (tuple(parameters),)
    others = (name for name in model if isinstance(name, str) and name not in {*parameters, *aliases})
    partitions: tuple[Mapping[str, Runs], ...] = ()
    if target in ("stage1", "stage2"):
        partitions = _partitions(groups, parameters, world_size)
    return Job(
        target,
        world_size,
        parameters,
        frozenset(trained),
        groups,
        aliases,
        tuple(others),
        keys,
        partitions,
    )


def likeliest_target(outline: Saved) -> TargetName:
    """The target of the job that saved: an engine of its stage (1 for both 1 and 2), shards, or a plain model."""
    model = outline.state.get("model")
    tensors = [
        one for one in (model if isinstance(model, Mapping) else {}).values() if isinstance(one, SavedTensor)
    ]
    in_runs = any(_has_runs(one) for one in tensors)
    if outline.data_parallel_size is not None:
        masters = any(_has_runs(one) for one in outline.masters.values())
        return "stage3" if in_runs else "stage1" if masters else "stage0"
    return "fsdp2" if any(len(one.pieces) > 1 for one in tensors) else "plain"


def _has_runs(tensor: SavedTensor) -> bool:
    return any(isinstance(piece.region, Run) for piece in tensor.pieces)


@dataclass(frozen=True)
class _SavedOptimizer:
    states: Mapping[Any, Mapping[str, Any]]
    """Key of a parameter to its entries."""
    groups: tuple[tuple[Any, ...], ...]
    """The keys in each group."""


def _optimizers(saved: Saved) -> Iterator[tuple[Any, _SavedOptimizer]]:
    optimizers = saved.state.get("optimizers")
    for name, one in optimizers.items() if isinstance(optimizers, Mapping) else ():
        state = one.get("state") if isinstance(one, Mapping) else None
        groups = one.get("param_groups") if isinstance(one, Mapping) else None
        yield (
            name,
            _SavedOptimizer(
                {key: own for key, own in state.items() if isinstance(own, Mapping)}
                if isinstance(state, Mapping)
                else {},
                tuple(
                    tuple(group["params"])
                    for group in (groups if isinstance(groups, list) else ())
                    if isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple)
                ),
            ),
        )


def _aliases(saved: Saved, model: Mapping[Any, Any]) -> dict[str, str]:
    """The further names of tied weights, as the checkpoint has them or, in one file, by their bytes."""
    found = {name: owner for name, owner in saved.aliases.items() if name in model and owner in model}
    first: dict[Any, str] = {}
    for name, one in model.items():
        if isinstance(one, SavedTensor) and one.numel and one.pieces and name not in found:
            if any(isinstance(piece.storage, Unread) for piece in one.pieces):
                continue
            place = (one.shape, tuple((piece.storage, piece.offset, piece.region) for piece in one.pieces))
            owner = first.setdefault(place, name)
            if owner != name:
                found[name] = owner
    return found


def _numbered(
    optimizers: Mapping[Any, _SavedOptimizer], held: Mapping[str, SavedTensor]
) -> dict[tuple[Any, Any], str]:
    """The names of parameters that optimizers number, by optimizer and number."""
    found: dict[tuple[Any, Any], str] = {}
    free = dict.fromkeys(held)
    for optimizer, one in optimizers.items():
        for key in (key for group in one.groups for key in group):
            if isinstance(key, str):
                continue
            shapes = [
                value.shape
                for entry, value in one.states.get(key, {}).items()
                if entry != STEP and isinstance(value, SavedTensor)
            ]
            name = next((name for name in free if held[name].shape in shapes), None)
            if name is not None:
                del free[name]
                found[optimizer, key] = name
    return found


def _is_parameter(name: str, tensor: SavedTensor, trained: set[str]) -> bool:
    """Whether a saved tensor is a parameter, as far as the checkpoint tells; otherwise it is a buffer."""
    if name in trained or _has_runs(tensor):
        return True
    last = name.rpartition(".")[2]
    floating = tensor.dtype.startswith(("float", "bfloat"))
    return floating and (last in _PARAMETERS if trained else last not in _BUFFERS)


def _groups(
    optimizers: Mapping[Any, _SavedOptimizer],
    keys: Mapping[tuple[Any, Any], str],
    aliases: Mapping[str, str],
    parameters: Mapping[str, SavedTensor],
) -> tuple[tuple[str, ...], ...]:
    """The names in the parameter groups of the first optimizer, each once."""
    seen: set[str] = set()
    found = []
    for optimizer, one in list(optimizers.items())[:1]:
        for group in one.groups:
            names = [keys.get((optimizer, key), key) for key in group]
            own = [aliases.get(name, name) for name in names if isinstance(name, str)]
            kept = [name for name in dict.fromkeys(own) if name in parameters and name not in seen]
            seen.update(kept)
            found.append(tuple(kept))
    return tuple(found) if seen else ()


def _partitions(
    groups: tuple[tuple[str, ...], ...], parameters: Mapping[str, SavedTensor], world_size: int
) -> tuple[Mapping[str, Runs], ...]:
    """By rank, the elements of each parameter in the rank's partitions of the groups."""
    found: list[dict[str, Runs]] = [{} for _ in range(world_size)]
    for group in groups:
        partition = padded_partition(sum(parameters[name].numel for name in group), world_size)
        offset = 0
        for name in group:
            numel = parameters[name].numel
            for slot in cut(offset, numel, partition, world_size):
                found[slot.rank][name] = (*found[slot.rank].get(name, ()), slot.run)
            offset += numel
    return tuple(found)
