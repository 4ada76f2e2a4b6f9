"""Derives the names of the files in a DeepSpeed tag folder from rank and stage; nothing is listed. Pure.

The names are those of DeepSpeed's ``_get_ckpt_name``, ``_get_rank_zero_ckpt_name``, ``_get_expert_ckpt_name`` and
``_get_optimizer_ckpt_name`` (``runtime/engine.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ZERO_FOLDER = "deepspeed"
"""The folder inside Composer's archives that holds these files."""

WHOLE_MODEL_FILE = "mp_rank_00_model_states.pt"
"""The model file of stages 0 to 2: one for all ranks (of a model that is not split)."""


def model_file(rank: int, *, partitioned: bool, part: int = 0) -> str:
    """The model file of saved rank `rank`; each rank has its own where `partitioned` (stage 3).

    `part` is DeepSpeed's ``mp_rank``, where pipeline stages or tensor-parallel ranks split the model.
    """
    name = f"mp_rank_{part:02d}_model_states.pt"
    return f"zero_pp_rank_{rank}_{name}" if partitioned else name


def expert_file(layer: int, expert: int) -> str:
    """The file with the weights of one expert of a mixture of experts.

    `layer` numbers the module's MoE layers, `expert` the layer's experts over all ranks; both from 0.
    """
    return f"layer_{layer}_expert_{expert}_{WHOLE_MODEL_FILE}"


def expert_optim_file(ep_rank: int) -> str:
    """The file with stage 0's optimizer of the ranks that have the same experts.

    `ep_rank` is their rank in the widest expert-parallel group.
    """
    return f"expp_rank_{ep_rank}_mp_rank_00_optim_states.pt"


@dataclass(frozen=True)
class OptimNaming:
    """How the names of one checkpoint's optimizer files are spelt."""

    prefix: str = ""
    """``bf16_`` where bf16 was on, else empty."""
    legacy: bool = False
    """Whether the underscore before ``optim_states`` is missing, as in older DeepSpeed."""

    def name(self, rank: int, part: int = 0) -> str:
        """The optimizer file of saved rank `rank`."""
        joint = "" if self.legacy else "_"
        return f"{self.prefix}zero_pp_rank_{rank}_mp_rank_{part:02d}{joint}optim_states.pt"


def optim_namings(*, bf16: bool | None = None) -> Iterator[OptimNaming]:
    """The spellings to try for rank 0's optimizer file, likeliest first; all ranks' files are spelt alike.

    `bf16` is `ModelStates.bf16`: whether the saved configuration had it on, None where that is not known.
    """
    prefixes = ("", "bf16_") if bf16 is False else ("bf16_", "")
    for legacy in (False, True):
        for prefix in prefixes:
            yield OptimNaming(prefix, legacy)


@dataclass(frozen=True)
class Needed:
    """The files that one rank of a job reads, as saved ranks and as names of those that are not numbered by rank."""

    models: frozenset[int] = frozenset({0})
    """Saved ranks of model files; below stage 3 there is one file, which is rank 0's."""
    optims: frozenset[int] = frozenset()
    """Saved ranks of optimizer files."""
    experts: frozenset[str] = frozenset()
    """Names of experts' files, which are numbered by layer and expert instead of by rank."""
    layers: frozenset[str] = frozenset()
    """Names of the files of a pipeline stage's layers."""

    def __or__(self, other: Needed) -> Needed:
        return Needed(
            self.models | other.models,
            self.optims | other.optims,
            self.experts | other.experts,
            self.layers | other.layers,
        )

    def __sub__(self, other: Needed) -> Needed:
        return Needed(
            self.models - other.models,
            self.optims - other.optims,
            self.experts - other.experts,
            self.layers - other.layers,
        )

    def __bool__(self) -> bool:
        return bool(self.models or self.optims or self.experts or self.layers)

    def files(self, *, partitioned: bool, naming: OptimNaming | None, part: int = 0) -> tuple[str, ...]:
        """The files' names, relative to the tag folder: model files, optimizer files, experts', layers', each in
        order."""
        names = [model_file(rank, partitioned=partitioned, part=part) for rank in sorted(self.models)]
        if naming is not None:
            names += [naming.name(rank, part) for rank in sorted(self.optims)]
        return tuple(dict.fromkeys([*names, *sorted(self.experts), *sorted(self.layers)]))
