"""Says what a target asks of a checkpoint. A target makes a `Demand`; a source reads it to decide what to open.

Pure. Nothing of a live model is in it: names, shapes, and which elements this rank keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .model_parallel import ExpertLayer, LayerFile, Position
from .regions import Run
from .strided import Box

Shape = tuple[int, ...]


class ParameterDemand(NamedTuple):
    """What this rank keeps of one parameter."""

    shape: Shape
    """Of the whole parameter."""
    dtype: str
    """That the module computes with."""
    updated: tuple[Run, ...] = ()
    """The elements that the optimizer updates on this rank."""
    computed: tuple[Run, ...] = ()
    """The elements that the module computes with on this rank; all of them where it is not partitioned."""


@dataclass(frozen=True)
class ShardDemand:
    """What this rank keeps of one tensor that is spread over a device mesh."""

    shape: Shape
    """Of the whole tensor."""
    box: Box


@dataclass(frozen=True)
class Demand:
    """What a load wants of a checkpoint on this rank, and what a source must know of the job to read it."""

    position: Position
    """This rank's part of the model, and its place among the ranks that partition this part."""
    weights_only: bool = False
    outline: bool = False
    """Whether nothing is restored, and all that is asked for is what the checkpoint holds: names, shapes and settings,
    by as few files as tell it, and whatever job saved it."""
    model: bool = True
    """Whether a model is restored; without one, a file may have other parts alone."""
    optimizer: bool = True
    """Whether optimizers' state is restored. Their fp32 masters are weights, and are with the model."""
    optimizers: tuple[str, ...] = ()
    """Class names of the job's optimizers, in order; files that keep none take these. So with the next two."""
    schedulers: tuple[str, ...] = ()
    scaler: str = "GradScaler"
    engine_scheduler: str | None = None
    """Class name of a DeepSpeed engine's own lr scheduler; None where the target is no engine."""
    layout: Mapping[str, str] = field(default_factory=dict)
    """``LoadOptions.layout``: where a hand-written file has its parts."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """``LoadOptions.rename``."""
    parameters: Mapping[str, ParameterDemand] | None = None
    """By this job's names; None where every rank needs all elements of all of them, or which ones is not known yet."""
    shards: Mapping[str, ShardDemand] = field(default_factory=dict)
    """Of a job without an engine: what this rank keeps of sharded tensors, by this job's names. It keeps all of every
    other one."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names of tied parameters to those in `parameters`."""
    others: tuple[str, ...] = ()
    """Names of buffers and extra state."""
    groups: tuple[tuple[tuple[str, Shape], ...], ...] = ()
    """Name and shape of each parameter in each group of the job's optimizer, in its order."""
    experts: tuple[ExpertLayer, ...] = ()
    """The module's MoE layers."""
    layers: tuple[LayerFile, ...] = ()
    """The layer files of this rank's pipeline stage."""

    @property
    def of_all_ranks(self) -> bool:
        """Whether the files of all saved ranks are read."""
        return not (self.in_parts or self.outline)

    @property
    def in_parts(self) -> bool:
        """Whether it is known which elements this rank keeps: a DeepSpeed engine's."""
        return self.parameters is not None

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the module's state, where they are known."""
        return (*(self.parameters or self.shards), *self.aliases, *self.others)

    @property
    def trained(self) -> frozenset[str]:
        """The parameters that the job's optimizer updates, on this rank or another."""
        return frozenset(name for group in self.groups for name, _ in group)
