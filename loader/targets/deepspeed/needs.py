"""Which elements of a ZeRO checkpoint a DeepSpeed engine takes on this rank, known before their files are read.

Never less than what `plan_engine` asks for, and more only where keys are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...saved.intervals import Piece
from ...saved.names import match_names
from ...saved.values import LazyTensor
from ...sources.zero.layout import ZeroCheckpoint
from ...sources.zero.model_states import ModelStates
from .target import EngineTarget


def wanted_slots(
    target: EngineTarget, checkpoint: ZeroCheckpoint, model: ModelStates, rename: Mapping[str, str] | None
) -> dict[str, list[Piece]]:
    """The checkpoint's parameters to the slots of this rank that are filled from what ranks have apart.

    `model` is rank 0's model file; what only the optimizer's files have is wanted too. Parameters that do not fit are
    left out: the plan reports them.
    """
    names = [*target.shapes, *target.aliases, *target.buffers, *target.extra_state]
    in_no_layer = (
        name for name, one in checkpoint.parameters.items() if name not in model.module and not one.frozen
    )
    match = match_names([*model.module, *in_no_layer], names, rename)
    wanted: dict[str, list[Piece]] = {}
    for saved_name, name in match.target_of.items():
        first = target.aliases.get(name, name)
        parameter = checkpoint.find(saved_name)
        if parameter is None or first not in target.shapes or parameter.shape != target.shapes[first]:
            continue
        slots = wanted.setdefault(parameter.name, [])
        slots += [slot for _, slot in target.slots_of.get(first, ())]
        saved = model.module.get(saved_name)
        # In another precision than saved, what the module computes with is cast from the fp32 masters.
        whole = isinstance(saved, LazyTensor) and saved.dtype == target.dtypes[first]
        if checkpoint.partitioned or not whole:
            slots += [low.slot for low in target.low[first]]
    return wanted
