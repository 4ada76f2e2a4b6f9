"""DeepSpeed engines restored from real checkpoints, by real ranks on gloo: see engine_worker.py for what is held."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from places import SUPPORT
from processes import run_ranks
from rankload.loader.targets.deepspeed.engine import is_deepspeed_engine
from zero_folders import unpack_zero
from zero_model import is_older

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or importlib.util.find_spec("safetensors") is None,
    reason="needs deepspeed and safetensors",
)

WORKER = SUPPORT / "engine_worker.py"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """The folder with ``s1-w4`` and ``s3-w4``: checkpoints of four ranks, with what they must restore to."""
    for stage in (1, 3):
        unpack_zero(stage, tmp_path)
    return tmp_path


def run(world_size: int, *steps: Any, deadline_s: float) -> str:
    finished = run_ranks(WORKER, world_size, args=steps, deadline_s=deadline_s, env={"DS_ACCELERATOR": "cpu"})
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    return finished[0].stdout


def test_stages_1_and_3_restore_bit_for_bit_on_four_ranks(checkpoints: Path) -> None:
    said = run(4, "fixtures", checkpoints, deadline_s=240)
    assert "stage 1: ok" in said
    assert "stage 3: ok" in said


@pytest.mark.takes_long
def test_every_stage_and_option_on_two_ranks(checkpoints: Path, tmp_path: Path) -> None:
    said = run(
        2,
        *("round_trips", tmp_path / "saved"),
        *("particulars", tmp_path / "particulars"),
        *("other_layouts", checkpoints),
        *("inner_modules", tmp_path / "inner"),
        *("other_kinds", tmp_path / "kinds"),
        deadline_s=500,
    )
    left_out = said.count(": left out")
    assert said.count(": ok") + left_out == 12 + 6 + 7 + 8 + 4, said
    assert is_older() or not left_out, said


def test_a_plain_module_is_no_engine() -> None:
    import torch

    assert not is_deepspeed_engine(torch.nn.Linear(1, 1))
    assert not is_deepspeed_engine(None)
