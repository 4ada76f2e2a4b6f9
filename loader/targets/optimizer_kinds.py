"""Says which saved optimizer state an optimizer can go on with, and whose hyperparameters its groups get.

One rule for every layout and target, whether the checkpoint names the optimizer's class (Composer's layout) or not
(hand-written files, DeepSpeed's): the state must be of the optimizer's kind. Kinds are told apart by hyperparameters
and by the keys of the state. So Adam's state goes to AdamW, as torch takes it, and RMSprop's does not. Of the
optimizer, attributes are read; nothing is changed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...distributed.printable import warn
from ..saved.tensor import SavedTensor
from ..saved.values import kind_of

TELLING = ("betas", "momentum", "alpha", "eps", "rho")
"""Hyperparameters by which kinds of optimizers differ: torch's and DeepSpeed's optimizers name them alike."""
STEP = "step"
"""The key of the step count, in a parameter's state; some of DeepSpeed's optimizers keep it in a group."""
CLASS_OWN = ("decoupled_weight_decay",)
"""Hyperparameters that say which algorithm an optimizer is: torch's Adam and AdamW are one class but for this. An
optimizer keeps its own."""
_ADAM = frozenset({"exp_avg", "exp_avg_sq"})
_KEPT: Mapping[str, frozenset[str]] = {
    "ASGD": frozenset({"eta", "mu", "ax"}),
    "Adadelta": frozenset({"square_avg", "acc_delta"}),
    "Adagrad": frozenset({"sum"}),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Adamax": frozenset({"exp_avg", "exp_inf"}),
    "DeepSpeedCPUAdam": _ADAM,
    "DeepSpeedCPULion": frozenset({"exp_avg"}),
    "FusedAdam": _ADAM,
    "FusedLamb": _ADAM,
    "FusedLion": frozenset({"exp_avg"}),
    "NAdam": _ADAM | {"mu_product"},
    "RAdam": _ADAM,
    "RMSprop": frozenset({"square_avg"}),
    "Rprop": frozenset({"prev", "step_size"}),
    "SGD": frozenset(),
    "SparseAdam": _ADAM,
}
"""Class of torch's or DeepSpeed's optimizers to what each needs in the state of every parameter that it has updated,
besides the step."""
_WITH: Mapping[str, str] = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}
"""Hyperparameters that, where they are set, need another entry in each parameter's state."""
_OF_SOME_KIND = frozenset().union(*_KEPT.values(), _WITH.values(), {"momentum_buffer"})
_OPTIONAL = frozenset({*_WITH.values(), "momentum_buffer"})
_LIBRARIES = ("torch.optim.", "deepspeed.ops.")


def sources_of(own: Mapping[str, Any], saved: Collection[str]) -> dict[str, str | None]:
    """This job's name of each optimizer to the checkpoint's: the same, or the one other that is left; else None."""
    found: dict[str, str | None] = {name: name if name in saved else None for name in own}
    others = [name for name in saved if name not in own]
    lacking = [name for name, source in found.items() if source is None]
    if len(others) == len(lacking) == 1 and hasattr(own[lacking[0]], "param_groups"):
        found[lacking[0]] = others[0]
    return found


def warn_of_state(names: Collection[str], own: Collection[str], file: str) -> None:
    """Warns of the saved state of the optimizers `names`, which this job, with `own` ones, does not restore."""
    if not names:
        return
    lack = f"this State has {', '.join(own)}" if own else "this State has no optimizer"
    engine = ""
    if not own and "deepspeed" in sys.modules:
        engine = "; for a DeepSpeed engine load after deepspeed.initialize, with State(model=engine)"
    warn(
        f"{file} has optimizer state ({', '.join(map(str, names))}), and {lack}: it is not restored. Pass "
        "State(model, optimizers=...), or leave it out with LoadOptions(leave_out=['optimizer']) or "
        f"load_weights_only=True{engine}",
        stacklevel=3,
    )


