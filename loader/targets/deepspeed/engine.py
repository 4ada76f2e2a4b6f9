"""Restores into a live DeepSpeed engine: `EngineTarget` is the target for it.

The engine's own tensors are filled in place, straight from the files, so a restore needs no second copy of a
partition. Below stage 3 the ranks of a node read the module's weights once for all (`shared_weights`); at stage 3 each
rank casts its shares from its own masters. Only the plan's ``finish`` runs collectives: at stage 3, for persistent
parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property, partial
from typing import Any

from ....distributed.printable import warn
from ...errors import CorruptError, LayoutError
from ...saved.contents import ENGINE, Saved
from ...saved.demand import Demand, ParameterDemand
from ...saved.mismatch import Mismatch
from ...saved.model_parallel import describe_layers
from ...saved.values import InertObject, kind_of
from ..base import Plan, RestoreOptions
from ..optimizer_kinds import warn_of_state
from ..parts import lacking_parts, missing_part
from .live import LiveEngine, is_deepspeed_engine, live_engine
from .named_optimizer import name_optimizer
from .parallel import is_pipeline, layer_files
from .plan import ModelPart, plan_model
from .states import OptimizerPart, lacks_learning_rates, plan_states
from .step import EnginePart, EngineStep, objects_of

__all__ = ["EngineTarget", "engine_classes", "is_deepspeed_engine"]

_DYNAMIC = "DynamicLossScaler"
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


class EngineTarget:
    """A DeepSpeed engine, with its optimizer and its lr scheduler."""

    def __init__(self, engine: Any, options: RestoreOptions) -> None:
        self._engine = engine
        self._options = options

    @cached_property
    def _live(self) -> LiveEngine:
        return live_engine(self._engine)

    def demand(self, rank: int, world_size: int) -> Demand:
        """What this rank keeps of each parameter, from the engine's attributes; no rank waits for another.

        The engine itself knows its place among the ranks. Raises as `live_engine`.
        """
        live, options = self._live, self._options
        optimizer, scheduler = engine_classes(self._engine)
        dtypes, slots_of, low = live.dtypes, live.slots_of, live.low
        return Demand(
            live.position,
            weights_only=options.weights_only,
            optimizer="optimizers" not in options.leave_out,
            optimizers=(optimizer,),
            schedulers=(scheduler,),
            engine_scheduler=scheduler,
            layout=options.layout,
            rename=options.rename,
            parameters={
                name: ParameterDemand(
                    shape,
                    dtypes[name],
                    tuple([slot.run for _, slot in slots_of.get(name, ())]),
                    tuple([one.slot.run for one in low[name]]),
                )
                for name, shape in live.shapes.items()
            },
            aliases=live.aliases,
            others=(*live.buffers, *live.extra_state),
            groups=tuple(tuple((name, live.shapes[name]) for name in group) for group in live.groups),
            experts=live.experts,
            layers=layer_files(self._engine.module) if is_pipeline(self._engine.module) else (),
        )

    def plan(self, saved: Saved) -> Plan:
        """Matches the engine's parts of `saved` with it and plans which elements go where; changes nothing.

        Of a checkpoint that no engine saved, DeepSpeed's counters and loss scale stay as they are here. What does not
        fit is in the plan's ``mismatch``. Raises `LayoutError` where files are missing, or a whole model does not tell
        which part of it is this rank's; `CorruptError` where a counter is of another type than DeepSpeed's.
        """
        live, options = self._live, self._options
        by_deepspeed = saved.data_parallel_size is not None
        if not by_deepspeed:
            _refuse_parts(live)
        model = plan_model(live, saved, options.rename, options.readable)
        step = EngineStep(live, saved, model)
        mismatch = Mismatch()
        mismatch.extend(model.mismatch)
        not_restored: tuple[str, ...] = ()
        notes: tuple[str, ...] = ()
        if not options.weights_only and model.found:
            named, optimizer = self._plan_optimizer(saved, model, by_deepspeed=by_deepspeed)
            mismatch.extend(optimizer.mismatch)
            own_rates = options.hyperparameters == "job"
            step = EngineStep(live, named, model, optimizer, _plan_engine(live, named, mismatch, own_rates))
            notes = optimizer.notes
            if by_deepspeed:
                lacking, not_restored = _without_counterpart(live, saved, options.leave_out)
                mismatch.missing += lacking
                if lacking and not options.strict:
                    warn(lacking_parts(saved.name, lacking), stacklevel=2)
            not_restored += self._optimizers_left(saved, named, optimizer)
            for note in notes:
                warn(f"{saved.name}: {note}", stacklevel=2)
            if not by_deepspeed:
                notes += (
                    "it has no engine's counters, such as global_steps: this engine's stay as they are",
                )
        return Plan(
            (step,),
            mismatch,
            model.renamed,
            model.cast,
            not_restored=not_restored,
            notes=notes,
            finish=partial(finish_engine, live),
        )

    def _plan_optimizer(
        self, saved: Saved, model: ModelPart, *, by_deepspeed: bool
    ) -> tuple[Saved, OptimizerPart]:
        """What the engine's optimizer gets, and `saved` with the one state that is for it."""
        live, options = self._live, self._options
        if "optimizers" in options.leave_out:
            return saved, OptimizerPart()
        if live.optimizer is None:
            return saved, OptimizerPart(refused=True)
        name = engine_classes(self._engine)[0]
        if by_deepspeed:
            return saved, plan_states(live, saved, model, name, options.hyperparameters, options.readable)
        named, unnamed = name_optimizer(live, saved, model, name, options.rename)
        if unnamed.missing or unnamed.wrong:
            return named, OptimizerPart(refused=True, mismatch=unnamed)
        part = plan_states(live, named, model, name, options.hyperparameters, options.readable)
        part.mismatch.extend(unnamed)
        return named, part

    def _optimizers_left(self, saved: Saved, named: Saved, planned: OptimizerPart) -> tuple[str, ...]:
        """The checkpoint's optimizers that are not restored; warns of them where no error will tell."""
        kept = saved.state.get("optimizers") or {}
        taken = () if planned.refused else named.state.get("optimizers") or {}
        left = [name for name in kept if name not in taken]
        if planned.mismatch.missing and planned.refused:
            if not self._options.strict:
                warn(f"{saved.name}: {planned.mismatch.missing[0]}", stacklevel=2)
        else:
            own = () if self._live.optimizer is None else engine_classes(self._engine)[:1]
            warn_of_state([name for name in left if kept[name]], own, saved.name)
        return tuple(f"state/optimizers/{name}" for name in left)


