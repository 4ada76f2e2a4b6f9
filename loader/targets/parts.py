"""Matches a job's schedulers, scalers and callbacks with what a checkpoint has for them, and tells what has no
counterpart.

What the job holds and the checkpoint lacks is missing, like a weight; what the checkpoint holds and the job lacks is
not restored. A state of another kind than the object's is neither: torch's schedulers take any dict without a word, or
fail on it after the first change. So `kind_problem` compares before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...distributed.printable import warn
from ..saved.contents import Saved
from ..saved.values import kind_of
from .base import Plan

CHECKED_PARTS = ("optimizers", "schedulers", "scaler", "callbacks")
"""Parts of a `State` of which it is told what the checkpoint holds beyond them."""
_CHANGING = frozenset(
    {
        "verbose",
        "_get_lr_called_within_step",
        "_is_initial",
        "_last_lr",
        "_step_count",
        "anneal_func",
        "_anneal_func_type",
        "_anneal_strategy",
        "use_beta1",
        "default_min_lr",
        "is_better",
        "mode_worse",
        "_scale_fn_ref",
    }
)
"""Keys that some versions of torch's schedulers keep and others do not; they tell nothing of the kind."""
_NEEDED = frozenset({"lr_lambdas", "_schedulers", "_scale_fn_custom"})
"""Keys without which torch's schedulers that have them cannot load a state."""
_LISTS = ("base_lrs", "min_lrs", "max_lrs", "lr_lambdas", "_schedulers")
"""Keys of lists that must be as long as the object's own: an entry for each parameter group, or inner scheduler."""


def loads_state(target: Any) -> bool:
    """Whether `target` takes a saved state."""
    return callable(getattr(target, "load_state_dict", None))


def own_state(target: Any) -> Any:
    """What `target` would save; None where it saves nothing."""
    give = getattr(target, "state_dict", None)
    return give() if callable(give) else None


def holds_state(target: Any) -> bool:
    """Whether `target` takes a saved state, and has one that would differ from none: a disabled scaler has not."""
    return loads_state(target) and bool(own_state(target))


def with_empty(target: Any, saved: Any) -> Any:
    """`saved`, the state of one of torch's objects, with the entries of `target` that are empty, where it has none of
    these: torch.distributed.checkpoint stores no dict or list without values, such as a LambdaLR's functions have."""
    own = own_state(target) if loads_state(target) and _loads_by_torch(target) else None
    if not isinstance(own, Mapping) or not isinstance(saved, Mapping):
        return saved
    lost = {key: value for key, value in own.items() if key not in saved and _is_empty(value)}
    return {**saved, **lost} if lost else saved


def _is_empty(value: Any) -> bool:
    """Whether `value` is a container that holds nothing but such."""
    if isinstance(value, Mapping):
        return all(map(_is_empty, value.values()))
    return isinstance(value, list | tuple) and all(map(_is_empty, value))


def kind_problem(target: Any, saved: Any, *, named: bool) -> str | None:
    """Why the state `saved` cannot be that of `target`; None where it can be.

    `named` says that the checkpoint itself names the class, so that an object that loads in its own way is trusted to
    know its older states.
    """
    own = own_state(target)
    if not isinstance(own, Mapping) or not own:
        return None
    if not isinstance(saved, Mapping):
        return f"is a {kind_of(saved)}, expected a dict"
    saved = with_empty(target, saved)
    mine, theirs = _keys(own), _keys(saved)
    if not _loads_by_torch(target):
        return None if named or mine & theirs or not theirs else _told(theirs, mine)
    missing, more = mine - theirs - _CHANGING, theirs - mine - _CHANGING
    of_torch = type(target).__module__.startswith("torch.")
    if (missing or more) if of_torch else (missing and more) or missing & _NEEDED:
        return _told(theirs - _CHANGING, mine - _CHANGING)
    lengths = (
        (key, *(len(state.get(key) or ()) for state in (own, saved)))
        for key in _LISTS
        if all(isinstance(state.get(key), list | tuple) for state in (own, saved))
    )
    for key, expected, got in lengths:
        if expected != got:
            what = "inner schedulers" if key == "_schedulers" else "parameter groups"
            return f"is for {got} {what} ({key}), this job's for {expected}"
    inner = zip(getattr(target, "_schedulers", ()), saved.get("_schedulers", ()), strict=False)
    return next((found for one, state in inner if (found := kind_problem(one, state, named=named))), None)


def _keys(state: Mapping[Any, Any]) -> frozenset[str]:
    return frozenset(map(str, state))


def _told(theirs: Iterable[str], mine: Iterable[str]) -> str:
    return (
        f"is of another kind: it has {', '.join(sorted(theirs)) or 'nothing'}; this job's has "
        f"{', '.join(sorted(mine)) or 'nothing'}"
    )


def _loads_by_torch(target: Any) -> bool:
    """Whether torch's own code puts the state into `target`."""
    return str(getattr(target.load_state_dict, "__module__", "")).startswith("torch.")


def state_problem(target: Any, saved: Any, *, named: bool) -> str | None:
    """As `kind_problem`; and why there is nothing to restore, where only one of the two has any state."""
    if not saved and isinstance(saved, Mapping) and holds_state(target):
        return "is empty: it was disabled when the checkpoint was saved"
    return kind_problem(target, saved, named=named)


def missing_part(place: str, others: Iterable[Any]) -> str:
    """The entry in `Mismatch.missing` for the object at `place`, where the checkpoint has `others` of its part."""
    return f"{place}: the checkpoint has {', '.join(map(str, others)) or 'none'}"


def warn_of_parts(plan: Plan, saved: Saved, *, strict: bool, alone: bool = False) -> None:
    """Warns of parts that `plan` does not restore: those that the job has no place for, and without `strict` those that
    the checkpoint lacks. With `alone`, for a job that asked for some parts alone, only of the latter."""
    # What is left of optimizers is told by `optimizer_kinds.warn_of_state`, which knows what to do about it.
    left = [
        name
        for name in _of_parts(name.removeprefix("state/") for name in plan.not_restored)
        if not name.startswith("optimizers/")
    ]
    if left and not alone:
        warn(
            f"{saved.name} holds {', '.join(f'state/{name}' for name in left)}, for which this job has no "
            "counterpart; it is not restored. Pass the object in State(...), or leave it out with "
            "LoadOptions(leave_out=...) or load_weights_only=True",
            stacklevel=2,
        )
    lacking = [] if strict else _of_parts(plan.mismatch.missing)
    if lacking:
        warn(lacking_parts(saved.name, lacking), stacklevel=2)


def lacking_parts(file: str, parts: Iterable[str]) -> str:
    """The warning for `parts`, entries in `Mismatch.missing`, which may be missing."""
    return f"{file} lacks parts of this job, which stay as they are: {'; '.join(parts)}"


def _of_parts(names: Iterable[str]) -> Sequence[str]:
    """Those of `names` that are whole objects of `CHECKED_PARTS`, rather than entries in one."""
    found = []
    for name in names:
        part, _, rest = name.partition(":")[0].partition("/")
        if part in CHECKED_PARTS and "/" not in rest:
            found.append(name)
    return found