def kind_problem(optimizer: Any, saved: Any, other_name: str | None) -> str | None:
    """Why `optimizer` cannot go on with saved state, for a message; None where it can.

    `saved` is ``{"state": ..., "param_groups": ...}``; what is none is for others to tell. `other_name` is the name
    that it was saved under, where that is not this optimizer's; else None.
    """
    if not isinstance(saved, Mapping):
        return None
    groups, state = saved.get("param_groups"), saved.get("state")
    saved_groups = (
        [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []
    )
    entries = state.values() if isinstance(state, Mapping) else ()
    saved_state = [entry.keys() for entry in entries if isinstance(entry, Mapping)]
    own_class = type(optimizer).__name__
    another = f"another kind than {own_class}"
    theirs = [key for key in TELLING if any(key in group for group in saved_groups)]
    mine = [key for key in TELLING if any(key in group for group in optimizer.param_groups)]
    if theirs and mine and theirs != mine:
        return f"{another}: expected an optimizer with {', '.join(mine)}, got one with {', '.join(theirs)}"
    known = next((base for base in type(optimizer).__mro__ if _is_known(base)), None)
    if known is None:
        if other_name is not None:
            return f"{another}, and what that keeps is not known: its state is taken from one of the same name alone"
        return None
    if known is not type(optimizer):
        # A class of the user's that is derived from a known one may keep whatever it likes.
        return None
    needed = _KEPT[known.__name__]
    for keys in saved_state:
        lacks = needed.difference(keys)
        strange = _OF_SOME_KIND.intersection(keys).difference(needed, _OPTIONAL)
        if keys and (lacks or strange):
            return (
                f"{another}, which keeps {_listed(needed)} for each parameter: got "
                f"{_listed(key for key in keys if key != STEP)}"
            )
    return None


def _is_known(base: type) -> bool:
    return base.__name__ in _KEPT and f"{base.__module__}.".startswith(_LIBRARIES)


def _listed(keys: Collection[str] | Iterator[str]) -> str:
    return ", ".join(sorted(map(str, keys))) or "nothing"


def class_note(own: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> str | None:
    """What differs between the algorithms of this job's groups and the saved ones: a sentence, or None."""
    for key in CLASS_OWN:
        mine = {group[key] for group in own if key in group}
        theirs = {group[key] for group in saved if key in group}
        if mine and theirs and mine != theirs:
            return (
                f"the checkpoint's optimizer has {key}={_one(theirs)}, this job's {_one(mine)}, which it keeps: the "
                "same weight_decay works differently in the two"
            )
    return None


def _one(values: Collection[Any]) -> str:
    return " and ".join(sorted(map(repr, values)))


def taken(own: Mapping[str, Any], saved: Mapping[str, Any], hyperparameters: str | None) -> dict[str, Any]:
    """Of a `saved` group, what this job's group `own` gets; `hyperparameters` is the option."""
    if hyperparameters == "job":
        return {key: value for key, value in saved.items() if key == STEP}
    return {
        key: value
        for key, value in saved.items()
        if key not in ("params", "param_names") and not (key in CLASS_OWN and key in own)
    }


def value_problems(
    at: str, own: Sequence[Mapping[str, Any]], gets: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Sentences on the hyperparameters that this job's groups `own` would get and could not step with: of another type
    than their own, or not finite. What a group has none of is not judged, but for ``initial_lr``, which schedulers add.

    `at` is the groups' place, for messages. The values of `gets` are saved or real ones; of a saved tensor, only its
    size is known.
    """
    for index, (group, values) in enumerate(zip(own, gets, strict=True)):
        for key, value in values.items():
            mine = group.get("lr" if key == "initial_lr" else key)
            judged = mine is not None and key not in (STEP, "params", "param_names")
            problem = _value_problem(mine, value) if judged else None
            if problem is not None:
                yield (
                    f"{at}/{index}/{key}: expected {problem}, got {_shown(value)}. "
                    "LoadOptions(hyperparameters='job') keeps this job's hyperparameters"
                )


def _value_problem(mine: Any, value: Any) -> str | None:
    """What was expected in place of `value`, where this job has `mine`; None where it can be."""
    if isinstance(mine, bool):
        return None if value is None or (isinstance(value, int) and value in (0, 1)) else "true or false"
    if _is_number(mine):
        return _number_problem(value, finite=math.isfinite(mine))
    if isinstance(mine, list | tuple) and all(map(_is_number, mine)):
        if not isinstance(value, list | tuple) or len(value) != len(mine):
            return f"{len(mine)} numbers"
        pairs = zip(mine, value, strict=True)
        problems = (_number_problem(one, finite=math.isfinite(each)) for each, one in pairs)
        return next((f"{len(mine)} numbers, each {found}" for found in problems if found is not None), None)
    if isinstance(mine, str) and not isinstance(value, str):
        return "a text"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _number_problem(value: Any, *, finite: bool) -> str | None:
    if isinstance(value, SavedTensor | torch.Tensor):
        if (value.numel if isinstance(value, SavedTensor) else value.numel()) != 1:
            return "a number"
        return None if isinstance(value, SavedTensor) else _number_problem(value.item(), finite=finite)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "a number"
    return None if math.isfinite(value) or not finite else "a finite number"


def _shown(value: Any) -> str:
    plain = isinstance(value, bool | int | float | str | list | tuple | torch.Tensor | None)
    return repr(value)[:100] if plain else f"a {kind_of(value)}"


def uneven_groups(
    own: Sequence[Mapping[str, Any]], group_from: Sequence[int | None], gets: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Sentences on this job's groups that differ from each other and would all get the same saved hyperparameters.

    `group_from` and `gets` are by this job's groups: the saved group, and what is taken of it.
    """
    for saved in sorted({index for index in group_from if index is not None}):
        members = [index for index, source in enumerate(group_from) if source == saved]
        first = own[members[0]]
        differing = [
            key
            for key in gets[members[0]]
            if key != STEP and any(not _equal(own[index].get(key), first.get(key)) for index in members[1:])
        ]
        if differing:
            told = "; ".join(
                f"{key} {', '.join(str(own[index].get(key)) for index in members)}" for key in differing
            )
            yield (
                f"this job's groups {', '.join(map(str, members))} differ ({told}) and would all get the "
                f'hyperparameters of the checkpoint\'s group {saved}. LoadOptions(hyperparameters="job") keeps this '
                'job\'s, "checkpoint" takes the saved ones'
            )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        one, other = (value.tolist() if isinstance(value, torch.Tensor) else value for value in (one, other))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other)


def merged_groups(index: int, saved: Sequence[int]) -> str:
    """What is wrong where this job's group `index` takes parameters from `saved` groups that differ."""
    return (
        f"this job's parameter group {index} takes parameters from the checkpoint's groups "
        f"{', '.join(map(str, saved))}, whose hyperparameters differ; group the parameters as they were grouped when "
        'the checkpoint was saved, or keep this job\'s with LoadOptions(hyperparameters="job")'
    )


def lacking_state(own: Mapping[str, Any], keys: Collection[str]) -> str | None:
    """With this job's hyperparameters kept: the one whose entry a parameter's saved `keys` lack; None where all are
    there, or nothing was saved."""
    needs = [(name, entry) for name, entry in _WITH.items() if own.get(name)]
    if own.get("momentum") and "alpha" in own:
        needs.append(("momentum", "momentum_buffer"))
    for name, entry in needs if keys else ():
        if entry not in keys:
            return (
                f"this job's {name}={own[name]!r} needs {entry}, which the checkpoint lacks: take the saved "
                'hyperparameters, LoadOptions(hyperparameters="checkpoint"), or give the optimizer theirs'
            )
    return None
