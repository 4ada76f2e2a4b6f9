"""What a load returns of checkpoints that Composer and DeepSpeed wrote, and of files as Lightning and scripts write."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from places import DATA
from zero_folders import unpack_zero

from rankload import LoadResult, State, load, restore_rng


def loaded(path: Path | str, model: torch.nn.Module, **arguments: Any) -> LoadResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(path, State(model), strict_model_weights=False, progress_bar=False, **arguments)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("composer-monolithic-w2/ep2-ba8-rank0.pt", (8, 2)),
        ("composer-zero1-w2/ep1-ba4-rank{rank}.pt.tar", (4, 1)),
        ("composer-zero3-w2/ep1-ba4-rank{rank}.pt.tar", (4, 1)),
    ],
)
def test_composers_step_and_epoch(name: str, expected: tuple[int, int]) -> None:
    result = loaded(DATA / name, torch.nn.Module())
    assert (result.step, result.epoch) == expected
    assert loaded(DATA / name, torch.nn.Module(), load_weights_only=True).step == expected[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeeds_step_is_the_engines(tmp_path: Path, stage: int) -> None:
    folder = unpack_zero(stage, tmp_path)
    result = loaded(folder, torch.nn.Module())
    assert (result.step, result.epoch) == (3, result.extra["epoch"])
    ignored = loaded(folder, torch.nn.Module(), ignore_keys=["state/engine*", "epoch"])
    assert (ignored.step, ignored.epoch) == (3, result.epoch)
    assert loaded(folder, torch.nn.Module(), load_weights_only=True).step == 3


def test_the_step_and_epoch_of_files_of_training_scripts(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    path = tmp_path / "last.ckpt"
    lightning = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.5"}
    torch.save({**lightning, "epoch": 4, "global_step": 90}, path)
    assert (loaded(path, model).step, loaded(path, model).epoch) == (90, 4)
    torch.save({"model": model.state_dict(), "epoch": torch.tensor(4), "best": 3}, path)
    assert (loaded(path, model).step, loaded(path, model).epoch) == (None, None)


def test_a_result_prints_its_receipt_and_restores_the_random_states() -> None:
    result = loaded(DATA / "composer-monolithic-w2/ep2-ba8-rank0.pt", torch.nn.Module())
    shown = str(result).splitlines()
    assert shown[0].startswith("restored ")
    assert any(line.startswith("not restored: state/") for line in shown)
    assert any(line.startswith("unexpected in the checkpoint: ") for line in shown)
    restore_rng(result)
    drawn = torch.rand(3)
    restore_rng(result)
    assert torch.equal(torch.rand(3), drawn)
