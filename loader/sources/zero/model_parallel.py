"""How a model is split over ranks besides data parallelism: pipeline stages and tensor parallelism. Pure.

DeepSpeed numbers the parts of a model (``mp_rank``): a part is what one stage of the pipeline has, or one share of
tensor parallelism, or both together. Each part is saved as if it were a model of its own, in files that carry its
number, and is partitioned over the data-parallel ranks that have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ...errors import LayoutError
from .fields import Field, a_count, a_mapping


@dataclass(frozen=True)
class ParallelLayout:
    """Into what a model is split."""

    parts: int = 1
    """DeepSpeed's ``mp_world_size``."""
    stages: int | None = 1
    """Of the pipeline; None where it is not told."""
    tensor: int | None = 1
    """Ranks that share each tensor; None where it is not told."""
    pipeline: bool = False
    """Whether weights are in a file for each layer of the pipeline, whatever the number of stages."""

    @property
    def split(self) -> bool:
        """Whether there is more than the one part that needs no number."""
        return self.parts > 1 or self.pipeline

    def __str__(self) -> str:
        if not self.split:
            return "neither pipeline stages nor tensor parallelism"
        if self.stages is None or self.tensor is None:
            return f"{self.parts} model-parallel ranks{' of a pipeline' * self.pipeline}"
        return (
            f"{self.stages} pipeline stage{'s' * (self.stages != 1)} and tensor-parallel size {self.tensor}"
        )

    def fits(self, other: ParallelLayout) -> bool:
        """Whether both are split alike, as far as both tell."""
        return (
            self.parts == other.parts
            and self.pipeline == other.pipeline
            and (self.stages == other.stages or None in (self.stages, other.stages))
            and (self.tensor == other.tensor or None in (self.tensor, other.tensor))
        )

    def has_layers_of(self, other: ParallelLayout) -> bool:
        """Whether the layers' files of `other` are those of this one, however many stages share them out."""
        return self.pipeline and other.pipeline and self.tensor == other.tensor == 1


UNSPLIT = ParallelLayout()
"""Of a model that every data-parallel rank has as a whole."""


@dataclass(frozen=True)
class Position:
    """Where a rank stands: which part of the model it has, and its place among those that have the same."""

    rank: int
    """Within the data-parallel group."""
    world_size: int
    """Of the data-parallel group."""
    part: int = 0
    """DeepSpeed's ``mp_rank``."""
    layout: ParallelLayout = UNSPLIT


def saved_layout(tree: Mapping[Any, Any], top: Field) -> ParallelLayout:
    """The layout that a model file tells. Raises `CorruptError` for numbers that cannot be."""
    parts = a_count(tree.get("mp_world_size", 1), top.at("mp_world_size"), least=1)
    pipeline = tree["module"] is None
    place = top.at("checkpoint_parallel_dimensions")
    told = a_mapping(tree.get("checkpoint_parallel_dimensions") or {}, place)
    if not told:
        return ParallelLayout(parts, None if parts > 1 else 1, None if parts > 1 else 1, pipeline)
    stages = a_count(told.get("pp_degree", 1), place.at("pp_degree"), least=1)
    tensor = a_count(told.get("tp_degree", 1), place.at("tp_degree"), least=1)
    return ParallelLayout(parts, stages, tensor, pipeline)


def check_layout(saved: ParallelLayout, file: str, own: ParallelLayout, *, engine: bool) -> None:
    """Raises `LayoutError` where what `file` tells was `saved` under another layout than this job's `own`.

    `engine`: whether this job's model is a DeepSpeed engine.
    """
    if saved.fits(own):
        return
    here = f"this job's engine has {own}" if engine else "this job's model is no DeepSpeed engine"
    raise LayoutError(
        f"{file} was saved with {saved}; {here}. Restore it into an engine of the layout that saved it: only the "
        "data-parallel size may differ",
        path=file,
    )


class _Part(Protocol):
    """What one part's model file tells of all."""

    @property
    def file(self) -> str: ...
    @property
    def layout(self) -> ParallelLayout: ...
    @property
    def world_size(self) -> int: ...
    @property
    def global_steps(self) -> int: ...


def check_model_part(first: _Part, other: _Part) -> None:
    """Raises `LayoutError` where another part's model file does not belong to the `first` one."""
    for name in ("layout", "world_size", "global_steps"):
        expected, got = getattr(first, name), getattr(other, name)
        if got != expected:
            raise LayoutError(
                f"{other.file} and {first.file} differ in their {name} ({got} and {expected}): they were not saved "
                "together",
                path=other.file,
            )
