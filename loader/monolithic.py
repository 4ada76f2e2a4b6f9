"""Layouts of a single checkpoint file: whose it is, and where its parts lie. Pure.

Every layout becomes Composer's nested dict, ``{"state": {"model": ..., "optimizers": {CLASS: ...}, ...},
"rng": [...]}``, so that one vocabulary of keys serves them all. Sources: Composer's ``State.state_dict``,
Lightning's ``dump_checkpoint``, PyTorch's tutorials on saving and loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import CorruptError, FormatError
from .values import GlobalName, InertObject, LazyTensor


@dataclass(frozen=True)
class Contents:
    """A checkpoint's parts under Composer's names, all of them lazy."""

    layout: str
    """``composer``, ``lightning``, ``state dict``, ``hand-written`` or ``deepspeed``."""
    state: dict[str, Any]
    rng: list[Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Top-level entries that are neither."""

    def as_tree(self) -> dict[str, Any]:
        """The nested dict that ``ignore_keys`` sees."""
        tree: dict[str, Any] = {"state": self.state}
        if self.rng is not None:
            tree["rng"] = self.rng
        for key, value in self.extra.items():
            tree.setdefault(key, value)
        return tree

    def with_tree(self, tree: Mapping[str, Any]) -> Contents:
        """The same contents after ``ignore_keys`` changed its nested dict."""
        state = tree.get("state")
        rng = tree.get("rng")
        return Contents(
            self.layout,
            dict(state) if isinstance(state, Mapping) else {},
            list(rng) if isinstance(rng, list | tuple) else None,
            {key: value for key, value in tree.items() if key not in ("state", "rng")},
        )


