"""Joins the files that a rank has read into one checkpoint, and gives it as the nested dict of ``ignore_keys``. Pure.

`zero_contents` checks that the files were saved together, `zero_tree` makes the nested dict, in which a partitioned
tensor is a `ShardedTensor`; once ``ignore_keys`` has changed the dict, `kept_parts` says which parts are left in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import LayoutError
from ...saved.intervals import Piece
from ...saved.values import LazyTensor
from .layout import FROZEN_GROUP, ZeroCheckpoint, check_pieces, padded_share, zero_checkpoint
from .model_states import ModelStates, Shape
from .optim_states import MASTER, OptimStates, read_whole_optimizer

FROZEN = "frozen"
"""`ShardedTensor.kind` of a frozen parameter at stage 3: its shares are in the model files."""


@dataclass(frozen=True, slots=True, eq=False)
class ShardedTensor:
    """A tensor that lies in pieces in the files of several saved ranks: where they lie, without their data."""

    name: str
    """The parameter's name in the checkpoint."""
    kind: str
    """``fp32``, a state key of the optimizer, or ``frozen``."""
    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ZeroContents:
    """The layout, and the contents of the files that this rank has read, by saved rank."""

    checkpoint: ZeroCheckpoint
    models: Mapping[int, ModelStates]
    """Below stage 3 only entry 0."""
    optims: Mapping[int, OptimStates]
    """Empty where weights only are wanted below stage 3. At stage 0 entry 0, which comes from the model file."""

    def model_of(self, rank: int) -> ModelStates:
        """The model file from which `rank` restores counters, buffers and client_state: its own, else rank 0's."""
        return self.models.get(rank, self.models[min(self.models)])

    @property
    def any_optim(self) -> OptimStates | None:
        """One of the optimizer files, for what is the same in all of them; None where none was read."""
        return self.optims[min(self.optims)] if self.optims else None

    def tensor(self, kind: str, name: str, piece: Piece) -> LazyTensor | None:
        """The flat tensor that `piece` of parameter `name` lies in; None where that group has no such state.

        Raises `LayoutError` where the file of the piece's rank was not read.
        """
        rank, group = piece.place
        if group == FROZEN_GROUP:
            if rank in self.models:
                return self.models[rank].frozen_fragments.get(name)
        elif rank in self.optims:
            return self.optims[rank].tensors.get(kind, {}).get(group)
        raise LayoutError(
            f"{kind} of {name} lies partly in the files of saved rank {rank}, which were not read"
        )


