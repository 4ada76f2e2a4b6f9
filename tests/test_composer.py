"""Real Composer's ``State`` restored by `load_checkpoint`, as its Trainer starts and afterwards.

Skipped where Composer is not installed. torchvision and mcli, which Composer imports, may be absent.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from places import DATA, SUPPORT
from processes import run_ranks

WORKER = str(SUPPORT / "composer_worker.py")
FULL = DATA / "composer-monolithic-w2" / "ep2-ba8-rank0.pt"
TAR = DATA / "composer-monolithic-w2" / "manual-ep2-ba8-rank0.tar"
WEIGHTS = DATA / "composer-monolithic-w2" / "weights-ba8-rank0.pt"


def composer_version() -> tuple[int, ...]:
    """(0, 32) for 0.32.1; () where Composer is not installed."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("mosaicml").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return ()


VERSION = composer_version()
if not VERSION:
    pytest.skip("Composer (mosaicml) is not installed", allow_module_level=True)

needs_newer = pytest.mark.skipif(VERSION < (0, 32), reason=f"needs Composer 0.32, found {VERSION}")
needs_deepspeed = pytest.mark.skipif(
    VERSION > (0, 27) or importlib.util.find_spec("deepspeed") is None,
    reason=f"needs DeepSpeed, and Composer 0.27, the last that supports it; found {VERSION}",
)


def run(function: str, world_size: int, *args: object, **environment: str | None) -> None:
    """Runs a function of the worker on every rank; all must end well."""
    paths = [str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    finished = run_ranks(
        f"{WORKER}:{function}",
        world_size,
        args=args,
        deadline_s=180,
        env={"PYTHONPATH": os.pathsep.join(filter(None, paths)), "NODE_RANK": "0", **environment},
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished


@needs_newer
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_trainer_starts_from_a_whole_checkpoint(world_size: int) -> None:
    run("full_loads", world_size, FULL, TAR)


@needs_newer
def test_without_a_launcher() -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
    alone: dict[str, Any] = dict.fromkeys((*names, "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"))
    run("added_afterwards", 1, FULL, **alone)


@needs_newer
def test_no_algorithm_is_added_to_a_wrapped_model() -> None:
    run("added_afterwards", 2, FULL)


@needs_newer
def test_a_job_that_has_the_algorithms_gets_none_added() -> None:
    run("algorithms_given", 2, FULL)


@needs_newer
def test_weights_only() -> None:
    run("weights_only", 2, FULL, WEIGHTS)


@needs_newer
def test_excluded_algorithms_leave_a_mismatch_or_what_fits() -> None:
    run("excluded", 2, FULL)


@needs_newer
def test_no_text_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    run("hostile_texts", 2, FULL, tmp_path)


@needs_newer
def test_ignored_and_missing_parts(tmp_path: Path) -> None:
    run("left_out", 2, FULL, tmp_path)


@needs_newer
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_continues_as_after_composers_own_load(world_size: int) -> None:
    run("continues", world_size, FULL)


@needs_newer
def test_callbacks_metrics_and_the_dataset_are_restored(tmp_path: Path) -> None:
    run("callbacks_metrics_and_data", 2, tmp_path)


@needs_newer
def test_composer_loads_the_weights_that_we_save(tmp_path: Path) -> None:
    run("ours_to_theirs", 2, tmp_path)


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_archives_of_a_zero_job_into_an_engine(stage: int) -> None:
    folder = DATA / f"composer-zero{stage}-w2"
    run("zero_archives", 2, folder / "ep1-ba4-rank{rank}.pt.tar", stage, folder / "expected.json")