def engine_classes(engine: Any) -> tuple[str, str]:
    """Class names of the engine's optimizer, inside DeepSpeed's, and of its learning-rate scheduler."""
    optimizer = getattr(engine, "basic_optimizer", None) or engine.optimizer
    scheduler = getattr(engine, "lr_scheduler", None)
    return (
        type(optimizer).__name__ if optimizer is not None else "optimizer",
        type(scheduler).__name__ if scheduler is not None else "scheduler",
    )


def _refuse_parts(live: LiveEngine) -> None:
    """Raises `LayoutError` for an engine that has a part of the model, which a checkpoint of a whole one does
    not tell."""
    if any(layer.ep_size > 1 for layer in live.experts):
        raise LayoutError(
            f"the engine's experts are spread over ranks ({describe_layers(live.experts)}), and a checkpoint "
            "that no engine saved does not tell which rank's they are: restore it from the folder that DeepSpeed saved"
        )
    if live.position.layout.split:
        raise LayoutError(
            f"the engine has {live.position.layout}, and the checkpoint has a whole model, which cannot be restored "
            "into a part of one"
        )


def _plan_engine(live: LiveEngine, saved: Saved, mismatch: Mismatch, own_rates: bool) -> EnginePart:
    """Plans counters, loss scaler and schedulers; with `own_rates` the groups keep their learning rates.

    Raises `CorruptError` where a counter has another type.
    """
    counters = saved.state.get(ENGINE)
    counters = dict(counters) if isinstance(counters, Mapping) else {}
    for key, kinds in _COUNTER_TYPES.items():
        if key in counters and not isinstance(counters[key], kinds):
            raise CorruptError(
                f"{saved.name}: {key} is a {kind_of(counters[key])}, expected "
                f"{' or '.join(kind.__name__ for kind in kinds)}",
                path=saved.name,
            )
    if (
        counters.get("clip_grad", 0) > 0
        and getattr(live.engine.optimizer, "compute_grad_norm", True) is False
    ):
        mismatch.wrong.append(
            f"engine/clip_grad: the checkpoint clips gradients at {counters['clip_grad']}, which this engine cannot "
            "(zero_optimization.compute_grad_norm is false); leave it out with ignore_keys=['state/engine/clip_grad']"
        )
    schedulers = saved.state.get("schedulers")
    own = (
        []
        if not isinstance(schedulers, Mapping)
        else [schedulers[key] for key in schedulers if key in saved.engine_schedulers]
    )
    takes_state = callable(getattr(getattr(live.engine, "lr_scheduler", None), "load_state_dict", None))
    return EnginePart(
        counters,
        {key: counters[key] for key in objects_of(live.engine) if key in counters},
        next(iter(own), None) if takes_state else None,
        not own_rates and lacks_learning_rates(saved),
    )


