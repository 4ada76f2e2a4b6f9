"""Restores a torch optimizer: matches the saved state to this job's parameters, then hands it to ``load_state_dict``.

`plan_optimizer` checks and changes nothing; its `OptimizerStep` reads the tensors and changes the optimizer. State that
lies element by element along a parameter is read into memory like the parameter's, so a DTensor's state has its
placements; everything else, such as ``step``, is made as it was saved.

One file: the plan and its step decide by the same few functions what becomes of each entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...distributed.printable import warn
from ..plurals import counted
from ..saved.contents import ENGINE, Saved
from ..saved.copies import Copy, Memory, copies_into
from ..saved.mismatch import Mismatch
from ..saved.names import match_names
from ..saved.regions import row_major_stride
from ..saved.tensor import SavedTensor, of_one_element
from ..saved.tree import join_path
from ..saved.values import InertTensor, kind_of
from ..state import as_list, by_class_name
from .base import Change, Plan, RestoreOptions, Work
from .dtensor import is_dtensor, kept_part, local_part, shape_of
from .module import parameter_names
from .optimizer_entries import (
    Own,
    Zeros,
    cast_of,
    dtype_along,
    lies_along,
    new_tensor,
    shape_problem,
    standing_alone,
)
from .optimizer_kinds import (
    STEP,
    class_note,
    kind_problem,
    lacking_state,
    merged_groups,
    sources_of,
    taken,
    uneven_groups,
    value_problems,
    warn_of_state,
)
from .optimizer_names import matched_by_place, names_of_own, names_of_saved, unplaced


@dataclass(frozen=True)
class SavedState:
    """An optimizer's saved state, which has ``param_groups``."""

    state: Mapping[Any, Any]
    """Key of a parameter to its entries, before ``ignore_keys``."""
    groups: Sequence[Mapping[str, Any]]
    """Before ``ignore_keys``."""
    left: Mapping[str, Any]
    """``state`` and ``param_groups`` as ``ignore_keys`` left them, if it did."""

    def left_of(self, key: Any) -> Any:
        """What ``ignore_keys`` left of a parameter's entries; None where that is nothing."""
        state = self.left.get("state")
        return state.get(key) if isinstance(state, Mapping) else None


@dataclass
class OptimizerPlan:
    """Which saved state goes to which of this optimizer's parameters; checked, nothing changed yet."""

    optimizer: Any
    name: str
    """The checkpoint's."""
    own_name: str = ""
    """This job's; it may be another where both are of one kind."""
    hyperparameters: str | None = None
    """`RestoreOptions.hyperparameters`."""
    notes: list[str] = field(default_factory=list)
    saved_groups: Sequence[Mapping[str, Any]] = ()
    keys: dict[int, Any] = field(default_factory=dict)
    """Position of the parameter in the optimizer to the key of its saved state."""
    state: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Position to its entries: saved values, or `Own` and `Zeros` where those were ignored."""
    group_from: list[int | None] = field(default_factory=list)
    """For each of the optimizer's groups, the saved one that it takes its hyperparameters from."""
    param_groups: list[dict[str, Any]] = field(default_factory=list)
    mismatch: Mismatch = field(default_factory=Mismatch)
    reset: list[str] = field(default_factory=list)
    """Ignored entries that the optimizer needs with the others: set to zero."""
    cast: dict[str, str] = field(default_factory=dict)
    """Entries whose dtype changes: ``optimizers/CLASS/state/NAME/KEY`` to ``source dtype -> target dtype``."""
    keep: set[int] = field(default_factory=set)
    """Positions whose own state stays: the checkpoint does not have the parameter, or its state was ignored."""

    @property
    def at(self) -> str:
        """Its place in messages."""
        return f"optimizers/{self.name}"

    @property
    def own_groups(self) -> list[dict[str, Any]]:
        """The optimizer's, as it is."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The optimizer's, by position."""
        return [parameter for group in self.own_groups for parameter in group["params"]]

    @property
    def tensors(self) -> list[SavedTensor]:
        """The saved ones among the entries."""
        return [
            value
            for entries in self.state.values()
            for value in entries.values()
            if isinstance(value, SavedTensor)
        ]

    @property
    def spread(self) -> bool:
        """Whether state is saved in pieces or goes to shards, so that only an `OptimizerStep` can place it."""
        return any(value.whole is None for value in self.tensors) or any(map(is_dtensor, self.parameters))

    @property
    def takes_as_saved(self) -> bool:
        """Whether the optimizer gets the groups as they were saved, under the name that they were saved under."""
        return not self.notes and self.hyperparameters != "job"

    def as_plan(self, *, ahead: bool = True) -> Plan:
        """The plan, with its step unless something does not fit; `ahead` as in `OptimizerStep`.

        Raises `LayoutError` where elements lie in files that were not read.
        """
        steps = () if self.mismatch.wrong else (_step(self, ahead),)
        return Plan(steps, self.mismatch, cast=self.cast, reset=tuple(self.reset), notes=tuple(self.notes))


