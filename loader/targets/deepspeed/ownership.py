"""Finds the DeepSpeed engine behind a module or an optimizer that the caller passed in the engine's place.

DeepSpeed's optimizers update tensors of their own, from which the module's weights are overwritten at each step. So a
module that such an optimizer trains can only be restored together with its engine. Nothing in a module names its
engine, so the engines of this process are looked for among all its objects. DeepSpeed is not imported.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...errors import LayoutError
from ...state import layers_of
from .live import engine_class, is_deepspeed_engine, optimizer_kind

_ADVICE = (
    "pass the engine that deepspeed.initialize returned: State(model=engine), which brings its optimizer"
)
_MOST_WRAPPERS = 8
"""Around an optimizer."""


def engine_behind(model: Any, optimizers: Sequence[Any]) -> Any | None:
    """The engine that `model` is, wraps, or is the module of; None where `model` is to be restored by itself.

    None too for the module of an engine whose torch optimizer updates the module's own tensors (stage 0 in fp32), where
    `optimizers` are given: both can be restored as they are. No rank waits for another.

    Raises `LayoutError` where a DeepSpeed optimizer updates parameters of `model`, or is one of `optimizers`, and it is
    not certain which engine that belongs to.
    """
    if "deepspeed" not in sys.modules:
        return None
    layers = list(layers_of(model))
    if is_deepspeed_engine(layers[-1]):
        return layers[-1]
    engines = _engines()
    around = [engine for engine in engines if _is_module_of(engine, layers)]
    if len(around) == 1:
        return around[0] if _has_own_tensors(around[0]) or not optimizers else None
    if len(around) > 1 and any(map(_has_own_tensors, around)):
        raise LayoutError(
            f"{type(model).__name__} is the module of {len(around)} DeepSpeed engines, and it is not certain which of "
            f"them trains it: {_ADVICE}"
        )
    owner = _owner(layers[-1], engines)
    if owner is not None:
        raise LayoutError(
            f"State(model={type(model).__name__}) has parameters that {owner}; what is loaded into such a module is "
            f"overwritten at the next step, or does not fit it: {_ADVICE}"
        )
    for optimizer in optimizers:
        if any(map(_is_deepspeeds, _wrapped(optimizer))):
            raise LayoutError(
                f"State holds a {type(optimizer).__name__}, an optimizer of a DeepSpeed engine, and the model is not "
                f"that engine's: {_ADVICE}"
            )
    return None


def is_part_of(engine: Any, optimizer: Any) -> bool:
    """Whether `optimizer` is the engine's: DeepSpeed's, the one inside it, or a wrapper of either."""
    own = [
        *_wrapped(vars(engine).get("optimizer")),
        vars(engine).get("basic_optimizer"),
        vars(engine).get("client_optimizer"),
    ]
    return any(one is other for one in _wrapped(optimizer) for other in own)


def _engines() -> list[Any]:
    """This process's engines that were initialised and not destroyed."""
    kind = engine_class()
    # `deepspeed.initialize` sets it before it makes an engine. Without it there is no need to look through all objects,
    # 0.2 s for a million of them.
    communicates = getattr(sys.modules.get("deepspeed.comm.comm"), "cdb", kind) is not None
    if kind is None or not communicates:
        return []
    # Not isinstance: some objects run code to say what they are. An engine's attributes come from its ``__dict__``,
    # because it answers for its module's too.
    return [
        one
        for one in gc.get_objects()
        if issubclass(type(one), kind)
        and "module" in vars(one).get("_modules", ())
        and "optimizer" in vars(one)
        and not _is_destroyed(vars(one)["optimizer"])
    ]


def _is_destroyed(optimizer: Any) -> bool:
    """Whether ``engine.destroy()`` was called, which takes the hooks off that hand gradients to the optimizer."""
    hooks: Sequence[Any] = getattr(optimizer, "_grad_acc_hooks", ())
    return bool(hooks) and all(map(_is_removed, hooks))


def _is_removed(handle: Any) -> bool:
    hooks_of = getattr(handle, "hooks_dict_ref", None)
    if not callable(hooks_of):
        return False
    hooks = hooks_of()
    return hooks is None or handle.id not in hooks


def _is_module_of(engine: Any, layers: Sequence[Any]) -> bool:
    return any(one is other for one in layers_of(engine.module) for other in layers)


def _has_own_tensors(engine: Any) -> bool:
    """Whether the module's parameters are not all that must be restored: an optimizer has masters, or stage 3 keeps
    shares. Raises `LayoutError` for an optimizer that is not known."""
    return optimizer_kind(engine.optimizer) not in ("plain", "none") or any(
        hasattr(one, "ds_id") for one in engine.module.parameters()
    )


def _owner(module: Any, engines: Sequence[Any]) -> str | None:
    """What of DeepSpeed's updates or partitions a parameter of `module`, for a message; None where nothing does."""
    parameters = list(module.parameters()) if isinstance(module, torch.nn.Module) else []
    own = {id(one) for one in parameters}
    for engine in engines:
        if any(id(one) in own for one in engine.module.parameters()) and _has_own_tensors(engine):
            return (
                f"the optimizer of a DeepSpeed engine updates, {type(engine.optimizer).__name__}, and the model is "
                f"not that engine's whole module, which is a {type(engine.module).__name__}"
            )
    if any(hasattr(one, "ds_id") for one in parameters):
        return (
            "DeepSpeed has partitioned (stage 3, or deepspeed.zero.Init), and no engine has it as its module"
        )
    if any(getattr(one, "_hp_mapping", None) is not None for one in parameters):
        return "an optimizer of DeepSpeed updates, and no engine has it as its module"
    return None


def _wrapped(optimizer: Any) -> Iterator[Any]:
    """`optimizer`, and the ones inside it, as Accelerate's wrappers and DeepSpeed's optimizers hold them."""
    for _ in range(_MOST_WRAPPERS):
        if optimizer is None:
            return
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def _is_deepspeeds(optimizer: Any) -> bool:
    """Whether it is one that DeepSpeed puts around an optimizer of torch's."""
    return not isinstance(optimizer, torch.optim.Optimizer) and any(
        base.__module__.startswith("deepspeed.runtime.") for base in type(optimizer).__mro__
    )
