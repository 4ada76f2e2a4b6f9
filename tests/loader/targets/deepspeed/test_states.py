"""New state of an engine's optimizer: what a restore does not fill is zero, as the optimizer would have made it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.saved.strided import Layout
from rankload.loader.targets.deepspeed.states import new_state


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=4), st.booleans())
def test_what_is_not_filled_is_zero(filled: list[tuple[int, int]], step: bool) -> None:
    """In memory that held something before, whatever is filled of it; filled in steps, all is zero first."""
    empty_like = torch.empty_like

    def dirty(*arguments: Any, **named: Any) -> torch.Tensor:
        return empty_like(*arguments, **named).fill_(float("nan"))

    layouts = [Layout((length,), (2 if step and length > 1 else 1,), start) for start, length in filled]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", dirty)
        made = new_state(torch.ones(12, dtype=torch.bfloat16), "float32", layouts)
        whole = new_state(torch.ones(3, 4).t(), "float32", [Layout((3,), (1,), 0)])
    assert made.dtype == torch.bfloat16
    runs = [one for one in layouts if one.is_contiguous]
    kept = {at for one in runs for at in range(one.offset, one.offset + one.numel)}
    assert {at for at in range(12) if made[at] != 0} == kept
    assert not whole.any()
    assert whole.stride() == (1, 4)
