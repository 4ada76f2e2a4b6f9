"""What a checkpoint says of itself, and what is left of it without some of its parts."""

from __future__ import annotations

from typing import Any

import pytest
from rankload.loader.saved.contents import ENGINE, Saved

SAVED = Saved(
    "a checkpoint",
    "deepspeed",
    "deepspeed",
    {
        "model": {"w": 1},
        "optimizers": {"Adam": {}},
        ENGINE: {"global_steps": 3, "loss_scaler": 4, "cur_scale": 5, "clip_grad": 1.0},
    },
    rng=[{}],
    rng_per_rank=True,
)


def test_parts_are_taken_out_before_and_after_ignoring() -> None:
    left = SAVED.with_tree({"state": {**SAVED.state, "model": {}}, "rng": [{}]}).without(
        ["optimizers", "rng"]
    )
    assert left.state.keys() == {"model", ENGINE}
    assert (left.state["model"], left.whole.state["model"]) == ({}, {"w": 1})
    assert left.whole.state.keys() == {"model", ENGINE}
    assert (left.rng, left.whole.rng, left.rng_per_rank) == (None, None, False)
    assert SAVED.paths_of(["optimizers", "rng", "schedulers"]) == ("state/optimizers", "rng")
    assert SAVED.without([]) == SAVED
    assert SAVED.paths_of([]) == ()


def test_an_engines_loss_scaler_goes_with_the_scaler() -> None:
    assert SAVED.without(["scaler"]).state[ENGINE] == {"global_steps": 3, "clip_grad": 1.0}
    assert SAVED.paths_of(["scaler"]) == ("state/engine/loss_scaler", "state/engine/cur_scale")
    assert SAVED.without(["optimizers"]).state[ENGINE] == SAVED.state[ENGINE]


@pytest.mark.parametrize(
    ("state", "extra", "engine_steps", "expected"),
    [
        ({}, {"epoch": 3, "global_step": 70}, None, (70, 3)),
        ({}, {"epoch": 0, "step": 0}, None, (0, 0)),
        ({}, {"iteration": 9}, None, (9, None)),
        ({}, {"epoch": 1.5, "step": True}, None, (None, None)),
        ({}, {"global_step": 7, "step": 7}, None, (7, None)),
        ({}, {"global_step": 70, "step": 7}, None, (None, None)),
        ({"timestamp": {"Timestamp": {"batch": 4, "epoch": 1}}}, {"step": 7}, 5, (4, 1)),
        ({"timestamp": {"batch": 4}}, {"epoch": 2}, None, (4, 2)),
        ({"timestamp": "today"}, {}, None, (None, None)),
        ({}, {"epoch": 2, "step": 7}, 5, (5, 2)),
        ({}, {}, 0, (0, None)),
        ({}, {}, None, (None, None)),
    ],
)
def test_step_and_epoch_where_the_checkpoint_knows_them(
    state: dict[str, Any],
    extra: dict[str, Any],
    engine_steps: int | None,
    expected: tuple[int | None, int | None],
) -> None:
    saved = Saved("a.pt", "monolithic", "hand-written", state, extra=extra, global_steps=engine_steps)
    assert (saved.step, saved.epoch) == expected
    left = saved.with_tree({"state": {}})
    assert (left.step, left.epoch) == expected