_ROLE_KEYS: dict[str, tuple[str, ...]] = {
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


def read_layout(
    tree: Any,
    *,
    file: str,
    layout: Mapping[str, str] | None = None,
    optimizer_classes: Sequence[str] = (),
    scheduler_classes: Sequence[str] = (),
    scaler_class: str = "GradScaler",
) -> Contents:
    """The parts of the file whose pickle is `tree`.

    `layout` is `LoadOptions.layout`. Layouts that keep optimizers and schedulers in a list, or alone, get the
    class names of this job's. Raises `FormatError` where the layout is not known, listing the top-level keys.
    """
    if not isinstance(tree, Mapping):
        raise FormatError(_not_a_dict(tree, file), path=file)
    names = (optimizer_classes, scheduler_classes, scaler_class)
    if layout:
        return _mapped(tree, file, layout, names)
    if isinstance(tree.get("state"), Mapping) and ("rng" in tree or set(tree) <= {"state", "rng"}):
        return _composer(tree)
    if "state_dict" in tree and ("pytorch-lightning_version" in tree or "optimizer_states" in tree):
        return _lightning(tree, file, names)
    if tree and all(isinstance(k, str) and isinstance(v, LazyTensor) for k, v in tree.items()):
        return Contents("state dict", {"model": dict(tree)})
    found = _hand_written(tree, names)
    if found is not None:
        return found
    keys = ", ".join(repr(key) for key in list(tree)[:20]) or "none"
    raise FormatError(
        f"{file}: its layout is not known; top-level keys: {keys}. "
        'Say where things are with LoadOptions(layout={"model": "KEY", "optimizer": "KEY", ...}), '
        "where KEY may be nested, as in 'trainer/weights'",
        path=file,
    )


def _composer(tree: Mapping[str, Any]) -> Contents:
    # Before v0.4.1 the attributes were saved with a leading underscore.
    state = {key[1:] if key.startswith("_") else key: value for key, value in tree["state"].items()}
    for part in ("schedulers", "callbacks", "optimizers", "scaler"):
        if isinstance(state.get(part), list):
            state[part] = dict(state[part])
    extra = {key: value for key, value in tree.items() if key not in ("state", "rng")}
    return Contents("composer", state, rng_list(tree.get("rng")), extra)


_Names = tuple[Sequence[str], Sequence[str], str]


def _lightning(tree: Mapping[str, Any], file: str, names: _Names) -> Contents:
    optimizers, schedulers, scaler = names
    state: dict[str, Any] = {"model": _tensors(tree["state_dict"], "state_dict", file)}
    claimed = {"state_dict"}
    for key, part, classes, kind in (
        ("optimizer_states", "optimizers", optimizers, "optimizer"),
        ("lr_schedulers", "schedulers", schedulers, "scheduler"),
    ):
        if tree.get(key):
            state[part] = _by_class(list(tree[key]), classes, kind)
        claimed.add(key)
    if isinstance(tree.get("callbacks"), Mapping) and tree["callbacks"]:
        state["callbacks"] = dict(tree["callbacks"])
        claimed.add("callbacks")
    for key in ("native_amp_scaling_state", "MixedPrecision", "MixedPrecisionPlugin"):
        if tree.get(key):
            state["scaler"] = {scaler: tree[key]}
            claimed.add(key)
    return Contents("lightning", state, None, {k: v for k, v in tree.items() if k not in claimed})


def _hand_written(tree: Mapping[str, Any], names: _Names) -> Contents | None:
    roles: dict[str, str] = {}
    for role, keys in _ROLE_KEYS.items():
        for key in keys:
            if key in tree and (role != "model" or _is_state_dict(tree[key])):
                roles[role] = key
                break
    if "model" not in roles:
        return None
    return _contents_of({role: tree[key] for role, key in roles.items()}, tree, set(roles.values()), names)


def _mapped(tree: Mapping[str, Any], file: str, layout: Mapping[str, str], names: _Names) -> Contents:
    parts: dict[str, Any] = {}
    for role, key_path in layout.items():
        node: Any = tree
        for key in key_path.split("/"):
            if not isinstance(node, Mapping) or key not in node:
                keys = ", ".join(repr(k) for k in list(node)[:20]) if isinstance(node, Mapping) else "none"
                raise FormatError(
                    f"{file}: LoadOptions.layout maps {role} to {key_path!r}, but there is no {key!r}; "
                    f"keys there: {keys}",
                    path=file,
                )
            node = node[key]
        parts[role] = node
    claimed = {key_path for key_path in layout.values() if "/" not in key_path}
    return _contents_of(parts, tree, claimed, names)


def _contents_of(
    parts: Mapping[str, Any], tree: Mapping[str, Any], claimed: set[str], names: _Names
) -> Contents:
    optimizers, schedulers, scaler = names
    state: dict[str, Any] = {}
    if "model" in parts:
        state["model"] = dict(parts["model"]) if isinstance(parts["model"], Mapping) else parts["model"]
    if parts.get("optimizer"):
        state["optimizers"] = _by_class(_as_list(parts["optimizer"]), optimizers, "optimizer")
    if parts.get("scheduler"):
        state["schedulers"] = _by_class(_as_list(parts["scheduler"]), schedulers, "scheduler")
    if parts.get("scaler"):
        state["scaler"] = {scaler: parts["scaler"]}
    if "timestamp" in parts:
        state["timestamp"] = parts["timestamp"]
    rng = rng_list(parts.get("rng"))
    extra = {key: value for key, value in tree.items() if key not in claimed}
    if "rng" in parts and rng is None:
        extra["rng"] = parts["rng"]  # of a form that is not ours: handed on as it is
    return Contents("hand-written", state, rng, extra)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _by_class(states: list[Any], classes: Sequence[str], kind: str) -> dict[str, Any]:
    """States that come in order, under the class names of this job's objects in the same order."""
    return {
        classes[index] if index < len(classes) else f"{kind}{index}": state
        for index, state in enumerate(states)
    }


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(item, LazyTensor) for item in value.values())
    )


def _tensors(value: Any, key: str, file: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise CorruptError(
            f"{file}: {key} is a {type(value).__name__}, expected a dict of tensors", path=file
        )
    return dict(value)


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


def _not_a_dict(tree: Any, file: str) -> str:
    if isinstance(tree, InertObject | GlobalName):
        name = tree.global_name if isinstance(tree, InertObject) else tree.name
        return (
            f"{file} holds one pickled {name}, expected a dict: a whole object can only be rebuilt by running "
            "its code. Save its state_dict() instead"
        )
    return f"{file} holds a {type(tree).__name__}, expected a dict"
