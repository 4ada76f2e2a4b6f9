"""Gives the joined files of a ZeRO checkpoint as `Saved`: its parts under the names that Composer gives them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...formats.pickle.inert import Ordered
from ...plurals import counted
from ...saved.contents import ENGINE, Saved
from ...saved.demand import Demand
from ...saved.model_parallel import Position
from ...saved.names import EXTRA_STATE, match_names
from ...saved.tensor import SavedTensor
from ..single_file import rng_list
from .contents import ZeroContents
from .layout import named_by_optimizer
from .model_states import ModelStates
from .optim_states import MASTER, OptimStates
from .partitioned import FROZEN, all_partitioned, partitioned

Kinds = Mapping[str, SavedTensor]
"""The tensors of one parameter: the fp32 masters and the optimizer's element-wise state."""


def zero_saved(zero: ZeroContents, demand: Demand, *, name: str) -> Saved:
    """The checkpoint `name` in Composer's layout, with the caller's client_state as ``extra``.

    The class names are those of the job, since DeepSpeed saves none. Counters, loss scale and the like are in
    ``state/engine``. With ``demand.weights_only`` there are ``state/model`` and ``extra`` alone.

    Stage 0 keeps the optimizer's parameters by position. Where ``demand.in_parts``, they get the checkpoint's names
    for those in ``demand.groups``; else they keep their numbers, as torch saves them, and the masters have no names.

    Raises `CorruptError` where the layout or a file's tensor does not hold all of a parameter's elements, and
    `LayoutError` where stage 0's groups are others than the job's.
    """
    if demand.in_parts:
        zero = _named(zero, demand)
    position, checkpoint = demand.position, zero.checkpoint
    model = zero.model_of(position.rank)
    made = _partitioned(zero, weights_only=demand.weights_only)
    state: dict[str, Any] = {"model": _model(zero, model, made)}
    extra = dict(model.client_state)
    rng = rng_list(extra.get("rng"))
    if rng is not None:
        del extra["rng"]
    if demand.weights_only:
        rng = None
    else:
        state.update(_training_state(zero, model, made, demand))
    return Saved(
        name,
        "deepspeed",
        "deepspeed",
        state,
        rng,
        extra,
        world_size=model.world_size * model.layout.parts,
        data_parallel_size=checkpoint.world_size,
        global_steps=model.global_steps,
        batch_size=model.batch_size,
        zero_stage=checkpoint.stage,
        masters=_masters(zero, state["model"], made),
        unnamed_masters=_unnamed_masters(zero),
        aliases=checkpoint.aliases,
        engine_schedulers=frozenset(state.get("schedulers", ())),
        rng_per_rank=checkpoint.partitioned or position.layout.split,
        # Below stage 3, DeepSpeed kept only the first data-parallel rank's, for each part of the model.
        own_rng=position.rank < (checkpoint.world_size if checkpoint.partitioned else 1),
        notes=() if demand.outline else _notes(zero, position),
    )


def _named(zero: ZeroContents, demand: Demand) -> ZeroContents:
    """`zero` with names where stage 0's files do not name the optimizer's parameters.

    Those are the checkpoint's names for the parameters in ``demand.groups``; the job's, where it has none.
    """
    optim = zero.any_optim
    if zero.checkpoint.stage or optim is None:
        return zero
    if not demand.optimizer and MASTER not in optim.tensors:
        return zero  # nothing of it is restored, so that its groups need not be this job's
    saved = zero.model_of(demand.position.rank).module
    target_of = match_names(saved, demand.names, demand.rename).target_of
    saved_of = {new: old for old, new in target_of.items()}
    saved_name: dict[str, str] = {}
    for name in demand.names:
        if name in saved_of:
            old = zero.checkpoint.aliases.get(saved_of[name], saved_of[name])
            saved_name.setdefault(demand.aliases.get(name, name), old)
    groups = [[(saved_name.get(name, name), shape) for name, shape in group] for group in demand.groups]
    return replace(zero, checkpoint=named_by_optimizer(zero.checkpoint, optim, groups))


def _partitioned(zero: ZeroContents, *, weights_only: bool) -> dict[str, Kinds]:
    """The tensors of each parameter that the optimizer updates, by its name; none where its files were not read."""
    if not zero.optims:
        return {}
    return all_partitioned(zero, (MASTER,) if weights_only else zero.checkpoint.kinds)


def _model(zero: ZeroContents, model: ModelStates, made: Mapping[str, Kinds]) -> dict[str, Any]:
    """The module's state; the versions of its submodules come along, by which their own loading may go."""
    found = Ordered(_named_model(zero, model, made))
    if model.versions is not None:
        found._metadata = model.versions
    return found


