"""Compares how a model was split over pipeline stages and tensor-parallel ranks with how this job splits it. Pure.

DeepSpeed numbers the parts of a model (``mp_rank``): a part is one pipeline stage, one tensor-parallel share, or one
share of one stage. Each part is saved as if it were a model of its own, in files that carry its number, and is
partitioned over the data-parallel ranks that have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ...errors import CorruptError, LayoutError
from ...saved.model_parallel import ParallelLayout
from .fields import Field, a_count, a_mapping


def saved_layout(tree: Mapping[Any, Any], top: Field) -> ParallelLayout:
    """The layout that a model file records. Raises `CorruptError` for impossible numbers."""
    parts = a_count(tree.get("mp_world_size", 1), top.at("mp_world_size"), least=1)
    pipeline = tree["module"] is None
    place = top.at("checkpoint_parallel_dimensions")
    degrees = a_mapping(tree.get("checkpoint_parallel_dimensions") or {}, place)
    if not degrees:
        return ParallelLayout(parts, None if parts > 1 else 1, None if parts > 1 else 1, pipeline)
    stages = a_count(degrees.get("pp_degree", 1), place.at("pp_degree"), least=1)
    tensor = a_count(degrees.get("tp_degree", 1), place.at("tp_degree"), least=1)
    return ParallelLayout(parts, stages, tensor, pipeline)


def check_layout(saved: ParallelLayout, file: str, own: ParallelLayout, *, engine: bool) -> None:
    """Raises `LayoutError` where the layout `saved`, which `file` records, does not fit this job's `own`.

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
    """What the model files of all parts must agree on (`ModelStates`, which cannot be imported here)."""

    @property
    def file(self) -> str: ...
    @property
    def layout(self) -> ParallelLayout: ...
    @property
    def world_size(self) -> int: ...
    @property
    def global_steps(self) -> int: ...


def check_model_part(first: _Part, other: _Part) -> None:
    """Raises `CorruptError` where another part's model file does not belong to the `first` one."""
    for name in ("layout", "world_size", "global_steps"):
        expected, got = getattr(first, name), getattr(other, name)
        if got != expected:
            raise CorruptError(
                f"{other.file} and {first.file} differ in their {name} ({got} and {expected}): they were not saved "
                "together",
                path=other.file,
            )
