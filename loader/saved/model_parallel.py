"""Says how a model is split over pipeline stages, tensor-parallel ranks and experts, for a checkpoint and a job alike.

Pure. DeepSpeed numbers the parts of a model (``mp_rank``): a part is one pipeline stage, one tensor-parallel share, or
one share of one stage. Each part is saved as if it were a model of its own, and is partitioned over the data-parallel
ranks that have it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..plurals import counted

EXPERTS = ".deepspeed_moe.experts.deepspeed_experts."
"""In parameters' names, what stands between the MoE layer's name and the expert's number."""


@dataclass(frozen=True)
class ParallelLayout:
    """How a model is split into parts."""

    parts: int = 1
    """DeepSpeed's ``mp_world_size``."""
    stages: int | None = 1
    """Of the pipeline; None where the file does not record it."""
    tensor: int | None = 1
    """Ranks that share each tensor; None where the file does not record it."""
    pipeline: bool = False
    """Whether weights are in a file for each layer of the pipeline, whatever the number of stages."""

    @property
    def split(self) -> bool:
        """Whether there are several parts, or a pipeline."""
        return self.parts > 1 or self.pipeline

    def __str__(self) -> str:
        if not self.split:
            return "neither pipeline stages nor tensor parallelism"
        if self.stages is None or self.tensor is None:
            return f"{self.parts} model-parallel ranks{' of a pipeline' * self.pipeline}"
        layers = " (a PipelineModule)" * self.pipeline
        return f"{counted(self.stages, 'pipeline stage')} and tensor-parallel size {self.tensor}{layers}"

    def fits(self, other: ParallelLayout) -> bool:
        """Whether both are split alike; what either does not record counts as equal."""
        return (
            self.parts == other.parts
            and self.pipeline == other.pipeline
            and (self.stages == other.stages or None in (self.stages, other.stages))
            and (self.tensor == other.tensor or None in (self.tensor, other.tensor))
        )

    def has_layers_of(self, other: ParallelLayout) -> bool:
        """Whether the layer files of `other` serve this layout too: both pipelines without tensor parallelism."""
        return self.pipeline and other.pipeline and self.tensor == other.tensor == 1


UNSPLIT = ParallelLayout()
"""The layout of a model that every data-parallel rank has as a whole."""


@dataclass(frozen=True)
class Position:
    """A rank's part of the model, and its place in the data-parallel group that partitions this part."""

    rank: int
    """Within the data-parallel group."""
    world_size: int
    """Of the data-parallel group."""
    part: int = 0
    """DeepSpeed's ``mp_rank``."""
    layout: ParallelLayout = UNSPLIT


@dataclass(frozen=True)
class ExpertLayer:
    """An MoE layer of this job's module, and which of its experts this rank has."""

    name: str
    index: int
    """Its number among the module's MoE layers, as in the files' names."""
    num_experts: int
    """Over all ranks."""
    ep_size: int
    """Ranks that the experts are spread over."""
    ep_rank: int
    """This rank's place among them."""

    @property
    def experts(self) -> range:
        """Numbers, over all ranks, of this rank's experts; its module numbers the same experts from 0 on."""
        count = self.num_experts // self.ep_size
        return range(self.ep_rank * count, (self.ep_rank + 1) * count)


def describe_layers(layers: Iterable[ExpertLayer]) -> str:
    """The MoE layers as messages list them: four at most, and how many more there are."""
    each = [f"{layer.name}: {layer.num_experts} experts, ep_size {layer.ep_size}" for layer in layers]
    return "; ".join(each[:4]) + (f"; and {counted(len(each) - 4, 'more layer')}" if len(each) > 4 else "")


@dataclass(frozen=True)
class LayerFile:
    """A layer file that a pipeline stage reads, and the layer's place in the stage's module."""

    name: str
    """Relative to the tag folder."""
    prefix: str
    """What its names begin with in the stage's module, such as ``3.`` or ``tied_modules.embed.``."""
