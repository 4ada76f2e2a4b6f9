"""Restores into a live DeepSpeed engine: `plan_engine`, then `apply_engine`, then `finish_engine`.

The engine's own tensors are filled in place, straight from the files, so a restore needs no second copy of a
partition. Below stage 3 the ranks of a node read the module's weights once for all (``verify.weights``); at stage 3
each rank casts its shares from its own masters. Only `finish_engine` runs collectives: at stage 3, for persistent
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import CorruptError, LayoutError
from ...materialize.tensors import TensorReader
from ...saved.contents import Contents
from ...saved.values import kind_of
from ...sources.zero.contents import ZeroContents, kept_parts
from ...sources.zero.experts import describe_layers
from ...sources.zero.layout import named_by_optimizer
from ..module import NoteChange
from .apply import fill_tensors, relink, set_engine, set_numbers
from .plan import EnginePlan, plan_model, plan_states
from .target import EngineTarget, engine_target, is_deepspeed_engine

__all__ = [
    "EnginePlan",
    "apply_engine",
    "engine_classes",
    "engine_target",
    "finish_engine",
    "is_deepspeed_engine",
    "name_parameters",
    "plan_engine",
]


_COUNTER_TYPES: dict[str, tuple[type, ...]] = {
    "dynamic_loss_scale": (bool,),
    "overflow": (bool,),
    "clip_grad": (int, float),
    "cur_scale": (int, float),
    "cur_iter": (int,),
    "last_overflow_iter": (int,),
    "scale_factor": (int, float),
    "scale_window": (int,),
}
"""Types of the counters and the like that are set in the engine's optimizer; other types are an error."""


def engine_classes(engine: Any) -> tuple[str, str]:
    """Class names of the engine's optimizer, inside DeepSpeed's, and its learning-rate scheduler, for `zero_tree`."""
    optimizer = getattr(engine, "basic_optimizer", None) or engine.optimizer
    scheduler = getattr(engine, "lr_scheduler", None)
    return (
        type(optimizer).__name__ if optimizer is not None else "optimizer",
        type(scheduler).__name__ if scheduler is not None else "scheduler",
    )


def name_parameters(engine: Any, zero: ZeroContents) -> ZeroContents:
    """`zero` with the names of `engine`'s parameters, by position, where stage 0's files do not name the optimizer's.

    Contents of other stages are returned as they are. Call it before `zero_tree`, so that ``ignore_keys`` sees names.
    Raises `LayoutError` where groups or shapes differ.
    """
    return _named(zero, engine_target(engine))


def _named(zero: ZeroContents, target: EngineTarget) -> ZeroContents:
    optim = zero.any_optim
    if (
        zero.checkpoint.stage
        or optim is None
        or any(not p.frozen for p in zero.checkpoint.parameters.values())
    ):
        return zero
    groups = [[(name, target.shapes[name]) for name in group] for group in target.groups]
    return replace(zero, checkpoint=named_by_optimizer(zero.checkpoint, optim, groups))


def plan_engine(
    engine: Any,
    zero: ZeroContents | None,
    contents: Contents,
    unfiltered: Contents,
    *,
    weights_only: bool,
    rename: Mapping[str, str] | None = None,
) -> EnginePlan:
    """Matches a checkpoint with `engine` and plans which elements go where; changes nothing, and no rank waits.

    What does not fit is in the plan's ``mismatch``, for the caller to raise.

    Args:
        zero: the ZeRO files that this rank has read; None where the checkpoint is a single file, of which an engine
            takes the weights alone.
        contents: the engine's parts of the checkpoint, as ``ignore_keys`` left them.
        unfiltered: the checkpoint's contents before ``ignore_keys``; for ZeRO, what `zero_tree` returned.
        weights_only: plan the module's weights and buffers alone.
        rename: saved name to this job's, before names are matched.

    Raises `LayoutError` where the engine is of a kind that is not supported, or files of a saved rank are missing.
    """
    target = engine_target(engine)
    if zero is not None:
        zero = _named(zero, target)
    elif any(layer.ep_size > 1 for layer in target.experts):
        raise LayoutError(
            f"the engine's experts are spread over ranks ({describe_layers(target.experts)}), and a single file does "
            "not tell which rank's they are: restore it from the folder that DeepSpeed saved"
        )
    elif target.layout.split:
        raise LayoutError(
            f"the engine has {target.layout}, and the checkpoint is a single file of a whole model: it takes none"
        )
    plan = EnginePlan(target, zero, weights_only)
    whole = unfiltered.state.get("model")
    if not isinstance(whole, Mapping):
        plan.mismatch.missing.append("model: the checkpoint has no weights")
        return plan
    kept = contents.state.get("model")
    found = plan_model(plan, whole, kept if isinstance(kept, Mapping) else (), rename)
    if weights_only:
        return plan
    if zero is None:
        plan.not_restored.extend(
            f"state/optimizers/{name}" for name in contents.state.get("optimizers") or {}
        )
        return plan
    wanted = kept_parts({"state": contents.state}, zero)
    optimizer_class, _ = engine_classes(engine)
    plan_states(plan, found, wanted, optimizer_class)
    plan.scheduler = wanted.scheduler
    plan.counters = _checked_counters(wanted.engine, zero, plan)
    return plan