def _named_model(zero: ZeroContents, model: ModelStates, made: Mapping[str, Kinds]) -> dict[str, Any]:
    checkpoint = zero.checkpoint
    if not checkpoint.partitioned:
        # Parameters of a pipeline that no layer file has come first; their fp32 masters stand in for them.
        others = {
            name: kinds for name, kinds in made.items() if checkpoint.stage and name not in model.module
        }
        return {**{name: kinds[MASTER] for name, kinds in others.items()}, **model.module}
    found: dict[str, Any] = {}
    for name, value in model.module.items():
        parameter = checkpoint.find(name)
        if parameter is not None:
            kinds = partitioned(zero, parameter, [FROZEN]) if parameter.frozen else made[parameter.name]
            found[name] = kinds[FROZEN if parameter.frozen else MASTER]
        elif name in model.buffer_names or not _is_empty(name, value):
            found[name] = value
        # Left out: the empty tensors of frozen parameters, which DeepSpeed was asked not to save.
    return found


def _is_empty(name: str, value: Any) -> bool:
    """Whether `value` is a tensor without elements, and no extra state, which may be one."""
    return isinstance(value, SavedTensor) and not value.numel and name.rpartition(".")[2] != EXTRA_STATE


def _masters(
    zero: ZeroContents, model: Mapping[str, Any], made: Mapping[str, Kinds]
) -> dict[str, SavedTensor]:
    """The fp32 master of each saved weight that has one, by its names in the saved `model`."""
    aliases = zero.checkpoint.aliases
    found: dict[str, SavedTensor] = {}
    for name, value in model.items():
        master = made.get(aliases.get(name, name), {}).get(MASTER)
        if master is not None and isinstance(value, SavedTensor) and value.shape == master.shape:
            found[name] = master
    return found


def _unnamed_masters(zero: ZeroContents) -> tuple[tuple[SavedTensor, ...], ...]:
    """Stage 0: the masters in the order of the optimizer's groups, where its parameters have no names."""
    optim = zero.any_optim
    if zero.checkpoint.stage or optim is None or MASTER not in optim.tensors:
        return ()
    if any(not parameter.frozen for parameter in zero.checkpoint.parameters.values()):
        return ()
    masters, group_of = optim.tensors[MASTER], optim.group_of
    count = max(group_of.values(), default=-1) + 1
    return tuple(
        tuple(masters[index] for index in sorted(group_of) if group_of[index] == group)
        for group in range(count)
    )


def _training_state(
    zero: ZeroContents, model: ModelStates, made: Mapping[str, Kinds], demand: Demand
) -> dict[str, Any]:
    optim = zero.any_optim
    state: dict[str, Any] = {}
    if optim is not None:
        state["optimizers"] = {next(iter(demand.optimizers), "Optimizer"): _optimizer(zero, optim, made)}
    if model.lr_scheduler is not None:
        state["schedulers"] = {_scheduler_class(demand): model.lr_scheduler}
    state[ENGINE] = _engine(model, optim)
    return state


def _optimizer(zero: ZeroContents, optim: OptimStates, made: Mapping[str, Kinds]) -> dict[str, Any]:
    checkpoint = zero.checkpoint
    if not checkpoint.stage and not made:
        return _unnamed(optim)
    states: dict[str, dict[str, Any]] = {}
    members: dict[int, list[str]] = {}
    for name, kinds in made.items():
        group = checkpoint.parameters[name].group
        members.setdefault(optim.group_of[group], []).append(name)
        scalars = optim.scalars.get(group, {})
        states[name] = state = {**scalars, **kinds}
        if MASTER in scalars:
            state[MASTER] = scalars[MASTER]
        else:
            state.pop(MASTER, None)
    count = len(optim.groups) if optim.groups is not None else max(members, default=-1) + 1
    groups = [
        {**(optim.groups[index] if optim.groups is not None else {}), "params": members.get(index, [])}
        for index in range(count)
    ]
    return {"state": states, "param_groups": groups}


def _unnamed(optim: OptimStates) -> dict[str, Any]:
    """Stage 0's state as torch saves it, by the parameters' numbers: only the job's optimizer has their names."""
    states: dict[int, dict[str, Any]] = {
        index: dict(optim.scalars.get(index, {})) for index in optim.group_of
    }
    for kind, tensors in optim.tensors.items():
        if kind != MASTER:
            for index, tensor in tensors.items():
                states[index][kind] = tensor
    groups = [
        {**group, "params": [index for index, own in optim.group_of.items() if own == position]}
        for position, group in enumerate(optim.groups or ())
    ]
    return {"state": {index: entries for index, entries in states.items() if entries}, "param_groups": groups}


def _engine(model: ModelStates, optim: OptimStates | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "global_steps": model.global_steps,
        "global_samples": model.global_samples,
        "skipped_steps": model.skipped_steps,
        "data_sampler": model.data_sampler,
        "random_ltd": model.random_ltd,
        **(optim.globals if optim is not None else {}),
    }
    return {key: value for key, value in found.items() if value is not None}


def _notes(zero: ZeroContents, position: Position) -> tuple[str, ...]:
    """Sentences for the receipt."""
    notes = []
    if position.layout.split:
        notes.append(f"each rank restores its own part of the model: {position.layout}")
    saved, here = zero.checkpoint.world_size, position.world_size
    if zero.optims and zero.checkpoint.stage and saved != here:
        notes.append(f"resharded from {counted(saved, 'rank')} to {counted(here, 'rank')}")
    return tuple(notes)


def _scheduler_class(demand: Demand) -> str:
    return demand.engine_scheduler or next(iter(demand.schedulers), "Scheduler")