def _without_counterpart(
    live: LiveEngine, saved: Saved, leave_out: Collection[str]
) -> tuple[list[str], tuple[str, ...]]:
    """The loss scaler and objects that the engine has and the checkpoint lacks, and those of the checkpoint that this
    engine has no place for; warns of the latter."""
    whole, left = saved.whole.state.get(ENGINE), saved.state.get(ENGINE)
    known: Mapping[str, Any] = whole if isinstance(whole, Mapping) else {}
    kept: Mapping[str, Any] = left if isinstance(left, Mapping) else {}
    own = objects_of(live.engine)
    lacking = [missing_part(f"engine/{key}", ()) for key in own if key not in known]
    found = [key for key in ("random_ltd", "data_sampler") if key in kept and key not in own]
    scaler = known.get("loss_scaler")
    theirs = scaler.global_name.rpartition(".")[2] if isinstance(scaler, InertObject) else "none"
    mine = type(getattr(live.engine.optimizer, "loss_scaler", None)).__name__
    if live.kind != "unfused" and mine != theirs and "scaler" not in leave_out:
        # A scaler that is not dynamic holds nothing that is learned.
        if mine == _DYNAMIC:
            lacking.append(f"engine/loss_scaler {mine}: the checkpoint has {theirs}")
        if theirs == _DYNAMIC and "loss_scaler" in kept:
            found.append("loss_scaler")
    if found:
        warn(
            f"{saved.name} holds {', '.join(f'state/{ENGINE}/{key}' for key in found)}, for which this engine has no "
            "counterpart; it is not restored",
            stacklevel=2,
        )
    return lacking, tuple(f"state/{ENGINE}/{key}" for key in found)


def finish_engine(live: LiveEngine) -> None:
    """Gathers the parameters that stage 3 keeps whole on every rank.

    Every rank must call it, and only once all have agreed that they applied their plans: these are collectives, the
    only ones of a restore, in which a rank waits for ever for one that failed.
    """
    optimizer = live.engine.optimizer
    _gather_whole(
        [
            one
            for one in getattr(optimizer, "persistent_parameters", ())
            if one.ds_status.name == "NOT_AVAILABLE"
        ]
    )
    if live.kind == "zero3":
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
