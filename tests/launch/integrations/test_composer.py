"""A real Composer Trainer starts from a checkpoint by our callback, at another world size too."""

from __future__ import annotations

import importlib
import os
import sys
import types
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
from framework_jobs import Publish
from places import SUPPORT
from processes import run_ranks

pytest.importorskip("torch")
WORKER = str(SUPPORT / "composer_adapter_worker.py")
PYTHON = os.environ.get("COMPOSER_PYTHON", "")
"""An interpreter that has Composer, of `make test-composer`; without it the tests of a real Trainer are skipped."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PYTHON:
        pytest.skip("make test-composer runs it")
    folder = tmp_path_factory.mktemp("composer")
    run("save", 2, folder)
    return folder


def run(function: str, world_size: int, *args: object, **env: str) -> None:
    paths = [str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    finished = run_ranks(
        f"{WORKER}:{function}",
        world_size,
        args=args,
        deadline_s=180,
        env={"PYTHONPATH": os.pathsep.join(filter(None, paths)), "NODE_RANK": "0", **env},
        python=PYTHON,
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished


@pytest.mark.parametrize(
    ("world_size", "scheme"), [(1, "file"), (2, "file"), (3, "file"), (2, "http"), (3, "s3")]
)
def test_a_trainer_goes_on(saved: Path, published: Publish, world_size: int, scheme: str) -> None:
    with published(scheme, saved / "ep0-ba4-rank0.pt") as place:
        run("resume", world_size, saved, place.uri, **place.env)


@pytest.mark.parametrize("rng", [True, False])
def test_another_batch_is_warned_of_whether_or_not_random_states_were_saved(
    rng: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Composer: the callback's own part in what a Trainer calls."""
    from rankload import LoadResult, capture_rng

    core, dist = types.ModuleType("composer.core"), types.ModuleType("composer.utils.dist")
    core.Callback = object  # type: ignore[attr-defined]
    dist.get_world_size = lambda: 2  # type: ignore[attr-defined]
    for module in (core, dist):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "rankload.integrations.composer", raising=False)
    adapter = importlib.import_module("rankload.integrations.composer")
    monkeypatch.delitem(sys.modules, "rankload.integrations.composer")
    result = Mock(spec=LoadResult, rng_states=[capture_rng()] if rng else None)
    monkeypatch.setattr(adapter, "load", lambda *_, **__: result)
    state = types.SimpleNamespace(
        run_name="run",
        timestamp=types.SimpleNamespace(sample_in_epoch=24, batch_in_epoch=4),
        dataloader=types.SimpleNamespace(batch_size=4),
    )
    callback = adapter.LoadCheckpoint("run/ep0-ba4-rank0.pt")
    callback.before_load(state, None)
    with pytest.warns(UserWarning, match="a step was 6 samples when the checkpoint was saved, and is 8 here"):
        callback.batch_start(state, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.batch_start(state, None)