def _checked_counters(saved: Mapping[str, Any], zero: ZeroContents, plan: EnginePlan) -> dict[str, Any]:
    file = zero.model_of(plan.target.rank).file
    for key, kinds in _COUNTER_TYPES.items():
        if key in saved and not isinstance(saved[key], kinds):
            raise CorruptError(
                f"{file}: {key} is a {kind_of(saved[key])}, expected {' or '.join(k.__name__ for k in kinds)}",
                path=file,
            )
    optimizer = plan.target.engine.optimizer
    if saved.get("clip_grad", 0) > 0 and getattr(optimizer, "compute_grad_norm", True) is False:
        plan.mismatch.wrong.append(
            f"engine/clip_grad: the checkpoint clips gradients at {saved['clip_grad']}, which this engine cannot "
            "(zero_optimization.compute_grad_norm is false); leave it out with ignore_keys=['state/engine/clip_grad']"
        )
    return dict(saved)


def apply_engine(plan: EnginePlan, reader: TensorReader, note_change: NoteChange) -> list[str]:
    """Carries out `plan` on this rank; returns what was restored, for the receipt. No rank waits for another.

    The weights in ``plan.shared`` are left out: ``verify.weights`` brings them afterwards. `note_change` is called
    with a part's name before that part is first changed. Raises `CorruptError` where bytes are missing or do not match
    their checksum; by then parts may have been changed.
    """
    target = plan.target
    optimizer = target.engine.optimizer
    if plan.low or plan.shared or plan.masters or plan.buffers or plan.low_from_master or plan.extra_state:
        note_change("model")
    if plan.states or plan.scalars or plan.groups:
        note_change("optimizer")
    # Frees gathered copies of parameters, which would otherwise keep the old values of their shares.
    if target.kind == "zero3":
        optimizer.checkpoint_event_prologue()
    elif hasattr(optimizer, "partition_all_parameters"):
        optimizer.partition_all_parameters()
    fill_tensors(plan, reader)
    set_numbers(plan, reader)
    relink(plan)
    model = {fill.name for _, fill in plan.low}
    model |= {f"model/{name}" for name in (*plan.shared, *(name for name, _ in plan.low_from_master))}
    restored = [f"model ({len(model)} parameters, {len(plan.buffers)} buffers on this rank)"] if model else []
    if plan.masters or plan.master_from_low:
        restored.append("fp32 masters")
    if plan.states:
        restored.append(f"optimizer state ({', '.join(sorted({key for _, key, _ in plan.states}))})")
    if plan.groups:
        restored.append("hyperparameters")
    return restored + set_engine(plan, reader, note_change)


def finish_engine(plan: EnginePlan) -> None:
    """Gathers the parameters that stage 3 keeps whole on every rank.

    Every rank must call it, and only once all have agreed that they applied their plans: these are collectives, the
    only ones of a restore, in which a rank waits for ever for one that failed.
    """
    optimizer = plan.target.engine.optimizer
    _gather_whole(
        [
            one
            for one in getattr(optimizer, "persistent_parameters", ())
            if one.ds_status.name == "NOT_AVAILABLE"
        ]
    )
    if plan.target.kind == "zero3":
        optimizer.checkpoint_event_epilogue()


def _gather_whole(parameters: list[Any]) -> None:
    """Gathers `parameters`: those of one process group in one collective, as DeepSpeed's own forward pass does.

    DeepSpeed's ``all_gather`` of a list starts a collective for each, and before 0.19 waits for the last alone, while
    gloo may end others later. It is used, one by one, for parameters that are quantised or have a secondary partition.
    """
    by_group: dict[int, list[Any]] = {}
    for one in parameters:
        if getattr(one, "ds_secondary_tensor", None) is not None or hasattr(one.ds_tensor, "ds_quant_scale"):
            one.all_gather([one])
        else:
            by_group.setdefault(id(one.ds_process_group), []).append(one)
    for group in by_group.values():
        group[0].all_gather_coalesced(group).wait()
