"""Opens a checkpoint that is one file for all ranks: recognises its layout, and finds the checkpoint's parts in it.

Every layout becomes Composer's nested dict, ``{"state": {"model": ..., "optimizers": {CLASS: ...}, ...},
"rng": [...]}``. A safetensors file is a model's state dict. Of a torch file, `read_layout` tries, in this order: the
caller's ``LoadOptions.layout``, Composer's (``State.state_dict``), Lightning's (``dump_checkpoint``), a bare state
dict, and keys that training scripts use (`_ROLE_KEYS`, after PyTorch's tutorials on saving and loading).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...distributed.printable import warn
from ..errors import CorruptError, FormatError
from ..formats.torch_file import FileIndex
from ..saved.contents import Saved
from ..saved.demand import Demand
from ..saved.names import EXTRA_STATE
from ..saved.node_file import NodeFile
from ..saved.random_states import are_random_states
from ..saved.values import can_be_restored, is_tensor, kind_of
from .base import Files
from .unknown_layout import describe, is_emptied_by_zero, is_one_file_of_zero, lone_part, not_a_dict, obstacle

__all__ = [
    "COMPOSER_STATES", "RNG_KEYS", "STATE_DICT", "SingleFile", "by_class", "file_tree", "has_model", "is_weight",
    "parts_for", "read_layout", "rng_list", "rng_of", "state_dict_of",
]  # fmt: skip

COMPOSER_STATES = "composer_states.pt"
"""The member of Composer's archives that holds the checkpoint, or of a ZeRO job everything but ZeRO's files."""

STATE_DICT = "state dict"
"""The layout of a file that is a module's state dict alone."""
_KIND = "monolithic"
_COMPOSER_KEYS = frozenset(
    {
        "model", "optimizers", "schedulers", "algorithms", "callbacks", "scaler", "timestamp", "rank_zero_seed",
        "run_name", "dataset_state", "train_metrics", "eval_metrics", "integrations", "metadata",
    }
)  # fmt: skip
"""Keys of Composer's ``state``; any one of them distinguishes it from a hand-written file's own ``state``."""

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
"""Keys under which training scripts save each part, in order of preference."""
RNG_KEYS = _ROLE_KEYS["rng"]

_EXPECTED = {
    "model": "a dict of names and tensors",
    "optimizer": "an optimizer's state_dict, or a list of them",
    "scheduler": "a scheduler's state_dict, or a list of them",
    "scaler": "a scaler's state_dict",
}
"""What `_fits` demands of these roles, for messages."""

_Names = tuple[Sequence[str], Sequence[str], str]
"""Class names of this job's optimizers, schedulers and scaler."""


class SingleFile:
    """One torch file or safetensors file for all ranks, as it is or in an archive."""

    def recognises(self, files: Files) -> bool:
        return not files.in_folder

    def open(self, files: Files, demand: Demand) -> Saved:
        file = files.first
        with files.stage("read"):
            index = _index(files, file)
            if index.format == "safetensors" and not demand.layout:
                extra = {"metadata": dict(index.metadata)} if index.metadata else {}
                return Saved(files.name, _KIND, "safetensors", {"model": index.tree}, extra=extra)
            found = parts_for(demand, index.tree, file=file.source)
            if is_one_file_of_zero(index.tree) and not demand.weights_only:
                warn(
                    f"{file.source} is one file of a DeepSpeed checkpoint and has the weights alone, in the precision "
                    "that the module had: pass the folder for the fp32 masters and the optimizer's state",
                    stacklevel=2,
                )
            return replace(found, name=files.name)


def file_tree(files: Files) -> dict[Any, Any]:
    """The dict that the one file of `files` holds, as it was saved: nothing of it was read but its index.

    Raises `FormatError` where it holds something else, or is an archive of several files, and as `Files.index`.
    """
    index = _index(files, files.first)
    if not isinstance(index.tree, dict):
        raise FormatError(not_a_dict(index.tree, files.first.source), path=files.first.source)
    return index.tree


def _index(files: Files, file: NodeFile) -> FileIndex:
    return files.index(file, _single_member(file) if file.kind == "archive" else "")