@dataclass(frozen=True)
class OptimizerStep:
    """Fills an optimizer's state through its own ``load_state_dict``, which keeps the new tensors as they are."""

    plan: OptimizerPlan
    copies: tuple[Copy, ...]
    trees: Mapping[str, Any]
    """What is made as it was saved: the groups, and for each parameter its entries that are no tensors with memory of
    their own. Each by itself, so that no two parameters share a step, which is counted up in place."""
    tree_of: Mapping[int, str]
    """Position to its place in `trees`."""
    ahead: bool = True
    """Whether the state is read before any other part is changed."""

    def prepare(self, work: Work) -> Change:
        """Reads all of the state, as new tensors, where it may be read ahead and the parameters have memory by then.

        A parameter that the checkpoint does not have, or whose state was ignored, keeps its state. One that was saved
        without state has none afterwards. Raises `CorruptError` where bytes are missing or do not match their checksum;
        the optimizer is unchanged then.
        """
        if not self.ahead or any(parameter.is_meta for parameter in self.plan.parameters):
            return lambda: self._load(self._read(work), work)
        state = self._read(work)
        return lambda: self._load(state, work)

    def _read(self, work: Work) -> dict[str, Any]:
        """What the optimizer's ``load_state_dict`` gets."""
        plan = self.plan
        current = plan.optimizer.state_dict()["state"]
        kept = {position: entries for position, entries in current.items() if position in plan.keep}
        real = work.real(self.trees)
        fresh: dict[int, dict[str, Any]] = {}
        memories: dict[str, torch.Tensor] = {}
        for position, parameter in enumerate(plan.parameters):
            if position not in plan.state:
                continue
            made = real.get(self.tree_of.get(position, ""), {})
            fresh[position] = {}
            for key, value in plan.state[position].items():
                if key in made:
                    fresh[position][key] = made[key]
                elif isinstance(value, Own):
                    fresh[position][key] = value.value
                else:
                    place = _key(plan, position, key)
                    # When it is carried out again, the tensor that it had filled is the optimizer's by now.
                    tensor = current.get(position, {}).get(key) if work.again else None
                    if tensor is None or not work.has_filled(place, _local(tensor, place)):
                        tensor = new_tensor(value, key, parameter)
                    fresh[position][key] = tensor
                    memories[place] = local_part(tensor, place)[1]
        work.fill(self.copies, memories)
        groups = [{**group, "params": _Params(group["params"])} for group in real[_groups_place(plan)]]
        problems = [*value_problems(f"{plan.at}/param_groups", plan.own_groups, groups)]
        Mismatch(wrong=problems).raise_if_any(work.options.file, strict=False, before=False)
        return {"state": {**kept, **fresh}, "param_groups": groups}

    def _load(self, state: dict[str, Any], work: Work) -> list[str]:
        plan = self.plan
        work.note_change(f"optimizer {plan.name}")
        plan.optimizer.load_state_dict(state)
        return [f"optimizer {plan.name} ({counted(sum(tensor.nbytes for tensor in plan.tensors), 'byte')})"]


def _local(tensor: Any, place: str) -> Any:
    return local_part(tensor, place)[1] if isinstance(tensor, torch.Tensor) else None


