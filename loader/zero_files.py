"""Names of the files in a DeepSpeed tag folder, derived from rank and stage; nothing is ever listed. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

WHOLE_MODEL_FILE = "mp_rank_00_model_states.pt"
"""The model file of stages 0 to 2: one for all ranks."""

UNIVERSAL_MARKERS = ("zero/optimizer_state.pt",)
"""Files, relative to the tag folder, that tell a universal checkpoint: it has native-looking model files too."""


def model_file(rank: int, *, partitioned: bool) -> str:
    """The model file that saved rank `rank` needs; `partitioned` tells stage 3, where each rank has its own."""
    return f"zero_pp_rank_{rank}_{WHOLE_MODEL_FILE}" if partitioned else WHOLE_MODEL_FILE


@dataclass(frozen=True)
class OptimNaming:
    """How the optimizer files of one checkpoint are spelt."""

    prefix: str = ""
    """``bf16_`` where bf16 was on, else empty."""
    legacy: bool = False
    """Without the underscore before ``optim_states``."""

    def name(self, rank: int) -> str:
        """The optimizer file of saved rank `rank`."""
        joint = "" if self.legacy else "_"
        return f"{self.prefix}zero_pp_rank_{rank}_mp_rank_00{joint}optim_states.pt"


def optim_namings(*, bf16: bool | None = None) -> Iterator[OptimNaming]:
    """The spellings to probe rank 0's optimizer file for, likeliest first; all ranks' files are spelt alike.

    `bf16` is what the model file's configuration says (`ModelStates.bf16`); None where it does not say.
    """
    prefixes = ("", "bf16_") if bf16 is False else ("bf16_", "")
    for legacy in (False, True):
        for prefix in prefixes:
            yield OptimNaming(prefix, legacy)


def files_for_rank(
    stage: int,
    saved_world_size: int,
    rank: int,
    world_size: int,
    *,
    weights_only: bool,
    naming: OptimNaming | None,
    saved_ranks: Collection[int] | None = None,
) -> tuple[str, ...]:
    """Names, relative to the tag folder, of the files that `rank` of `world_size` needs. Rank 0's come first.

    Each rank needs its own model file and rank 0's (one and the same below stage 3), and, unless it restores
    weights only below stage 3, its own optimizer file. `saved_ranks` overrules whose optimizer files: by default
    the own at the same world size, all of them at another. `naming` None is stage 0 or weights only.
    """
    partitioned = stage == 3
    own = min(rank, saved_world_size - 1) if world_size == saved_world_size else rank % saved_world_size
    if saved_ranks is None:
        saved_ranks = (own,) if world_size == saved_world_size else range(saved_world_size)
    needed = sorted(set(saved_ranks))
    models = [0, own, *(needed if partitioned else ())]
    files = [model_file(one, partitioned=partitioned) for one in models]
    if naming is not None and stage and (partitioned or not weights_only):
        files += [naming.name(one) for one in needed]
    return tuple(dict.fromkeys(files))
