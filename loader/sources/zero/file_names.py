"""Names of the files in a DeepSpeed tag folder, derived from rank and stage; nothing is ever listed. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

WHOLE_MODEL_FILE = "mp_rank_00_model_states.pt"
"""The model file of stages 0 to 2: one for all ranks (of a model that is not split)."""


def model_file(rank: int, *, partitioned: bool, part: int = 0) -> str:
    """The model file that saved rank `rank` needs; `partitioned` tells stage 3, where each rank has its own.

    `part` is that of a model which is split over pipeline stages or tensor-parallel ranks (``mp_rank``).
    """
    name = f"mp_rank_{part:02d}_model_states.pt"
    return f"zero_pp_rank_{rank}_{name}" if partitioned else name


def expert_file(layer: int, expert: int) -> str:
    """The weights of one expert of a mixture of experts.

    `layer` counts the module's MoE layers, `expert` the layer's experts, over all ranks.
    """
    return f"layer_{layer}_expert_{expert}_{WHOLE_MODEL_FILE}"


def expert_optim_file(ep_rank: int) -> str:
    """Stage 0's optimizer of the ranks that have the same experts; `ep_rank` within the widest expert group."""
    return f"expp_rank_{ep_rank}_mp_rank_00_optim_states.pt"


@dataclass(frozen=True)
class OptimNaming:
    """How the optimizer files of one checkpoint are spelt."""

    prefix: str = ""
    """``bf16_`` where bf16 was on, else empty."""
    legacy: bool = False
    """Without the underscore before ``optim_states``."""

    def name(self, rank: int, part: int = 0) -> str:
        """The optimizer file of saved rank `rank`."""
        joint = "" if self.legacy else "_"
        return f"{self.prefix}zero_pp_rank_{rank}_mp_rank_{part:02d}{joint}optim_states.pt"


def optim_namings(*, bf16: bool | None = None) -> Iterator[OptimNaming]:
    """The spellings to probe rank 0's optimizer file for, likeliest first; all ranks' files are spelt alike.

    `bf16` is what the model file's configuration says (`ModelStates.bf16`); None where it does not say.
    """
    prefixes = ("", "bf16_") if bf16 is False else ("bf16_", "")
    for legacy in (False, True):
        for prefix in prefixes:
            yield OptimNaming(prefix, legacy)


@dataclass(frozen=True)
class Needed:
    """Saved ranks whose files one rank of a job reads."""

    models: frozenset[int] = frozenset({0})
    """Of the model files; below stage 3 there is one, which is rank 0's."""
    optims: frozenset[int] = frozenset()
    experts: frozenset[str] = frozenset()
    """Names of experts' files, which go by layer and expert."""

    def __or__(self, other: Needed) -> Needed:
        return Needed(self.models | other.models, self.optims | other.optims, self.experts | other.experts)

    def __sub__(self, other: Needed) -> Needed:
        return Needed(self.models - other.models, self.optims - other.optims, self.experts - other.experts)

    def __bool__(self) -> bool:
        return bool(self.models or self.optims or self.experts)

    def files(self, *, partitioned: bool, naming: OptimNaming | None, part: int = 0) -> tuple[str, ...]:
        """Names, relative to the tag folder; models first, in the order of ranks."""
        names = [model_file(rank, partitioned=partitioned, part=part) for rank in sorted(self.models)]
        if naming is not None:
            names += [naming.name(rank, part) for rank in sorted(self.optims)]
        return tuple(dict.fromkeys([*names, *sorted(self.experts)]))
