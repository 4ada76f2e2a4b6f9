"""DeepSpeed's own load, done by rankload: its arguments, what it returns, at any world size."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path

import pytest
from deepspeed_ranks import ENVIRONMENT
from framework_jobs import Publish
from places import SUPPORT
from processes import run_ranks

WORKER = str(SUPPORT / "deepspeed_adapter_worker.py")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def run(function: str, world_size: int, *args: object, **env: str) -> None:
    finished = run_ranks(
        f"{WORKER}:{function}", world_size, args=args, deadline_s=120, env={**ENVIRONMENT, **env}
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished


@pytest.fixture(scope="module", params=[2, 3], ids=["stage-2", "stage-3"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("run")
    run("save", 2, folder, request.param)
    return folder, request.param


@pytest.mark.parametrize(("world_size", "how"), [(1, "attached"), (2, "called"), (3, "replaced")])
def test_an_engine_goes_on_at_any_world_size(saved: tuple[Path, int], world_size: int, how: str) -> None:
    folder, stage = saved
    run("resume", world_size, folder, stage, folder, how)


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_from_a_uri(saved: tuple[Path, int], published: Publish, scheme: str) -> None:
    folder, stage = saved
    with published(scheme, folder) as place:
        run("resume", 2, folder, stage, place.uri, "attached", **place.env)


def test_what_is_left_out_and_what_is_refused(saved: tuple[Path, int]) -> None:
    folder, stage = saved
    run("parts", 2, folder, stage)


def test_replaced_undoes_itself_after_an_error_and_within_another() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed import DeepSpeedEngine
    from rankload.integrations import deepspeed as adapter

    own = DeepSpeedEngine.load_checkpoint
    with contextlib.suppress(KeyError), adapter.replaced():
        with adapter.replaced(lambda *_: "inner"):
            assert DeepSpeedEngine.load_checkpoint(None) == "inner"
        assert DeepSpeedEngine.load_checkpoint is adapter.load_checkpoint
        raise KeyError
    assert DeepSpeedEngine.load_checkpoint is own
