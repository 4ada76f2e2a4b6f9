"""What the parts of a hand-written checkpoint are called, and what they look like. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..saved.values import LazyTensor

ROLE_KEYS: dict[str, tuple[str, ...]] = {
    "model": (
        "model",
        "model_state_dict",
        "state_dict",
        "model_state",
        "module",
        "net",
        "network",
        "weights",
    ),
    "optimizer": ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "opt", "optimizers"),
    "scheduler": (
        "scheduler",
        "scheduler_state_dict",
        "lr_scheduler",
        "lr_scheduler_state_dict",
        "schedulers",
    ),
    "scaler": ("scaler", "scaler_state_dict", "grad_scaler", "amp_scaler"),
    "rng": ("rng", "rng_state", "rng_states"),
    "timestamp": ("timestamp",),
}
"""Keys of hand-written files, in order of preference."""

EXPECTED = {
    "model": "a dict of names and tensors",
    "optimizer": "an optimizer's state_dict, or a list of them",
    "scheduler": "a scheduler's state_dict, or a list of them",
    "scaler": "a scaler's state_dict",
}
"""What `fits` demands of these roles, for messages."""


def fits(role: str, value: Any) -> bool:
    """Whether `value` can be what `role` stands for, rather than a name or a setting under the same key."""
    if role == "model":
        return is_state_dict(value)
    if role == "rng":
        return rng_list(value) is not None
    if role == "timestamp":
        return True
    if isinstance(value, list | tuple) and role != "scaler":
        return bool(value) and all(fits(role, item) for item in value)
    return isinstance(value, Mapping) and (not value or any(item is not None for item in value.values()))


def is_optimizer_state(value: Any) -> bool:
    """Whether `value` has an optimizer's own keys; of a list, whether all in it have."""
    if isinstance(value, list | tuple):
        return bool(value) and all(is_optimizer_state(item) for item in value)
    return isinstance(value, Mapping) and bool({"state", "param_groups"} & set(value))


def is_weight(key: Any, value: Any) -> bool:
    """Whether a state dict can hold `value` under `key`: a tensor, or what a module keeps as extra state."""
    return isinstance(key, str) and (isinstance(value, LazyTensor) or key.endswith("_extra_state"))


def is_state_dict(value: Any) -> bool:
    """Whether `value` can be a module's: names, and tensors among what they name."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(item, LazyTensor) for item in value.values())
    )


_RNG_KEYS = frozenset({"python", "numpy", "torch", "cuda"})


def rng_list(value: Any) -> list[Any] | None:
    """RNG states as a list with an entry a rank; None where `value` is nothing of that kind."""
    if isinstance(value, Mapping) and value and set(value) <= _RNG_KEYS:
        return [dict(value)]
    if isinstance(value, list | tuple) and value:
        entries = list(value)
        if all(isinstance(entry, Mapping) and entry and set(entry) <= _RNG_KEYS for entry in entries):
            return entries
    return None


def in_order(value: Any, classes: Sequence[str]) -> list[Any] | dict[str, Any]:
    """One state or several, in order; or under names, where that is how the file has them."""
    if isinstance(value, Mapping) and (
        set(value) <= set(classes) or all(is_optimizer_state(item) for item in value.values())
    ):
        return dict(value)
    return list(value) if isinstance(value, list | tuple) else [value]


def by_class(states: list[Any] | dict[str, Any], classes: Sequence[str], kind: str) -> dict[str, Any]:
    """States that come in order, under the class names of this job's objects in the same order."""
    if isinstance(states, dict):
        return states
    return {
        classes[index] if index < len(classes) else f"{kind}{index}": state
        for index, state in enumerate(states)
    }
