"""A real Composer Trainer starts from a checkpoint by our callback, at another world size too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from http_server import Served, counting_server
from places import SUPPORT
from processes import run_ranks

pytest.importorskip("torch")
WORKER = str(SUPPORT / "composer_adapter_worker.py")
PYTHON = os.environ.get("COMPOSER_PYTHON", "")
"""An interpreter that has Composer; without it these tests are skipped."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PYTHON:
        pytest.skip("COMPOSER_PYTHON names no interpreter with Composer (mosaicml)")
    folder = tmp_path_factory.mktemp("composer")
    run("save", 2, folder)
    return folder


def run(function: str, world_size: int, *args: object) -> None:
    finished = run_ranks(
        f"{WORKER}:{function}",
        world_size,
        args=args,
        deadline_s=180,
        env={"PYTHONPATH": str(SUPPORT), "NODE_RANK": "0"},
        python=PYTHON,
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_trainer_goes_on(saved: Path, world_size: int) -> None:
    run("resume", world_size, saved, saved / "ep0-ba4-rank0.pt")


def test_from_a_url(saved: Path) -> None:
    with counting_server({"/a.pt": Served((saved / "ep0-ba4-rank0.pt").read_bytes())}) as server:
        run("resume", 2, saved, server.url("/a.pt"))
