"""What is left of a checkpoint without some of its parts."""

from __future__ import annotations

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