@dataclass(frozen=True)
class KeptParts:
    """The parts of a `zero_tree` that are left once ``ignore_keys`` has been applied."""

    model: frozenset[str]
    """Names of parameters and buffers."""
    states: frozenset[tuple[str | int, str]]
    """(parameter, key of its state). At stage 0 the parameter may be a number."""
    groups: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Index of the saved parameter group to the hyperparameters that are left."""
    scheduler: Any = None
    engine: dict[str, Any] = field(default_factory=dict)


def zero_contents(
    models: Mapping[int, ModelStates], optims: Mapping[int, OptimStates], *, weights_only: bool
) -> ZeroContents:
    """The checkpoint that the files make, by saved rank; rank 0's model file must be among them.

    Raises `LayoutError` or `CorruptError` where they were not saved together.
    """
    first = models[0]
    if first.param_shapes is None and not weights_only and first.optimizer is not None:
        optims = {0: read_whole_optimizer(first.optimizer, file=first.optimizer_file or first.file)}
    one = optims[min(optims)] if optims else None
    checkpoint = zero_checkpoint(first, one)
    for rank, model in models.items():
        _same(first, model, model.world_size == first.world_size, "world size")
        _same(first, model, model.param_shapes == first.param_shapes, "parameters")
        _same(first, model, model.frozen_shapes == first.frozen_shapes, "frozen parameters")
        _same(first, model, model.global_steps == first.global_steps, "global_steps")
        if checkpoint.partitioned:
            _check_fragments(model, rank, checkpoint.world_size)
    for rank, optim in optims.items():
        if checkpoint.stage:
            other = zero_checkpoint(first, optim)
            _same(first, optim, other.kinds == checkpoint.kinds, "optimizer state")
            _same(first, optim, other.parameters == checkpoint.parameters, "places of parameters")
            _same(first, optim, other.group_ranks == checkpoint.group_ranks, "groups' ranks")
            check_pieces(checkpoint, optim, rank)
    return ZeroContents(checkpoint, dict(models), dict(optims))


def _same(first: ModelStates, other: ModelStates | OptimStates, holds: bool, what: str) -> None:
    if not holds:
        raise LayoutError(
            f"{other.file} and {first.file} differ in their {what}: they were not saved together",
            path=other.file,
        )


def _check_fragments(model: ModelStates, rank: int, world_size: int) -> None:
    """Raises `LayoutError` where saved rank `rank`'s share of a frozen parameter is smaller than the layout needs."""
    for name, tensor in model.frozen_fragments.items():
        shape = model.frozen_shapes.get(name)
        numel = math.prod(shape) if shape is not None else 0
        share = padded_share(numel, world_size)
        if shape is None or tensor.numel < min(share, max(0, numel - rank * share)):
            raise LayoutError(
                f"{model.file}: the share of frozen parameter {name} has shape {tensor.shape}, which does not fit "
                f"the whole's {shape} over {world_size} ranks",
                path=model.file,
            )


def zero_tree(
    contents: ZeroContents,
    *,
    rank: int,
    optimizer_class: str,
    scheduler_class: str,
    weights_only: bool = False,
) -> dict[str, Any]:
    """The nested dict in Composer's layout, plus the caller's client_state at the top level.

    `rank` is this rank's in its data-parallel group. Tensors are `LazyTensor` or `ShardedTensor`. The class names are
    those of the job, since DeepSpeed saves none. Counters, loss scale and the like are in ``state/engine``. With
    `weights_only` there is ``state/model`` alone.
    """
    model = contents.model_of(rank)
    state: dict[str, Any] = {"model": _model(contents, model)}
    if weights_only:
        return {"state": state}
    optim = contents.any_optim
    if optim is not None:
        state["optimizers"] = {optimizer_class: _optimizer(contents, optim)}
    if model.lr_scheduler is not None:
        state["schedulers"] = {scheduler_class: model.lr_scheduler}
    state["engine"] = _engine(model, optim)
    return {**model.client_state, "state": state}


def _model(contents: ZeroContents, model: ModelStates) -> dict[str, Any]:
    checkpoint = contents.checkpoint
    if not checkpoint.partitioned:
        return {**_in_no_layer(contents, model), **model.module}
    found: dict[str, Any] = {}
    for name, value in model.module.items():
        parameter = checkpoint.find(name)
        if parameter is not None:
            kind, dtype = (FROZEN, "") if parameter.frozen else (MASTER, "float32")
            if parameter.frozen:
                fragment = model.frozen_fragments.get(parameter.name)
                dtype = fragment.dtype if fragment is not None else "float32"
            pieces = tuple(checkpoint.pieces(parameter.name))
            found[name] = ShardedTensor(parameter.name, kind, dtype, parameter.shape, pieces)
        elif name in model.buffer_names or not isinstance(value, LazyTensor) or value.numel:
            found[name] = value
        # Left out: the empty tensors of frozen parameters, which DeepSpeed was asked not to save.
    return found


def _in_no_layer(contents: ZeroContents, model: ModelStates) -> dict[str, ShardedTensor]:
    """Parameters of a pipeline that no layer file has; their fp32 masters stand in for them."""
    checkpoint = contents.checkpoint
    if not contents.optims or not checkpoint.stage:
        return {}
    return {
        name: ShardedTensor(name, MASTER, "float32", parameter.shape, tuple(checkpoint.pieces(name)))
        for name, parameter in checkpoint.parameters.items()
        if not parameter.frozen and name not in model.module
    }


