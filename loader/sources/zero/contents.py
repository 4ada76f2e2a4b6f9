"""Joins the files that a rank has read into one checkpoint: checks that they were saved together. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import CorruptError, LayoutError
from ...saved.partitions import padded_share
from ...saved.shares import FlatShares
from ...saved.tensor import Piece, SavedTensor
from .layout import SavedParameter, ZeroCheckpoint, check_shares, zero_checkpoint
from .model_states import ModelStates
from .optim_states import OptimStates, read_whole_optimizer


@dataclass(frozen=True)
class LaidOut:
    """A layout, and the files that it was found in."""

    model: ModelStates
    optim: OptimStates
    checkpoint: ZeroCheckpoint


@dataclass(frozen=True)
class ZeroContents:
    """The layout, and the contents of the files that this rank has read, by saved rank."""

    checkpoint: ZeroCheckpoint
    models: Mapping[int, ModelStates]
    """Below stage 3 only entry 0."""
    optims: Mapping[int, OptimStates]
    """Empty where weights only are wanted below stage 3. At stage 0 entry 0, which comes from the model file."""
    flat_shares: dict[tuple[str, int], tuple[FlatShares | None, str]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """Stage 3: kept by `partitioned` for all parameters of a kind and subgroup."""
    rows: dict[tuple[str, int], tuple[str | None, Mapping[int, Piece]]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """Kept by `partitioned` too, for all parameters of a kind and group: the dtype of the ranks' flat tensors, and each
    of those that can be read as it is."""

    def model_of(self, rank: int) -> ModelStates:
        """The model file from which `rank` restores counters, buffers and client_state: its own, else rank 0's."""
        return self.models.get(rank, self.models[min(self.models)])

    @property
    def any_optim(self) -> OptimStates | None:
        """One of the optimizer files, for what is the same in all of them; None where none was read."""
        return self.optims[min(self.optims)] if self.optims else None

    def holders(self, parameter: SavedParameter) -> Mapping[int, ModelStates] | Mapping[int, OptimStates]:
        """The files that were read of the kind that has `parameter`'s elements, by saved rank."""
        return self.models if parameter.frozen else self.optims

    def flat(self, parameter: SavedParameter, kind: str, rank: int) -> SavedTensor | None:
        """The tensor of saved rank `rank`, whose file was read, with its elements; None where it has no such state."""
        if parameter.frozen:
            return self.models[rank].frozen_fragments.get(parameter.name)
        return self.optims[rank].tensors.get(kind, {}).get(parameter.group)


def zero_contents(
    models: Mapping[int, ModelStates],
    optims: Mapping[int, OptimStates],
    *,
    weights_only: bool,
    laid_out: LaidOut | None = None,
) -> ZeroContents:
    """The checkpoint that the files make, by saved rank; rank 0's model file must be among them.

    `laid_out` is what is known of the layout already.

    Raises `CorruptError` where they were not saved together, and as `zero_checkpoint`.
    """
    first = models[0]
    if first.param_shapes is None and not weights_only and first.optimizer is not None:
        optims = {0: read_whole_optimizer(first.optimizer, file=first.optimizer_file or first.file)}
    one = optims[min(optims)] if optims else None
    if laid_out is not None and laid_out.model is first and laid_out.optim is one:
        checkpoint = laid_out.checkpoint
    else:
        checkpoint = zero_checkpoint(first, one)
    for rank, model in models.items():
        if model is first and not checkpoint.partitioned:
            continue
        _same(first, model, model.world_size == first.world_size, "world size")
        _same(first, model, model.param_shapes == first.param_shapes, "parameters")
        _same(first, model, model.frozen_shapes == first.frozen_shapes, "frozen parameters")
        _same(first, model, model.global_steps == first.global_steps, "global_steps")
        if checkpoint.partitioned:
            _check_fragments(model, rank, checkpoint.world_size)
    for optim in optims.values():
        if checkpoint.partitioned:
            # Where the parameters lie does not depend on it.
            check_shares(first, optim, checkpoint.partition_numel)
            _same(first, optim, tuple(optim.tensors) == checkpoint.kinds, "optimizer state")
        elif checkpoint.stage and optim is not one:
            other = zero_checkpoint(first, optim)
            _same(first, optim, other.kinds == checkpoint.kinds, "optimizer state")
            _same(first, optim, other.parameters == checkpoint.parameters, "places of parameters")
            _same(first, optim, other.group_ranks == checkpoint.group_ranks, "groups' ranks")
    return ZeroContents(checkpoint, dict(models), dict(optims))


def _same(first: ModelStates, other: ModelStates | OptimStates, holds: bool, what: str) -> None:
    if not holds:
        raise CorruptError(
            f"{other.file} and {first.file} differ in their {what}: they were not saved together. Take another "
            "checkpoint, or copy the files of one save",
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