def state_dict_of(index: FileIndex) -> Mapping[str, Any]:
    """The state dict that a safetensors file or a torch file is. Raises `FormatError` where it is something else."""
    if index.format == "safetensors":
        return dict(index.tree)
    found = read_layout(index.tree, file=index.name)
    if found.layout != STATE_DICT:
        raise FormatError(
            f"{index.name} is no state dict, as each file of a model in several files is: its layout is {found.layout}",
            path=index.name,
        )
    return dict(found.state["model"])


def _single_member(file: NodeFile) -> str:
    if COMPOSER_STATES in file.members:
        return COMPOSER_STATES
    if len(file.members) == 1:
        return file.members[0]
    shown = ", ".join(file.members[:12]) or "nothing"
    raise FormatError(
        f"{file.source}: expected {COMPOSER_STATES}, or one torch file, in the archive; it holds {shown}",
        path=file.source,
    )


def parts_for(demand: Demand, tree: Any, *, file: str) -> Saved:
    """The parts of a checkpoint's `tree` by `read_layout`, with what the target demands of it. Raises as that."""
    return read_layout(
        tree,
        file=file,
        layout=demand.layout,
        optimizer_classes=demand.optimizers,
        scheduler_classes=demand.schedulers,
        scaler_class=demand.scaler,
        with_model=demand.model,
    )


def read_layout(
    tree: Any,
    *,
    file: str,
    layout: Mapping[str, str] | None = None,
    optimizer_classes: Sequence[str] = (),
    scheduler_classes: Sequence[str] = (),
    scaler_class: str = "GradScaler",
    with_model: bool = True,
) -> Saved:
    """The parts of a checkpoint file, given the `tree` of its pickle; `file` is what messages call it.

    `layout` is `LoadOptions.layout`. The class names are those of this job's objects: optimizers, schedulers and a
    scaler that the file keeps without class names get them, in order. `with_model`: whether a model is restored; a file
    that lacks one is of no known layout then.

    Raises `FormatError` where the layout is not known, saying what stands in the way, and `CorruptError` where a known
    layout's part is of another type than it must be.
    """
    if not isinstance(tree, Mapping):
        raise FormatError(not_a_dict(tree, file), path=file)
    names = (optimizer_classes, scheduler_classes, scaler_class)
    if layout:
        return _mapped(tree, file, layout, names)
    if _is_composer(tree):
        return _composer(tree, file)
    if "state_dict" in tree and ("pytorch-lightning_version" in tree or "optimizer_states" in tree):
        return _lightning(tree, file, names)
    if _is_state_dict(tree) and all(is_weight(key, value) for key, value in tree.items()):
        return Saved(file, _KIND, STATE_DICT, {"model": tree})
    found = None if is_emptied_by_zero(tree) else _hand_written(tree, file, names, with_model=with_model)
    if found is not None:
        return found
    raise FormatError(obstacle(tree, file, _ROLE_KEYS["model"]), path=file)


def _is_composer(tree: Mapping[Any, Any]) -> bool:
    state = tree.get("state")
    return (
        isinstance(state, Mapping)
        and ("rng" in tree or set(tree) <= {"state", "rng"})
        and all(isinstance(key, str) for key in state)
        and any(key.removeprefix("_") in _COMPOSER_KEYS for key in state)
    )


def _composer(tree: Mapping[str, Any], file: str) -> Saved:
    # Before v0.4.1 the attributes were saved with a leading underscore.
    state = {key[1:] if key.startswith("_") else key: value for key, value in tree["state"].items()}
    for part in ("schedulers", "callbacks", "optimizers", "scaler"):
        if isinstance(state.get(part), list):
            try:
                state[part] = dict(state[part])
            except (TypeError, ValueError) as error:
                raise CorruptError(
                    f"{file}: state/{part} is a list, expected pairs of a name and a state", path=file
                ) from error
    rng = rng_list(tree.get("rng"))
    # In a form that is not known: returned to the caller as it is.
    taken = ("state", "rng") if rng or not tree.get("rng") else ("state",)
    extra = {key: value for key, value in tree.items() if key not in taken}
    return Saved(file, _KIND, "composer", state, rng, extra)