def _optimizer(contents: ZeroContents, optim: OptimStates) -> dict[str, Any]:
    checkpoint = contents.checkpoint
    if checkpoint.stage == 0 and all(parameter.frozen for parameter in checkpoint.parameters.values()):
        return _unnamed(optim)
    states: dict[str, dict[str, Any]] = {}
    members: dict[int, list[str]] = {}
    for name, parameter in checkpoint.parameters.items():
        if parameter.frozen:
            continue
        members.setdefault(optim.group_of[parameter.group], []).append(name)
        pieces = tuple(checkpoint.pieces(name))
        entries: dict[str, Any] = {}
        for kind, tensors in optim.tensors.items():
            if kind != MASTER and parameter.group in tensors:
                dtype = tensors[parameter.group].dtype
                entries[kind] = ShardedTensor(name, kind, dtype, parameter.shape, pieces)
        states[name] = {**optim.scalars.get(parameter.group, {}), **entries}
    count = len(optim.groups) if optim.groups is not None else max(members, default=-1) + 1
    groups = [
        {**(optim.groups[index] if optim.groups is not None else {}), "params": members.get(index, [])}
        for index in range(count)
    ]
    return {"state": states, "param_groups": groups}


def _unnamed(optim: OptimStates) -> dict[str, Any]:
    """Stage 0's state as torch saves it, by the parameters' numbers: only the job's optimizer has their names."""
    states: dict[int, dict[str, Any]] = {
        index: dict(optim.scalars.get(index, {})) for index in optim.group_of
    }
    for kind, tensors in optim.tensors.items():
        if kind != MASTER:
            for index, tensor in tensors.items():
                states[index][kind] = tensor
    groups = [
        {**group, "params": [index for index, own in optim.group_of.items() if own == position]}
        for position, group in enumerate(optim.groups or ())
    ]
    return {"state": {index: entries for index, entries in states.items() if entries}, "param_groups": groups}


def _engine(model: ModelStates, optim: OptimStates | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "global_steps": model.global_steps,
        "global_samples": model.global_samples,
        "skipped_steps": model.skipped_steps,
        "data_sampler": model.data_sampler,
        "random_ltd": model.random_ltd,
        **(optim.globals if optim is not None else {}),
    }
    return {key: value for key, value in found.items() if value is not None}


def kept_parts(kept: Mapping[str, Any], contents: ZeroContents) -> KeptParts:
    """The parts that are left in `kept`, which is `zero_tree` of `contents` after ``ignore_keys`` changed it."""
    state = _dict(kept.get("state"))
    optimizer = _dict(next(iter(_dict(state.get("optimizers")).values()), None))
    schedulers = _dict(state.get("schedulers"))
    return KeptParts(
        frozenset(_dict(state.get("model"))),
        frozenset(
            (name, kind) for name, entries in _dict(optimizer.get("state")).items() for kind in _dict(entries)
        ),
        _groups_left(optimizer.get("param_groups"), contents),
        next(iter(schedulers.values()), None),
        dict(_dict(state.get("engine"))),
    )


def _groups_left(kept: Any, contents: ZeroContents) -> dict[int, dict[str, Any]]:
    """Hyperparameters by saved group. A group is identified by its first parameter: ignored ones shift the indices."""
    optim = contents.any_optim
    if optim is None or not isinstance(kept, list):
        return {}
    found = {}
    for group in kept:
        names = _dict(group).get("params")
        if not isinstance(names, list) or not names:
            continue
        flat = names[0]
        if isinstance(flat, str):
            parameter = contents.checkpoint.find(flat)
            flat = parameter.group if parameter is not None else None
        if flat in optim.group_of:
            found[optim.group_of[flat]] = {key: value for key, value in group.items() if key != "params"}
    return found


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
