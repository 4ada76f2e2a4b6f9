"""Links DeepSpeed's per-parameter views (``safe_get_full_optimizer_state`` and the like) to new state tensors.

At stages 1 and 2 each parameter knows its fragment of the partition, and views of that fragment in each state tensor of
the optimizer. DeepSpeed makes these views one by one, which takes longer than the whole restore of a small parameter.
`link_state` makes those of a partition at once. It first has DeepSpeed link one parameter; where that does anything but
set the views that are expected here, DeepSpeed links all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .live import LiveEngine

_GROUPS = {"zero": "bit16_groups", "bf16": "bf16_groups"}
"""Where DeepSpeed's optimizers keep the parameters of their groups; the groups are in the order of the flats."""


def link_state(live: LiveEngine) -> None:
    """Links the parameters of an engine of stage 1 or 2, whose optimizer has got new state tensors.

    Does nothing for other engines, and where the optimizer has no state yet: DeepSpeed links at the first step then.
    """
    optimizer = live.engine.optimizer
    link = getattr(optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if live.kind not in _GROUPS or link is None:
        return
    optimizer._hp_optimizer_states_linked = False
    states = live.optimizer.state
    if not all(flat.master in states for flat in live.flats):
        return
    groups = getattr(optimizer, _GROUPS[live.kind], ())
    if len(groups) != len(live.flats) or not all(
        link_group(group, flat.master, states[flat.master])
        for group, flat in zip(groups, live.flats, strict=True)
    ):
        link()
    optimizer._hp_optimizer_states_linked = True


def link_group(group: Sequence[Any], master: torch.Tensor, state: Mapping[str, Any]) -> bool:
    """Links the parameters of a `group`, whose partition is `master`, to its `state`; whether that could be done."""
    mappings = [one for one in (getattr(each, "_hp_mapping", None) for each in group) if one is not None]
    if not mappings:
        return True
    first = mappings[0]
    try:
        before = dict(vars(first))
        first.set_optim_state_fragment(master, state)
        after = dict(vars(first))
        addresses = [(one.hp_fragment_address.start, one.hp_fragment_address.numel) for one in mappings]
    except (AttributeError, TypeError):
        return False
    views: dict[str, list[torch.Tensor]] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == master.shape:
            found = _views(value, addresses)
            if found is None:
                return False
            views[key] = found
    if not _is_expected(before, after, {key: found[0] for key, found in views.items()}):
        return False
    for one, *own in zip(mappings, *views.values(), strict=True):
        one.optim_fragment = dict(zip(views, own, strict=True))
    return True


def _views(tensor: torch.Tensor, addresses: Sequence[tuple[int, int]]) -> list[torch.Tensor] | None:
    """The elements of each of `addresses` (start and length) in a `tensor`; None where some are in two of them."""
    order = sorted(range(len(addresses)), key=addresses.__getitem__)
    sizes: list[int] = []
    places: list[tuple[int, int]] = []
    position = 0
    for index in order:
        start, numel = addresses[index]
        if start < position:
            return None
        if start > position:
            sizes.append(start - position)
        places.append((index, len(sizes)))
        sizes.append(numel)
        position = start + numel
    if tensor.dim() != 1 or position > tensor.numel():
        return None
    parts = tensor.split_with_sizes([*sizes, tensor.numel() - position])
    return [parts[place] for _, place in sorted(places)]


def _is_expected(
    before: Mapping[str, Any], after: Mapping[str, Any], expected: Mapping[str, torch.Tensor]
) -> bool:
    """Whether DeepSpeed has set the `expected` views of one parameter, and nothing else.

    `before` and `after` are the attributes of what it did that to.
    """
    own = after.get("optim_fragment")
    others = [key for key in after if key != "optim_fragment"]
    return (
        isinstance(own, dict)
        and list(own) == list(expected)
        and all(isinstance(value, torch.Tensor) for value in own.values())
        and all(_is_same(own[key], value) for key, value in expected.items())
        and [key for key in before if key != "optim_fragment"] == others
        and all(after[key] is before[key] for key in others)
    )


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride(), one.dtype) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
        other.dtype,
    )