def _lightning(tree: Mapping[str, Any], file: str, names: _Names) -> Saved:
    optimizers, schedulers, scaler = names
    state: dict[str, Any] = {"model": _tensors(tree["state_dict"], "state_dict", file)}
    taken = {"state_dict"}
    for key, part, classes, kind in (
        ("optimizer_states", "optimizers", optimizers, "optimizer"),
        ("lr_schedulers", "schedulers", schedulers, "scheduler"),
    ):
        if tree.get(key):
            state[part] = by_class(list(tree[key]), classes, kind)
        taken.add(key)
    if isinstance(tree.get("callbacks"), Mapping) and tree["callbacks"]:
        state["callbacks"] = dict(tree["callbacks"])
        taken.add("callbacks")
    for key in ("native_amp_scaling_state", "MixedPrecision", "MixedPrecisionPlugin"):
        if tree.get(key):
            state["scaler"] = {scaler: tree[key]}
            taken.add(key)
    extra = {key: value for key, value in tree.items() if key not in taken}
    return Saved(file, _KIND, "lightning", state, None, extra)


def _tensors(value: Any, key: str, file: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CorruptError(f"{file}: {key} is a {kind_of(value)}, expected a dict of tensors", path=file)
    return value  # not copied: a copy would lose the ``_metadata`` attribute of torch's state dicts


def _hand_written(tree: Mapping[str, Any], file: str, names: _Names, *, with_model: bool) -> Saved | None:
    roles: dict[str, str] = {}
    for role, keys in _ROLE_KEYS.items():
        fitting = [key for key in keys if key in tree and _fits(role, tree[key])]
        if role == "optimizer":
            # An entry with an optimizer's own keys comes before one that is just a dict.
            fitting.sort(key=lambda key: not _is_optimizer_state(tree[key]))
        if fitting:
            roles[role] = fitting[0]
    if "model" not in roles and with_model:
        return None
    if not roles:
        return _one_part(tree, file, names)
    state, rng, extra = _parts(
        {role: tree[key] for role, key in roles.items()}, tree, set(roles.values()), names
    )
    return Saved(file, _KIND, "hand-written", state, rng, extra)


def _one_part(tree: Mapping[str, Any], file: str, names: _Names) -> Saved | None:
    """A file that is the state of one optimizer, scheduler or scaler, where the job has such a one and no model."""
    optimizers, schedulers, scaler = names
    own = {"optimizer": optimizers, "scheduler": schedulers, "scaler": scaler}
    role = lone_part(tree)
    if role is None or not own.get(role):
        return None
    state, rng, extra = _parts({role: tree}, tree, set(tree), names)
    return Saved(file, _KIND, "hand-written", state, rng, extra)


def _mapped(tree: Mapping[str, Any], file: str, layout: Mapping[str, str], names: _Names) -> Saved:
    parts: dict[str, Any] = {}
    taken = {key_path for key_path in layout.values() if "/" not in key_path}
    for role, key_path in layout.items():
        node: Any = tree
        at_root = not key_path.strip("/")
        if at_root and role == "model":
            weights = {key: tree[key] for key in tree if key not in taken and is_weight(key, tree[key])}
            taken.update(weights)
            node = weights if len(weights) < len(tree) else tree
        elif at_root:
            taken.update(tree)
        for key in [] if at_root else key_path.split("/"):
            if not isinstance(node, Mapping) or key not in node:
                keys = ", ".join(repr(k) for k in list(node)[:20]) if isinstance(node, Mapping) else "none"
                raise FormatError(
                    f"{file}: LoadOptions.layout maps {role} to {key_path!r}, but there is no {key!r}; "
                    f"keys there: {keys}",
                    path=file,
                )
            node = node[key]
        if role in _EXPECTED and not _fits(role, node):
            there = describe(node) if role == "model" else f"a {kind_of(node)}"
            raise FormatError(
                f"{file}: LoadOptions.layout maps {role} to {layout[role]!r}, where there is {there}; "
                f"expected {_EXPECTED[role]}",
                path=file,
            )
        parts[role] = node
    state, rng, extra = _parts(parts, tree, taken, names)
    return Saved(file, _KIND, "hand-written", state, rng, extra)


def _parts(
    parts: Mapping[str, Any], tree: Mapping[str, Any], taken: set[str], names: _Names
) -> tuple[dict[str, Any], list[Any] | None, dict[str, Any]]:
    """State, random states and the rest of a file, given its `parts` by role and the keys `taken` for them."""
    optimizers, schedulers, scaler = names
    state: dict[str, Any] = {}
    if "model" in parts:
        state["model"] = parts["model"]
    if parts.get("optimizer"):
        state["optimizers"] = by_class(_in_order(parts["optimizer"], optimizers), optimizers, "optimizer")
    if parts.get("scheduler"):
        state["schedulers"] = by_class(_in_order(parts["scheduler"], schedulers), schedulers, "scheduler")
    if parts.get("scaler"):
        state["scaler"] = {scaler: parts["scaler"]}
    if "timestamp" in parts:
        state["timestamp"] = parts["timestamp"]
    rng = rng_list(parts.get("rng"))
    extra = {key: value for key, value in tree.items() if key not in taken}
    if "rng" in parts and rng is None:
        extra["rng"] = parts["rng"]  # in a form that is not known: returned to the caller as it is
    return state, rng, extra


def _fits(role: str, value: Any) -> bool:
    """Whether `value` can be what `role` stands for, rather than a name or a setting under the same key."""
    if role == "model":
        return _is_state_dict(value)
    if role == "rng":
        return rng_list(value) is not None
    if role == "timestamp":
        return True
    if isinstance(value, list | tuple) and role != "scaler":
        return bool(value) and all(_fits(role, item) for item in value)
    return isinstance(value, Mapping) and (not value or any(item is not None for item in value.values()))


def _is_state_dict(value: Any) -> bool:
    """Whether `value` can be a module's state dict: its keys are strings, and some values tensors."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) for key in value)
        and any(can_be_restored(item) for item in value.values())
    )


def has_model(tree: Mapping[Any, Any]) -> bool:
    """Whether a file's dict has a state dict under one of the keys for it, or is Composer's or Lightning's."""
    return _is_composer(tree) or any(_is_state_dict(tree.get(key)) for key in _ROLE_KEYS["model"])


def is_weight(key: Any, value: Any) -> bool:
    """Whether a state dict can hold `value` under `key`: a tensor, or a module's extra state."""
    return isinstance(key, str) and (is_tensor(value) or key.rpartition(".")[2] == EXTRA_STATE)


def _is_optimizer_state(value: Any) -> bool:
    """Whether `value` has an optimizer's own keys; for a list, whether all its items have."""
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_optimizer_state(item) for item in value)
    return isinstance(value, Mapping) and bool({"state", "param_groups"} & set(value))


