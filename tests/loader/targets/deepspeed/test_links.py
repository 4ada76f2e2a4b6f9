"""DeepSpeed's per-parameter views of the optimizer's state: made at once, they are those that it makes one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.targets.deepspeed.links import link_group, link_state

pytest.importorskip("deepspeed")


def mapping(start: int, numel: int) -> Any:
    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

    nothing: Any = None
    return tensor_fragment(
        lp_fragment=nothing,
        lp_fragment_address=nothing,
        hp_fragment=nothing,
        hp_fragment_address=fragment_address(numel=numel, start=start),
        gradient_dict={},
        offload_gradient_dict={},
        use_offload=False,
        param_group_index=0,
    )


def group_of(addresses: list[tuple[int, int] | None]) -> list[Any]:
    return [SimpleNamespace(_hp_mapping=None if one is None else mapping(*one)) for one in addresses]


def fragments(group: list[Any]) -> list[Any]:
    return [
        None
        if one._hp_mapping is None
        else {
            key: (value.data_ptr(), value.shape, value.stride(), value.dtype, value._base.data_ptr())
            for key, value in one._hp_mapping.optim_fragment.items()
        }
        for one in group
    ]


def new_state(numel: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """A partition, and its state: some of it is no tensor, or of another shape."""
    state = {
        "step": torch.tensor(3.0),
        "exp_avg": torch.zeros(numel),
        "count": 3,
        "exp_avg_sq": torch.zeros(numel),
    }
    return torch.zeros(numel), state


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), max_size=8), st.randoms(), st.integers(0, 4))
def test_views_are_those_of_deepspeed(parts: list[tuple[int, int]], order: Any, padding: int) -> None:
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    addresses: list[tuple[int, int] | None] = []
    position = 0
    for gap, numel in parts:
        addresses.append((position + gap, numel))
        position += gap + numel
    addresses.append(None)  # a parameter without elements in this partition
    order.shuffle(addresses)
    master, state = new_state(position + padding)
    ours, theirs = group_of(addresses), group_of(addresses)
    assert link_group(ours, master, state)
    lazy_init_hp_params_optimizer_state(theirs, master, {master: state})
    assert fragments(ours) == fragments(theirs)
    for one in ours:
        if one._hp_mapping is not None:
            one._hp_mapping.optim_fragment["exp_avg"].fill_(1)
    assert state["exp_avg"].sum() == sum(numel for _, numel in parts)


@pytest.mark.parametrize("addresses", [[(0, 4), (3, 2)], [(0, 4), (6, 5)]])
def test_fragments_that_share_elements_or_reach_beyond_are_left_to_deepspeed(
    addresses: list[tuple[int, int] | None],
) -> None:
    assert not link_group(group_of(addresses), *new_state(8))


def test_what_deepspeed_does_besides_is_not_left_out() -> None:
    """A version that links in another way links all parameters itself."""
    linked: list[Any] = []

    class Other:
        def __init__(self) -> None:
            self.hp_fragment_address = SimpleNamespace(start=0, numel=4)
            self.optim_fragment: Any = None
            self.links = 0

        def set_optim_state_fragment(self, master: torch.Tensor, state: dict[str, Any]) -> None:
            self.optim_fragment = {"exp_avg": state["exp_avg"][:4], "exp_avg_sq": state["exp_avg_sq"][:4]}
            self.links += 1

    master, state = new_state(8)
    group = [SimpleNamespace(_hp_mapping=Other())]
    assert not link_group(group, master, state)
    optimizer = SimpleNamespace(
        bit16_groups=[group],
        _hp_optimizer_states_linked=True,
        _lazy_init_hp_params_optimizer_state=lambda: linked.append(optimizer._hp_optimizer_states_linked),
    )
    live: Any = SimpleNamespace(
        kind="zero",
        engine=SimpleNamespace(optimizer=optimizer),
        optimizer=SimpleNamespace(state={master: state}),
        flats=(SimpleNamespace(master=master),),
    )
    link_state(live)
    assert linked == [False]
    live.optimizer.state.clear()
    link_state(live)
    assert linked == [False]
    assert optimizer._hp_optimizer_states_linked is False
