"""Names of checkpoints, and the steps that they tell."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.candidates.names import (
    escaped,
    is_checkpoint_file,
    looks_like_checkpoint,
    of_rank,
    step_of,
)
from rankload.loader.template import expand_for_rank_zero


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("global_step100", 100),
        ("checkpoint-42", 42),
        ("checkpoint_3", 3),
        ("step-7", 7),
        ("step000010.pt", 10),
        ("epoch=1-step=40.ckpt", 40),
        ("epoch=1-step=40-v1.ckpt", 40),
        ("ep1-ba250-rank0.pt", 250),
        ("iter_0005000", 5000),
        ("run7-step3.pt", 3),
        ("epoch3", None),
        ("last.ckpt", None),
        ("model-7b.pt", None),
        ("footstep3", None),
        ("steps", None),
    ],
)
def test_steps(name: str, step: int | None) -> None:
    assert step_of(name) == step


@given(st.sampled_from(["global_step{}", "checkpoint-{}", "step-{}", "ep2-ba{}"]), st.integers(0, 10**12))
def test_every_writers_own_names_tell_their_step(form: str, step: int) -> None:
    assert step_of(form.format(step)) == step


@given(st.text(st.characters(codec="ascii", exclude_characters="/\0"), min_size=1))
def test_an_escaped_name_is_that_name_for_a_load(name: str) -> None:
    if not any(mark in name for mark in "<>") and not name.startswith(("file:", "local:", "http")):
        assert expand_for_rank_zero(escaped(name), run_name=None) == name


@given(st.integers(0, 10**6))
def test_the_name_of_one_rank_gives_that_of_all(rank: int) -> None:
    found = of_rank(f"ep1-ba4-rank{rank}.pt.tar")
    assert found is not None
    assert found.template.format(rank=rank) == f"ep1-ba4-rank{rank}.pt.tar"
    assert found.template.format(rank=rank + 1) == f"ep1-ba4-rank{rank + 1}.pt.tar"


def test_parts_of_a_checkpoint_are_none_themselves() -> None:
    for name in (
        "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "random_states_0.pkl", "training_args.bin", ".hidden.pt",
        "mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "model.safetensors",
        "pytorch_model-00001-of-00002.bin", "last.pt.sha256", "last.pt.0123abcd.part", "config.json", "__0_0.distcp",
    ):  # fmt: skip
        assert not is_checkpoint_file(name), name
    for name in ("last.pt", "epoch=1-step=3.ckpt", "ep1-ba4-rank0.pt.tar", "step3.pth", "model.pt.zst"):
        assert is_checkpoint_file(name), name


def test_folders_that_have_nothing_of_a_checkpoint() -> None:
    assert not looks_like_checkpoint(frozenset({"events.out.tfevents.1", "logs", "config.yaml"}))
    assert looks_like_checkpoint(frozenset({".metadata", "__0_0.distcp"}))
    assert looks_like_checkpoint(frozenset({"__0_0.distcp"}))
    assert looks_like_checkpoint(frozenset({"latest", "global_step3"}))