def _in_order(value: Any, classes: Sequence[str]) -> list[Any] | dict[str, Any]:
    """The states as a list in the file's order, or as a dict where the file has them under class names."""
    if isinstance(value, Mapping) and (
        set(value) <= set(classes) or all(_is_optimizer_state(item) for item in value.values())
    ):
        return dict(value)
    return list(value) if isinstance(value, list | tuple) else [value]


def by_class(states: list[Any] | dict[str, Any], classes: Sequence[str], kind: str) -> dict[str, Any]:
    """States under class names: those that are in a list get the names `classes`, in the same order."""
    if isinstance(states, dict):
        return states
    return {
        classes[index] if index < len(classes) else f"{kind}{index}": state
        for index, state in enumerate(states)
    }


def rng_list(value: Any) -> list[Any] | None:
    """Random states as a list with one entry for each rank; None where `value` is not of that form."""
    if are_random_states(value):
        return [dict(value)]
    if isinstance(value, list | tuple) and value and all(map(are_random_states, value)):
        return list(value)
    return None


def rng_of(tree: Any) -> list[Any] | None:
    """The random states that a file has under one of `RNG_KEYS`, as `rng_list`; None where it has none."""
    found = (rng_list(tree.get(key)) for key in RNG_KEYS if isinstance(tree, Mapping))
    return next((states for states in found if states is not None), None)
