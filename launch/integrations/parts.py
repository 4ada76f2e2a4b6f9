"""Leaves parts of a checkpoint out of a load, besides those that its options leave out already. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ..loader import LoadOptions


def leave_out(
    options: LoadOptions | Mapping[str, Any] | None, parts: Collection[str]
) -> LoadOptions | Mapping[str, Any] | None:
    """`options` that leave out `parts` too. What is wrong with them stays in them: the load refuses it on all ranks."""
    if isinstance(options, LoadOptions):
        return replace(options, leave_out=_both(options.leave_out, parts))
    if options is None or isinstance(options, Mapping):
        fields = dict(options or {})
        return {**fields, "leave_out": _both(fields.get("leave_out", ()), parts)}
    return options


def _both(named: Any, parts: Collection[str]) -> Any:
    """Those that `leave_out` names, of which a string is one, and `parts`."""
    if not isinstance(named, Collection):
        return named
    return (*([named] if isinstance(named, str) else named), *parts)
