"""Names the parameters of an optimizer and of its saved state, by which the two are matched. Pure.

Names come from the model, and from the optimizers' own ``param_names`` for parameters that are not the model's, such as
a loss function's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

Key = tuple[int, Any]
"""A saved group's index, and the key of a parameter's state."""


def names_of_saved(groups: Sequence[Mapping[str, Any]], state: Collection[Any]) -> dict[str, Key] | None:
    """The saved parameters by name; None where the checkpoint has no names, or uses one for two parameters."""
    found: dict[str, Key] = {}
    for index, group in enumerate(groups):
        names = group.get("param_names")
        if not isinstance(names, list | tuple) or len(names) != len(group["params"]):
            names = group["params"]
        if not all(isinstance(name, str) for name in names):
            return None
        for name, key in zip(names, group["params"], strict=True):
            if name in found and found[name] != (index, key):
                return None
            found[name] = (index, key)
    # Composer 0.32 writes names in ``state``; where a parameter has none there, its group still lists it.
    return found if found or not state else None


def names_of_own(groups: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[str]:
    """By position: a name for each of this job's parameters, the model's (`names`, by ``id``) or the optimizer's."""
    found: list[str] = []
    taken = set(names.values())
    for group in groups:
        given = group.get("param_names") or ()
        for index, parameter in enumerate(group["params"]):
            name = names.get(id(parameter))
            if name is None:
                name = str(given[index]) if index < len(given) else ""
                if not name or name in taken:
                    name = f"(unnamed parameter {len(found)})"
                taken.add(name)
            found.append(name)
    return found


def matched_by_place(
    groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
    own_names: Sequence[str],
    unmatched: Collection[str],
    left_over: Mapping[Key, str],
) -> dict[str, str]:
    """This job's names to the checkpoint's, for those parameters `unmatched` that are not the model's.

    They take the saved ones that are `left_over` and have the same place in the same group, as they would if the
    checkpoint had no names.
    """
    found: dict[str, str] = {}
    position = 0
    for index, group in enumerate(groups):
        keys = saved_groups[index]["params"] if index < len(saved_groups) else ()
        for place in range(len(group["params"])):
            if own_names[position] in unmatched and len(keys) == len(group["params"]):
                source = left_over.get((index, keys[place]))
                if source is not None:
                    found[own_names[position]] = source
            position += 1
    return found


def unplaced(expected: Sequence[int], got: Sequence[int]) -> str:
    """What is wrong where a checkpoint without names has groups of `got` parameters, and this job of `expected`."""
    return (
        f"expected parameter groups of {list(expected)} parameters, got {list(got)}; the checkpoint does not name its "
        "optimizer's parameters, so they can only be matched by position: make the groups that were saved, or leave "
        "the optimizer out with LoadOptions(leave_out=['optimizer'])"
    )
