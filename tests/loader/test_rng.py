from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from rankload.loader.errors import CorruptError, FormatError
from rankload.loader.rng import apply_rng, capture_rng, complete_states, decode, encode, restore_rng


def draws() -> tuple[Any, ...]:
    return (
        [random.random() for _ in range(3)],
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        float(np.random.randn()),
        torch.rand(3).tolist(),
        torch.randn(1).tolist(),
    )


def test_capture_and_apply_repeat_the_draws() -> None:
    random.gauss(0, 1)  # leaves half a pair behind
    np.random.randn()
    state = capture_rng()
    assert set(state) >= {"python", "numpy", "torch"}
    first = draws()
    assert draws() != first
    apply_rng(state)
    assert draws() == first


def test_the_way_between_ranks_keeps_every_bit() -> None:
    random.gauss(0, 1)
    np.random.randn()
    state = capture_rng()
    sent = decode(encode(state))
    first = draws()
    apply_rng(sent)
    assert draws() == first
    assert sent["python"] == state["python"]
    assert torch.equal(sent["torch"], state["torch"])


def test_lists_and_other_integers_are_taken_as_states() -> None:
    state = capture_rng()
    loose = {
        "python": [state["python"][0], list(state["python"][1]), state["python"][2]],
        "numpy": [state["numpy"][0], state["numpy"][1].astype(np.int64), *state["numpy"][2:]],
        "torch": state["torch"].tolist(),
    }
    first = draws()
    apply_rng(loose)
    assert draws() == first


@pytest.mark.parametrize(
    "broken",
    [
        {"torch": torch.zeros(3, dtype=torch.uint8)},
        {"python": (3, (1, 2, 3), None)},
        {"python": 5},
        {"numpy": ("MT19937", np.zeros(3, dtype=np.uint32), 0, 0, 0.0)},
        {"jax": 1},
    ],
)
def test_a_broken_state_changes_no_generator(broken: dict[str, Any]) -> None:
    state = capture_rng()
    with pytest.raises(FormatError, match=f"rng/{next(iter(broken))} is no random state"):
        apply_rng({**state, **broken})
    first = draws()
    apply_rng(state)
    assert draws() == first


@pytest.mark.parametrize("seed", [17, None])
def test_states_that_lack_are_derived_the_same_every_time_and_all_differ(seed: int | None) -> None:
    saved = [capture_rng()]
    random.random()
    states, derived = complete_states(saved, 4, seed)
    again, _ = complete_states(saved, 4, seed)
    assert len(states) == 4
    assert [text.split(" (")[0] for text in derived] == [f"rng of rank {rank}" for rank in (1, 2, 3)]
    seen = []
    for state, other in zip(states, again, strict=True):
        apply_rng(state)
        first = draws()
        apply_rng(other)
        assert draws() == first
        assert first not in seen
        seen.append(first)


@pytest.mark.parametrize(
    "payload", [b"nonsense", b"[1]", b'{"python": 1}', b'{"numpy": []}', b'{"torch": "*"}']
)
def test_what_is_no_random_state_is_not_taken_for_one(payload: bytes) -> None:
    with pytest.raises(CorruptError, match="a rank sent an RNG state that cannot be read"):
        decode(payload)


def test_another_seed_gives_other_states() -> None:
    saved = [capture_rng()]
    a, _ = complete_states(saved, 2, 1)
    b, _ = complete_states(saved, 2, 2)
    assert a[1]["python"] != b[1]["python"]


def test_a_smaller_world_keeps_the_first_ones() -> None:
    saved = [capture_rng(), capture_rng(), capture_rng()]
    states, derived = complete_states(saved, 2, None)
    assert len(states) == 2
    assert derived == ()


def test_a_position_without_a_state_is_derived_like_a_further_rank() -> None:
    saved = capture_rng()
    random.random()
    states, derived = complete_states([None, saved, None], 4, 17)
    assert states[1] is not saved
    assert states[1]["python"] == saved["python"]
    assert derived == tuple(f"rng of rank {rank} (from seed 17)" for rank in (0, 2, 3))
    whole, _ = complete_states([saved], 4, 17)
    assert [states[rank]["python"] for rank in (2, 3)] == [whole[rank]["python"] for rank in (2, 3)]
    _, derived = complete_states([None, saved], 2, None)
    assert derived == ("rng of rank 0 (from rank 1's state)",)


@pytest.mark.parametrize("saved", [[], [None, None]])
def test_without_any_state_none_is_made_up(saved: list[None]) -> None:
    assert complete_states(saved, 2, 17) == ([], ())


def test_nothing_to_restore_is_warned_of() -> None:
    state = capture_rng()
    first = draws()
    apply_rng(state)
    with pytest.warns(UserWarning, match="no RNG states to restore"):
        restore_rng(None)
    assert draws() == first
