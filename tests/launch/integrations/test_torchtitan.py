"""What torchtitan's adapter does of itself, without torchtitan: counters at another number of ranks, warnings."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankload import OptionError


@pytest.fixture(scope="module")
def adapter() -> Iterator[Any]:
    """The adapter, beside a torchtitan that has what it needs to be imported."""
    components, train = (
        types.ModuleType("torchtitan.components.checkpoint"),
        types.ModuleType("torchtitan.train"),
    )
    components.CheckpointManager = object  # type: ignore[attr-defined]
    for name in ("MODEL", "OPTIMIZER", "LR_SCHEDULER", "DATALOADER", "TRAIN_STATE"):
        setattr(components, name, name.lower())
    with pytest.MonkeyPatch.context() as patch:
        for module in (components, train):
            patch.setitem(sys.modules, module.__name__, module)
        patch.delitem(sys.modules, "rankload.integrations.torchtitan", raising=False)
        made = importlib.import_module("rankload.integrations.torchtitan")
        patch.delitem(sys.modules, "rankload.integrations.torchtitan")
        yield made


@given(tokens=st.integers(0, 10**12), saved=st.integers(1, 64), now=st.integers(1, 64))
def test_the_tokens_of_all_ranks_together_stay(adapter: Any, tokens: int, saved: int, now: int) -> None:
    ranks = [SimpleNamespace(dp_rank=rank, dp_world_size=now) for rank in range(now)]
    found = [adapter._tokens_of_rank(tokens, saved, one) for one in ranks]
    assert sum(found) == tokens * saved
    assert max(found) - min(found) <= 1
    assert adapter._tokens_of_rank(tokens, None, ranks[0]) == tokens
    assert adapter._tokens_of_rank(tokens, saved, None) == tokens


def told(adapter: Any, owner: Any, numbers: dict[str, int], saved: int, now: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter._compare_batch(owner, SimpleNamespace(dp_world_size=now), numbers, saved)
    return [str(one.message) for one in caught]


def test_another_batch_is_warned_of_in_tokens(adapter: Any) -> None:
    training = SimpleNamespace(local_batch_size=2, seq_len=12)
    owner = SimpleNamespace(job_config=SimpleNamespace(training=training), gradient_accumulation_steps=1)
    numbers = {"step": 4, "ntokens_seen": 4 * 36}
    assert told(adapter, owner, numbers, 2, 3) == []
    (warning,) = told(adapter, owner, numbers, 2, 2)
    assert "a step was 72 tokens on average when the checkpoint was saved, and is 48 here" in warning
    (warning,) = told(adapter, object(), numbers, 2, 3)
    assert "was saved by 2 ranks, and here are 3; it does not tell" in warning
    assert told(adapter, object(), numbers, 2, 2) == []


def test_a_torchtitan_that_makes_its_manager_in_another_way_is_refused(adapter: Any) -> None:
    with pytest.raises(OptionError, match=r"in another way than 0\.2"), adapter.replaced():
        pass
