"""Modules whose loading runs code of their own: hooks, or an overridden loader. Imports torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import PartialRestoreError
from .fsdp import TORCH_OWN


def loading_overrides(module: nn.Module) -> list[str]:
    """Prefixes of the parts whose loading runs code of the user's: hooks, or an overridden loader.

    Parts that save nothing do not count: they are not loaded (metrics, for one).
    """
    own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    saved = module.state_dict(keep_vars=True)
    if any(isinstance(value, torch.Tensor) and name not in own for name, value in saved.items()):
        return [""]
    found = []
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if any(key.startswith(prefix) for key in saved) and _overrides_loading(part):
            found.append(prefix)
    return found


def _overrides_loading(part: nn.Module) -> bool:
    hooks = (*part._load_state_dict_pre_hooks.values(), *part._load_state_dict_post_hooks.values())
    if not all(str(getattr(_plain(hook), "__module__", "")).startswith(TORCH_OWN) for hook in hooks):
        return True
    return any(
        not getattr(getattr(type(part), method), "__module__", "").startswith("torch.")
        for method in ("_load_from_state_dict", "load_state_dict")
    )


def _plain(hook: Any) -> Any:
    """The function that torch wrapped to register it."""
    return getattr(hook, "hook", hook)


def load_through_hooks(
    module: nn.Module, real: Mapping[str, Any], metadata: Any, excused: Collection[str], *, strict: bool
) -> None:
    """Hands `real` to the module's own ``load_state_dict``, with the saved parts' versions (`metadata`).

    Names in `excused` may be missing. Raises `PartialRestoreError` for what the module refuses or leaves out.
    """
    given = OrderedDict(real)
    if metadata is not None:
        given._metadata = metadata  # type: ignore[attr-defined]
    try:
        # Not strictly: torch would miss what was ignored, or is tied to a name that is there.
        told = module.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise PartialRestoreError(
            f"{type(module).__name__}.load_state_dict failed: {error}", changed=("model",)
        ) from error
    missing = [name for name in getattr(told, "missing_keys", ()) if name not in excused]
    unexpected = list(getattr(told, "unexpected_keys", ()))
    if strict and (missing or unexpected):
        raise PartialRestoreError(
            f"{type(module).__name__}.load_state_dict, which is not torch's own, left names out; missing: "
            f"{', '.join(missing[:20]) or 'none'}; unexpected: {', '.join(unexpected[:20]) or 'none'}",
            changed=("model",),
        )