class _Params(list[Any]):
    """A group's list of parameters. torch looks there for each of them, three times with Adam: in a list that takes 50
    us at 20,000 parameters, and longer the more there are."""

    def __init__(self, keys: Sequence[Any]) -> None:
        super().__init__(keys)
        self._keys = frozenset(keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def plan_optimizers(state: Any, saved: Saved, options: RestoreOptions) -> tuple[list[OptimizerPlan], Plan]:
    """The plans of those of `state`'s optimizers that are torch's and saved, each to be turned into a `Plan`.

    An optimizer takes the state that was saved under its class's name or, where one of each is left, under another one,
    if that is of its kind (`optimizer_kinds`). The second result tells of what the checkpoint lacks, and what of it
    this job has no place for; of that it warns. Changes nothing, and no rank waits.
    """
    left, whole = saved.state.get("optimizers") or {}, saved.whole.state.get("optimizers") or {}
    names = parameter_names(getattr(state, "model", None))
    own = by_class_name(as_list(state.optimizers))
    plans: list[OptimizerPlan] = []
    mismatch = Mismatch()
    has = ", ".join(map(str, whole)) or "none"
    refused: dict[str, str] = {}
    restored: set[str] = set()
    for name, source in sources_of(own, whole).items():
        optimizer = own[name]
        if source is None:
            mismatch.missing.append(f"optimizers/{name}: the checkpoint has {has}")
            continue
        problem = None
        if source in left and hasattr(optimizer, "param_groups"):
            problem = kind_problem(optimizer, whole[source], source if source != name else None)
        if problem is not None:
            theirs = "the checkpoint's is of" if source == name else f"the checkpoint has {has},"
            refused[source] = (
                f"optimizers/{name}: {theirs} {problem}; use the optimizer that was saved, or ignore "
                f"state/optimizers/{source}"
            )
            continue
        restored.add(source)
        if source in left and hasattr(optimizer, "param_groups"):
            plan = plan_optimizer(
                optimizer,
                source,
                left[source],
                whole[source],
                names=names,
                rename=options.rename,
                own_name=name,
                hyperparameters=options.hyperparameters,
            )
            plans.append(plan)
    mismatch.missing.extend(refused.values())
    rest = [name for name in left if name not in restored]
    if getattr(state, "model", None) is not None:  # without one, some parts were asked for alone
        warn_of_state([name for name in rest if left[name] and name not in refused], own, saved.name)
    return plans, Plan(mismatch=mismatch, not_restored=tuple(f"state/optimizers/{name}" for name in rest))


def without_hyperparameters(plans: Sequence[OptimizerPlan], saved: Saved) -> tuple[str, ...]:
    """The note for the receipt where DeepSpeed's files have state for the optimizers of `plans`, and no more."""
    if (
        not plans
        or ENGINE not in saved.whole.state
        or any("lr" in group for plan in plans for group in plan.saved_groups)
    ):
        return ()
    return ("the files hold no hyperparameters (elastic_checkpoint): the optimizer keeps its own",)


def plan_optimizer(
    optimizer: Any,
    name: str,
    saved: Mapping[str, Any],
    whole: Mapping[str, Any],
    *,
    names: Mapping[int, str],
    rename: Mapping[str, str],
    own_name: str = "",
    hyperparameters: str | None = None,
) -> OptimizerPlan:
    """Matches the optimizer state `saved` with `optimizer`'s parameters; changes nothing, and no rank waits.

    Parameters are matched by name where the checkpoint has names (Composer's keys, torch's ``param_names``),
    by position otherwise. What does not fit is in the plan's ``mismatch``, for the caller to raise.

    Args:
        name: what messages and the receipt call the optimizer: the checkpoint's name of it.
        saved: ``{"state": ..., "param_groups": ...}``, as ``ignore_keys`` left it.
        whole: the same before ``ignore_keys``.
        names: ``id`` of a parameter to its name.
        rename: saved name to this job's, before names are matched.
        own_name: this job's name of the optimizer; "" where it is the same.
        hyperparameters: `RestoreOptions.hyperparameters`.
    """
    plan = OptimizerPlan(optimizer, name, own_name or name, hyperparameters)
    own = plan.parameters
    if not isinstance(whole, Mapping) or not isinstance(saved, Mapping):
        plan.mismatch.wrong.append(f"{plan.at}: expected a dict, got a {kind_of(whole)}")
        return plan
    for state in (saved.get("state", {}), whole.get("state", {})):
        if not isinstance(state, Mapping):
            plan.mismatch.wrong.append(f"{plan.at}/state: expected a dict, got a {kind_of(state)}")
            return plan
    groups = _groups(whole, plan)
    if groups is None:
        return plan
    plan.saved_groups = groups
    found = SavedState(whole.get("state", {}), groups, saved)
    _note_class(plan, groups)
    saved_names = names_of_saved(groups, found.state)
    named = bool(names) or any(group.get("param_names") for group in plan.own_groups)
    if saved_names is None or (not named and _has_positions(groups)):
        _match_by_position(plan, groups)
    elif named or not own:
        _match_by_name(plan, saved_names, groups, names, rename)
    else:
        plan.mismatch.wrong.append(
            f"{plan.at}: the checkpoint names its optimizer's parameters, and this job has no model that names its "
            "own: pass the model too, and keep it as it is with LoadOptions(leave_out=['model'])"
        )
        return plan
    if "param_groups" not in saved:
        plan.param_groups = [dict(group) for group in optimizer.state_dict()["param_groups"]]
    elif not plan.mismatch.wrong:
        plan.param_groups = _filled_groups(plan, found)
    ignored = "state" in whole and "state" not in saved
    plan.keep.update(position for position in range(len(own)) if ignored or position not in plan.keys)
    group_of = [group for group in plan.own_groups for _ in group["params"]]
    for position, key in plan.keys.items():
        if key not in found.state:
            continue
        entries = _entries(plan, found, key, own[position])
        if entries is not None:
            _take_step(entries, groups, key)
            plan.state[position] = entries
            problem = lacking_state(group_of[position], entries) if hyperparameters == "job" else None
            if problem is not None and "param_groups" in saved:
                plan.mismatch.wrong.append(f"{plan.at}/state/{key}: {problem}")
        else:
            plan.keep.add(position)
    return plan


def _step(plan: OptimizerPlan, ahead: bool) -> OptimizerStep:
    copies: list[Copy] = []
    trees: dict[str, Any] = {_groups_place(plan): plan.param_groups}
    tree_of: dict[int, str] = {}
    for position, parameter in enumerate(plan.parameters):
        as_saved: dict[str, Any] = {}
        entries = plan.state.get(position, {})
        alone = standing_alone(entries)
        for key, value in entries.items():
            if lies_along(value, key, parameter):
                if isinstance(value, SavedTensor):
                    name = _key(plan, position, key)
                    region, memory = kept_part(parameter, name, new=dtype_along(value, parameter))
                    copies.extend(copies_into(value, region, memory, name=name))
            elif key in alone:
                name = _key(plan, position, key)
                memory = Memory(name, value.dtype, value.shape, row_major_stride(value.shape), plain=True)
                copies.extend(copies_into(value, memory.whole, memory, name=name))
            elif not isinstance(value, Own | Zeros):
                as_saved[key] = value
        if as_saved:
            place = join_path(f"state/{plan.at}/state", plan.keys[position])
            # A file may use one key twice.
            tree_of[position] = place if place not in trees else f"{place} ({position})"
            trees[tree_of[position]] = as_saved
    return OptimizerStep(plan, tuple(copies), trees, tree_of, ahead)


def _groups_place(plan: OptimizerPlan) -> str:
    return f"state/{plan.at}/param_groups"


def _key(plan: OptimizerPlan, position: int, key: str) -> str:
    """The key of an entry's memory, which is also its name in messages."""
    return f"{plan.at}/state/{position}/{key}"


def _groups(saved: Mapping[str, Any], plan: OptimizerPlan) -> list[dict[str, Any]] | None:
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups
    ):
        plan.mismatch.wrong.append(f"{plan.at}/param_groups: expected a list of dicts with params")
        return None
    return [dict(group) for group in groups]


