"""Puts ZeRO's shards together to whole tensors, for a target that is no DeepSpeed engine. Pure.

Nothing is read: an `AssembledTensor` lists which elements of which files' tensors make it up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import CorruptError, LayoutError
from ...saved.assembled import AssembledTensor, Run, SavedTensor
from ...saved.contents import Contents
from ...saved.intervals import CoverageError, Piece, Place, intersect
from ...saved.names import match_names
from ...saved.values import LazyTensor
from .contents import FROZEN, ShardedTensor, ZeroContents
from .layout import named_by_optimizer
from .model_states import Shape
from .optim_states import MASTER

ENGINE = "engine"
"""The part of a ZeRO checkpoint's state that only a DeepSpeed engine can take."""

Groups = Sequence[Sequence[tuple[str, Shape]]]
"""For each of an optimizer's groups, the name and shape of each parameter."""


@dataclass(frozen=True)
class WholeContents:
    """A ZeRO checkpoint's contents in which every tensor is whole."""

    contents: Contents
    masters: Mapping[int, SavedTensor] = field(default_factory=dict)
    """``id`` of a low-precision weight in `contents` to its fp32 master, where the optimizer's files were read."""


def whole_contents(zero: ZeroContents, contents: Contents, groups: Groups = ()) -> WholeContents:
    """`contents`, as they are or as ``ignore_keys`` left them, with every `ShardedTensor` as an `AssembledTensor`.

    `groups` are this job's; they name the masters of stage 0, which are saved in the optimizer's order without names.

    Raises `LayoutError` where a saved rank's file is needed and was not read, or stage 0's groups are others than
    `groups`; `CorruptError` where a parameter's pieces do not cover it, or a tensor is shorter than its pieces.
    """
    state = dict(contents.state)
    if isinstance(state.get("model"), Mapping):
        state["model"] = {name: _whole(zero, value) for name, value in state["model"].items()}
    if isinstance(state.get("optimizers"), Mapping):
        state["optimizers"] = {
            name: _optimizer(zero, optimizer) for name, optimizer in state["optimizers"].items()
        }
    model = state.get("model")
    if not isinstance(model, Mapping) or zero.checkpoint.partitioned or not zero.optims:
        masters: Mapping[int, SavedTensor] = {}
    else:
        masters = (
            _masters(zero, model) if zero.checkpoint.stage else _masters_by_position(zero, model, groups)
        )
    return WholeContents(replace(contents, state=state), masters)


def _optimizer(zero: ZeroContents, optimizer: Any) -> Any:
    if not isinstance(optimizer, Mapping) or not isinstance(optimizer.get("state"), Mapping):
        return optimizer
    states = {
        name: {key: _whole(zero, value) for key, value in entries.items()}
        if isinstance(entries, Mapping)
        else entries
        for name, entries in optimizer["state"].items()
    }
    return {**optimizer, "state": states}


def _whole(zero: ZeroContents, value: Any) -> Any:
    return assemble(zero, value) if isinstance(value, ShardedTensor) else value


def assemble(zero: ZeroContents, sharded: ShardedTensor) -> AssembledTensor:
    """The whole tensor as runs of the files' flat tensors, in the order of its elements. Raises as `whole_contents`."""
    numel = math.prod(sharded.shape)
    try:
        copies = intersect(sharded.pieces, [Piece(Place(0, 0), 0, 0, numel)])
    except CoverageError as error:
        raise CorruptError(f"{sharded.kind} of {sharded.name}: {error}") from error
    runs = []
    for copy in copies:
        piece = Piece(copy.source, copy.source_start, copy.target_start, copy.length)
        tensor = zero.tensor(sharded.kind, sharded.name, piece)
        what = "share" if sharded.kind == FROZEN else sharded.kind
        if tensor is None:
            raise LayoutError(f"saved rank {copy.source.rank} has no {what} of {sharded.name}")
        if len(tensor.shape) != 1:
            raise CorruptError(
                f"saved rank {copy.source.rank}: the tensor with the {what} of {sharded.name} has shape "
                f"{tensor.shape}, expected one dimension"
            )
        if tensor.numel < copy.source_start + copy.length:
            raise CorruptError(
                f"saved rank {copy.source.rank}: the tensor with the {what} of {sharded.name} has {tensor.numel} "
                f"elements, expected at least {copy.source_start + copy.length}"
            )
        runs.append(Run(tensor, copy.source_start, copy.target_start, copy.length))
    return AssembledTensor(sharded.name, sharded.dtype, sharded.shape, tuple(runs))


def _masters(zero: ZeroContents, model: Mapping[str, Any]) -> dict[int, AssembledTensor]:
    """Stages 1 and 2: the fp32 master of each weight that the model file has in the module's lower precision."""
    checkpoint = zero.checkpoint
    saved_name = {id(value): name for name, value in zero.model_of(0).module.items()}
    found: dict[int, AssembledTensor] = {}
    for value in model.values():
        parameter = checkpoint.find(saved_name.get(id(value), ""))
        if parameter is None or parameter.frozen or not isinstance(value, LazyTensor):
            continue
        if value.dtype != "float32" and value.shape == parameter.shape:
            pieces = tuple(checkpoint.pieces(parameter.name))
            sharded = ShardedTensor(parameter.name, MASTER, "float32", parameter.shape, pieces)
            found[id(value)] = assemble(zero, sharded)
    return found


def _masters_by_position(
    zero: ZeroContents, model: Mapping[str, Any], groups: Groups
) -> dict[int, LazyTensor]:
    """Stage 0: the fp32 master of each such weight; they are matched by position in the job's optimizer."""
    optim = zero.any_optim
    if optim is None or MASTER not in optim.tensors or not groups:
        return {}
    named = named_by_optimizer(zero.checkpoint, optim, groups).parameters
    target_of = match_names(model, named).target_of
    found: dict[int, LazyTensor] = {}
    for name, value in model.items():
        parameter = named.get(target_of.get(name, ""))
        if parameter is None or parameter.frozen or not isinstance(value, LazyTensor):
            continue
        if value.dtype != "float32" and value.shape == parameter.shape:
            found[id(value)] = optim.tensors[MASTER][parameter.group]
    return found
