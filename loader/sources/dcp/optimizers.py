"""Makes torch's form of an optimizer's state of what a DCP folder has: ``{"state": ..., "param_groups": [...]}``. Pure.

Programs save three forms. By name, as torch's ``get_optimizer_state_dict`` gives it; by number, as
``Optimizer.state_dict`` does, whose numbers became text; and flattened (``flatten_optimizer_state_dict=True``,
torchtitan), which has no groups but every parameter's own hyperparameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...saved.tensor import SavedTensor

STATE, GROUPS, PARAMETERS = "state", "param_groups", "params"
_STATE_PREFIX, _GROUP_PREFIX = f"{STATE}.", f"{GROUPS}."


def torch_form(saved: Any) -> Any:
    """An optimizer's state in torch's form; what is no optimizer's state comes back as it is."""
    if not isinstance(saved, Mapping):
        return saved
    if _is_flattened(saved):
        return _grouped(saved)
    if GROUPS not in saved:
        return saved
    groups, state = saved[GROUPS], saved.get(STATE, {})
    if isinstance(state, Mapping) and numbered(groups):
        state = {
            int(key) if isinstance(key, str) and key.isdecimal() else key: own for key, own in state.items()
        }
    # An optimizer without state has an empty dict, which leaves no trace.
    return {**saved, STATE: state}


def numbered(groups: Any) -> bool:
    """Whether an optimizer's groups name its parameters by numbers."""
    return isinstance(groups, list) and all(
        isinstance(group, Mapping)
        and isinstance(group.get(PARAMETERS), list | tuple)
        and all(type(one) is int for one in group[PARAMETERS])
        for group in groups
    )


def with_names(saved: Mapping[str, Any], groups: Sequence[Sequence[str]]) -> Mapping[str, Any] | None:
    """An optimizer's state with the names in `groups`, as the job's optimizer has them, in place of numbers.

    None where the saved groups are of other sizes: then which number is which parameter's is not known.
    """
    own = saved[GROUPS]
    if [len(group[PARAMETERS]) for group in own] != [len(group) for group in groups]:
        return None
    name_of = {
        number: name
        for group, names in zip(own, groups, strict=True)
        for number, name in zip(group[PARAMETERS], names, strict=True)
    }
    return {
        **saved,
        STATE: {name_of[key]: entries for key, entries in saved[STATE].items() if key in name_of},
        GROUPS: [{**group, PARAMETERS: [name_of[one] for one in group[PARAMETERS]]} for group in own],
    }


def _is_flattened(saved: Mapping[Any, Any]) -> bool:
    return bool(saved) and all(
        isinstance(key, str) and key.startswith((_STATE_PREFIX, _GROUP_PREFIX)) for key in saved
    )


def _grouped(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A flattened state with groups: parameters with equal hyperparameters are of one."""
    state: dict[str, dict[str, Any]] = {}
    hyperparameters: dict[str, dict[str, Any]] = {}
    for key, value in saved.items():
        own, prefix = (
            (state, _STATE_PREFIX) if key.startswith(_STATE_PREFIX) else (hyperparameters, _GROUP_PREFIX)
        )
        name, _, entry = key.removeprefix(prefix).rpartition(".")
        own.setdefault(name, {})[entry] = value
    groups: dict[Any, dict[str, Any]] = {}
    for name in {**hyperparameters, **state}:
        own_values = hyperparameters.get(name, {})
        told = tuple((key, _comparable(own_values[key])) for key in sorted(own_values))
        groups.setdefault(told, {**own_values, PARAMETERS: []})[PARAMETERS].append(name)
    return {STATE: state, GROUPS: list(groups.values())}


def _comparable(value: Any) -> Any:
    """Something that is equal for equal hyperparameters alone."""
    if isinstance(value, SavedTensor):
        piece = value.whole
        checksum = getattr(piece.storage, "crc32", None) if piece is not None else None
        same = value.dtype, value.shape, checksum
        return same if checksum is not None else id(value)
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(map(_comparable, value))
    if isinstance(value, str | bytes | bool | int | float | None):
        return type(value).__name__, value
    return id(value)
