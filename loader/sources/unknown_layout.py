"""Says what stands in the way of reading a torch file's tree as a checkpoint, and what can be done about it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..plurals import counted
from ..saved.tensor import SavedTensor
from ..saved.values import GlobalName, InertArray, InertObject, InertTensor, can_be_restored, kind_of

__all__ = [
    "describe", "is_emptied_by_zero", "is_one_file_of_zero", "kind_name", "lone_part", "not_a_dict", "obstacle",
]  # fmt: skip

_DEPTH = 4
"""How deep state dicts are looked for."""
_SHOWN = 3
"""How many of them, or of other names, a message lists."""
_SCALER = frozenset({"scale", "growth_factor", "backoff_factor", "growth_interval"})
_LONE_PARTS = {
    "optimizer": ("an optimizer's state_dict", "restore it with State(model=None, optimizers=...)"),
    "scheduler": (
        "a learning-rate scheduler's state_dict",
        "restore it with State(model=None, schedulers=...)",
    ),
    "scaler": ("a gradient scaler's state_dict", "restore it with State(model=None, scaler=...)"),
    "rng": ("a rank's random states", "read it with rankload.read"),
}
"""By role: what a file of this part alone is, and what to do with it."""
_RANDOM = frozenset({"python", "numpy", "torch", "cpu", "cuda", "xla", "npu", "mlu", "musa", "hpu"})


def obstacle(tree: Mapping[Any, Any], file: str, model_keys: tuple[str, ...]) -> str:
    """Why `file`, whose pickle holds `tree`, is of no layout that is known.

    `model_keys` are the keys under which weights often are.
    """
    return (
        _of_deepspeed(tree, file)
        or _without_weights(tree, file)
        or _at_model_key(tree, file, model_keys)
        or _at_root(tree, file)
        or _elsewhere(tree, file)
        or _generic(tree, file, model_keys)
    )


def is_emptied_by_zero(tree: Mapping[Any, Any]) -> bool:
    """Whether `tree` is a DeepSpeed model file of stage 3, whose weights lie in the other files of its folder."""
    module = tree.get("module")
    if "ds_version" not in tree or not isinstance(module, Mapping):
        return False
    buffers = tree.get("buffer_names")
    buffers = buffers if isinstance(buffers, list) else ()
    parameters = [
        value for name, value in module.items() if isinstance(value, SavedTensor) and name not in buffers
    ]
    return bool(parameters) and not any(value.numel for value in parameters)


def is_one_file_of_zero(tree: Any) -> bool:
    """Whether `tree` is a DeepSpeed model file whose optimizer is in other files."""
    return (
        isinstance(tree, Mapping)
        and {"module", "ds_version"} <= tree.keys()
        and tree.get("optimizer") is None
    )


def _of_deepspeed(tree: Mapping[Any, Any], file: str) -> str | None:
    optimizer = tree.get("optimizer_state_dict")
    partitioned = isinstance(optimizer, Mapping) and bool(
        {"zero_stage", "partition_count", "base_optimizer_state", "fp32_flat_groups"} & set(optimizer)
    )
    if is_emptied_by_zero(tree):
        return (
            f"{file} is one rank's model file of a DeepSpeed checkpoint of stage 3, whose weights lie in all files of "
            "its folder together: pass the folder"
        )
    if "module" not in tree and (partitioned or ("optimizer_state_dict" in tree and "ds_version" in tree)):
        return (
            f"{file} is one rank's optimizer file of a DeepSpeed checkpoint, and its layout is not known without the "
            "other files: pass the folder that it lies in"
        )
    return None


def lone_part(tree: Mapping[Any, Any]) -> str | None:
    """The role of the one part of a job, other than its model, whose state `tree` is; None where it is none."""
    keys = {key for key in tree if isinstance(key, str)}
    if {"state", "param_groups"} <= keys and isinstance(tree["param_groups"], list):
        return "optimizer"
    if "last_epoch" in keys and not any(isinstance(value, SavedTensor) for value in tree.values()):
        return "scheduler"
    if keys >= _SCALER:
        return "scaler"
    return "rng" if keys and keys <= _RANDOM and keys & {"python", "numpy"} else None


def _without_weights(tree: Mapping[Any, Any], file: str) -> str | None:
    """For a file of one other part of a job."""
    role = lone_part(tree)
    if role is None:
        return None
    what, alone = _LONE_PARTS[role]
    return (
        f"{file} is {what} alone, and no model's weights are in it: its layout is not known as a checkpoint's. Pass "
        f"the file that has the weights, or one that has all parts in a dict; or {alone}"
    )


def _at_model_key(tree: Mapping[Any, Any], file: str, model_keys: tuple[str, ...]) -> str | None:
    for key in model_keys:
        value = tree.get(key)
        if isinstance(value, Mapping | InertObject | InertArray | list | tuple):
            inside = list(_state_dicts(value, key))
            if inside:
                return f"{file}: its layout is not known: {key!r} holds no tensors itself. {_pass_layout(inside, tree)}"
            found = describe(value)
            if isinstance(value, Mapping) and not _tells(value):
                continue  # settings, whose weights may be elsewhere
            return f"{file}: its layout is not known: {key!r} is {found}{_remedy(value)}"
    return None


def _at_root(tree: Mapping[Any, Any], file: str) -> str | None:
    """For a state dict in which some values are no tensors, or all are arrays or the like."""
    tensors = [key for key, value in tree.items() if can_be_restored(value)]
    others = [f"{key!r} ({kind_name(value)})" for key, value in tree.items() if key not in set(tensors)]
    if tensors:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        remedy = _remedy(tree) or (
            '. LoadOptions(layout={"model": "/"}) takes the tensors as the model and returns the others in result.extra'
        )
        return (
            f"{file}: its layout is not known: {counted(len(tensors), 'tensor')} at its top level, as in a state_dict, "
            f"and these entries are none: {', '.join(others[:_SHOWN])}{more}{remedy}"
        )
    if tree and _tells(tree) and all(isinstance(value, InertObject | InertArray) for value in tree.values()):
        return f"{file}: its layout is not known: it is {describe(tree)}{_remedy(tree)}"
    return None


def _elsewhere(tree: Mapping[Any, Any], file: str) -> str | None:
    inside = list(_state_dicts(tree, ""))
    return f"{file}: its layout is not known. {_pass_layout(inside, tree)}" if inside else None


def _generic(tree: Mapping[Any, Any], file: str, model_keys: tuple[str, ...]) -> str:
    keys = ", ".join(repr(key) for key in list(tree)[:20]) or "none"
    near = next((f" ({key!r} is {describe(tree[key])})" for key in model_keys if key in tree), "")
    return (
        f"{file}: its layout is not known: no dict of names and tensors was found in its first levels{near}; "
        f"top-level keys: {keys}. "
        'Say where things are with LoadOptions(layout={"model": "KEY", "optimizer": "KEY", ...}), '
        "where KEY may be nested, as in 'trainer/weights'"
    )


def not_a_dict(tree: Any, file: str) -> str:
    """Why `file`, whose pickle holds `tree`, which is no dict, is no checkpoint."""
    if isinstance(tree, InertObject | GlobalName):
        return (
            f"{file} holds one pickled {kind_name(tree)}, expected a dict: a whole object can only be rebuilt by "
            "running its code. Save its state_dict() instead"
        )
    return f"{file} holds {describe(tree)}, expected a dict. Save a state_dict(), or a dict of several"


def describe(value: Any) -> str:
    """What `value` is, for messages that say that it is no dict of names and tensors."""
    if isinstance(value, Mapping):
        if not value:
            return "an empty dict"
        if not all(isinstance(key, str) for key in value):
            odd = next(key for key in value if not isinstance(key, str))
            return f"a dict with keys that are no names, such as {str(odd)[:40]!r} of type {kind_name(odd)}"
        kinds = Counter(kind_name(one) for one in value.values())
        listed = ", ".join(f"{count} of type {kind}" for kind, count in kinds.most_common(_SHOWN))
        return f"a dict without tensors: its values are {listed}"
    if isinstance(value, InertObject) and isinstance(value.state, Mapping) and "_modules" in value.state:
        return f"a whole module, a pickled {value.global_name}"
    if isinstance(value, list | tuple):
        kinds = Counter(kind_name(one) for one in value)
        listed = ", ".join(f"{count} of type {kind}" for kind, count in kinds.most_common(_SHOWN))
        return f"a {type(value).__name__} without names" + (f": {listed}" if listed else ", and empty")
    name = kind_name(value)
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def kind_name(value: Any) -> str:
    """`kind_of`, but for a tensor that cannot be restored the name of its class, where it has one of its own."""
    if isinstance(value, InertTensor) and not value.known and value.global_name:
        return value.global_name
    return kind_of(value)


def _tells(value: Mapping[Any, Any]) -> bool:
    """Whether the values of a dict are such as weights could be, rather than settings."""
    return not value or any(isinstance(one, InertObject | InertArray) for one in value.values())


def _remedy(value: Any) -> str:
    values = list(value.values()) if isinstance(value, Mapping) else [value]
    kinds = {kind_name(one).rpartition(".")[2] for one in values if not isinstance(one, SavedTensor)}
    if kinds & {"DTensor", "ShardedTensor"}:
        return (
            ". A DTensor is one rank's shard: pass a path with {rank} that names the files of all ranks, or save full "
            "tensors, by torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True, cpu_offload=True))"
        )
    if any(isinstance(one, InertArray) for one in values):
        return ". Save tensors: {name: torch.from_numpy(array) for name, array in weights.items()}"
    if isinstance(value, InertObject):
        return ". It can only be rebuilt by running its code: save its state_dict() instead"
    return ""


def _pass_layout(inside: list[tuple[str, int]], tree: Mapping[Any, Any]) -> str:
    """Where dicts of names and tensors were found, and the option that says so."""
    listed = ", ".join(f"{path!r} ({counted(count, 'tensor')})" for path, count in inside[:_SHOWN])
    more = f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else ""
    entries = [f'"model": "{inside[0][0]}"']
    optimizer = next(_optimizers(tree, ""), None)
    if optimizer:
        entries.append(f'"optimizer": "{optimizer}"')
    which = "say which is the model, as in" if len(inside) > 1 else "pass"
    return f"Names and tensors are under {listed}{more}: {which} LoadOptions(layout={{{', '.join(entries)}}})"


def _state_dicts(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, int]]:
    """Where dicts of names and tensors lie below `value`, and how many tensors each has; optimizers' state left out."""
    if not isinstance(value, Mapping) or depth > _DEPTH or _is_optimizer(value):
        return
    count = sum(can_be_restored(one) for one in value.values())
    if path and count and all(isinstance(key, str) for key in value):
        yield path, count
        return
    for key, one in value.items():
        if isinstance(key, str) and key and "/" not in key:
            yield from _state_dicts(one, f"{path}/{key}" if path else key, depth + 1)


def _optimizers(value: Any, path: str, depth: int = 0) -> Iterator[str]:
    if not isinstance(value, Mapping) or depth > _DEPTH:
        return
    if _is_optimizer(value):
        yield path
        return
    for key, one in value.items():
        if isinstance(key, str) and key and "/" not in key:
            yield from _optimizers(one, f"{path}/{key}" if path else key, depth + 1)


def _is_optimizer(value: Mapping[Any, Any]) -> bool:
    return "state" in value and isinstance(value.get("param_groups"), list)