def _note_class(plan: OptimizerPlan, groups: Sequence[Mapping[str, Any]]) -> None:
    """Notes, and warns, where the state was saved by another algorithm of the same kind."""
    note = class_note(plan.own_groups, groups)
    if plan.own_name != plan.name:
        plan.notes.append(f"the state of {plan.name} goes to {plan.own_name}, which is of the same kind")
    if note is not None:
        plan.notes.append(note)
    if plan.notes:
        warn(f"{plan.at}: {'; '.join(plan.notes)}", stacklevel=2)


def _has_positions(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the saved groups list their parameters by position, as torch does, whether or not it adds names."""
    return all(isinstance(key, int) for group in groups for key in group["params"])


def _match_by_name(
    plan: OptimizerPlan,
    saved_names: Mapping[str, tuple[int, Any]],
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    rename: Mapping[str, str],
) -> None:
    own = plan.parameters
    own_names = names_of_own(plan.own_groups, names)
    match = match_names(saved_names, own_names, rename)
    source_of = {target: source for source, target in match.target_of.items()}
    known = {names[id(parameter)] for parameter in own if id(parameter) in names}
    left_over = {saved_names[name]: name for name in match.unexpected}
    by_place = matched_by_place(
        plan.own_groups, groups, own_names, frozenset(match.missing) - known, left_over
    )
    source_of.update(by_place)
    # A parameter that is not trained has no saved state; some jobs give it to the optimizer all the same.
    untrained = {name for name, parameter in zip(own_names, own, strict=True) if not parameter.requires_grad}
    plan.mismatch.missing.extend(
        f"{plan.at}/{name}" for name in match.missing if name not in untrained and name not in by_place
    )
    placed = set(by_place.values())
    plan.mismatch.unexpected.extend(f"{plan.at}/{name}" for name in match.unexpected if name not in placed)
    position = 0
    for index, group in enumerate(plan.own_groups):
        saved_groups: list[int] = []
        for _ in group["params"]:
            source = source_of.get(own_names[position])
            if source is not None:
                saved_group, plan.keys[position] = saved_names[source]
                if saved_group not in saved_groups:
                    saved_groups.append(saved_group)
            position += 1
        hyper = [taken(group, groups[other], plan.hyperparameters) for other in saved_groups]
        if any(other != hyper[0] for other in hyper[1:]):
            plan.mismatch.wrong.append(f"{plan.at}: {merged_groups(index, sorted(saved_groups))}")
        plan.group_from.append(saved_groups[0] if saved_groups else None)


def _match_by_position(plan: OptimizerPlan, groups: Sequence[Mapping[str, Any]]) -> None:
    expected = [len(group["params"]) for group in plan.own_groups]
    got = [len(group["params"]) for group in groups]
    if expected != got:
        plan.mismatch.wrong.append(f"{plan.at}: {unplaced(expected, got)}")
        return
    plan.group_from = list(range(len(groups)))
    plan.keys = dict(enumerate(key for group in groups for key in group["params"]))


def _filled_groups(plan: OptimizerPlan, saved: SavedState) -> list[dict[str, Any]]:
    """This optimizer's groups with its own positions as ``params``, and the saved hyperparameters over its own.

    The positions of the groups that ``ignore_keys`` left have shifted, so their parameters identify them.
    """
    left = saved.left.get("param_groups")
    kept = {
        str(group["params"]): group
        for group in (left if isinstance(left, list) else ())
        if isinstance(group, Mapping) and "params" in group
    }
    filled = [dict(group) for group in plan.optimizer.state_dict()["param_groups"]]
    gets: list[dict[str, Any]] = []
    for group, index in zip(filled, plan.group_from, strict=True):
        from_saved = {} if index is None else kept.get(str(saved.groups[index]["params"]), {})
        gets.append(taken(group, from_saved, plan.hyperparameters))
    if plan.hyperparameters is None:
        for problem in uneven_groups(plan.own_groups, plan.group_from, gets):
            plan.mismatch.wrong.append(f"{plan.at}/param_groups: {problem}")
    plan.mismatch.wrong += value_problems(f"{plan.at}/param_groups", plan.own_groups, gets)
    for group, values in zip(filled, gets, strict=True):
        group.update(values)
    return filled


def _entries(
    plan: OptimizerPlan, saved: SavedState, key: Any, parameter: torch.Tensor
) -> dict[str, Any] | None:
    """One parameter's entries: the checkpoint's; where some were ignored, this optimizer's own, or zeros. None where
    all were, or none were saved."""
    whole, left = saved.state[key], saved.left_of(key)
    at = f"{plan.at}/state/{key}"
    if not isinstance(whole, Mapping):
        plan.mismatch.wrong.append(f"{at}: expected a dict, got a {kind_of(whole)}")
        return None
    if not left:
        return None
    entries: dict[str, Any] = {}
    current = plan.optimizer.state.get(parameter, {})
    shape = shape_of(parameter)
    for name, value in whole.items():
        if name != STEP and isinstance(value, SavedTensor) and shape is not None:
            value = of_one_element(value, shape)
        if isinstance(value, InertTensor) and not value.known and (name in left or name not in current):
            plan.mismatch.wrong.append(
                f"{at}/{name}: a {value.kind}, which is not restored; to load without the optimizer's state, pass "
                f"ignore_keys=['state/{plan.at}/state']"
            )
            continue
        if name in left:
            entries[name] = value
        elif name in current:
            entries[name] = Own(current[name])
        elif isinstance(value, SavedTensor):
            entries[name] = Zeros(value.shape, value.dtype)
            plan.reset.append(f"{at}/{name}")
        elif isinstance(value, int | float):
            entries[name] = type(value)(0)
            plan.reset.append(f"{at}/{name}")
        problem = shape_problem(value, name, parameter)
        if problem:
            plan.mismatch.wrong.append(f"{at}/{name}: {problem}")
            continue
        cast = cast_of(entries.get(name), name, parameter)
        if cast is not None:
            plan.cast[f"{at}/{name}"] = cast
    return entries


def _take_step(entries: dict[str, Any], groups: Sequence[Mapping[str, Any]], key: Any) -> None:
    """Adds the group's step count: some of DeepSpeed's optimizers keep it there, torch's in each parameter's state."""
    if STEP not in entries:
        for group in groups:
            if STEP in group and key in group["params"]:
                entries[STEP] = group[STEP]
