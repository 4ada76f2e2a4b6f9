"""ZeRO's shards as whole tensors, for a target that is no DeepSpeed engine. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import CorruptError, LayoutError
from .intervals import CoverageError, Piece, Place, intersect
from .monolithic import Contents
from .saved_parts import AssembledTensor, Run
from .values import LazyTensor
from .zero_contents import FROZEN, ShardedTensor, ZeroContents
from .zero_optim_states import MASTER

ENGINE = "engine"
"""The part of a ZeRO checkpoint's state that only a DeepSpeed engine has a place for."""


@dataclass(frozen=True)
class WholeContents:
    """A ZeRO checkpoint's contents in which every tensor is whole to whoever restores it."""

    contents: Contents
    masters: Mapping[int, AssembledTensor] = field(default_factory=dict)
    """``id`` of a low-precision weight in `contents` to its fp32 master, where the optimizer's files were read."""


def whole_contents(zero: ZeroContents, contents: Contents) -> WholeContents:
    """`contents`, or what ``ignore_keys`` left of them, with its shards put together; nothing is read.

    Raises `LayoutError` where a saved rank's file is needed and was not read, `CorruptError` where a parameter's
    pieces are not all of it.
    """
    state = dict(contents.state)
    if isinstance(state.get("model"), Mapping):
        state["model"] = {name: _whole(zero, value) for name, value in state["model"].items()}
    if isinstance(state.get("optimizers"), Mapping):
        state["optimizers"] = {
            name: _optimizer(zero, optimizer) for name, optimizer in state["optimizers"].items()
        }
    return WholeContents(replace(contents, state=state), _masters(zero, state.get("model")))


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
    """Which runs of which files' tensors are all of `sharded`. Raises as `whole_contents` does."""
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


def _masters(zero: ZeroContents, model: Any) -> dict[int, AssembledTensor]:
    """Below stage 3 the weights are saved as the module computed with them, and beside them in fp32."""
    checkpoint = zero.checkpoint
    if checkpoint.partitioned or not checkpoint.stage or not zero.optims or not isinstance(model, Mapping):
        return {}
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
