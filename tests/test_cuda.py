"""Jobs whose tensors lie on a CUDA device, one rank each: what holds on the CPU holds there."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bad_server import Behaviour, bad_server
from cuda_worker import save_large
from places import SUPPORT
from processes import run_ranks
from zero_folders import unpack_zero

pytest.importorskip("safetensors")

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with ``s1-w4`` and ``s3-w4``, which DeepSpeed saved at four ranks, and a file of large tensors."""
    target = tmp_path_factory.mktemp("zero")
    for stage in (1, 3):
        unpack_zero(stage, target)
    save_large(str(target))
    return target


@pytest.fixture(scope="module")
def url(folders: Path) -> Iterator[str]:
    """The same from a server."""
    files = {f"/{path.relative_to(folders)}": path for path in folders.rglob("*") if path.is_file()}
    with bad_server({name: Behaviour(path.read_bytes()) for name, path in files.items()}) as server:
        yield server.url("")


def run(function: str, *arguments: object, tmp_path: Path) -> None:
    (finished,) = run_ranks(
        f"{SUPPORT / 'cuda_worker.py'}:{function}",
        1,
        args=(DEVICE, *arguments),
        deadline_s=300,
        env={
            "PYTHONPATH": str(SUPPORT),
            "DS_ACCELERATOR": DEVICE,
            "RANKLOAD_CACHE_DIR": str(tmp_path / "cache"),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        },
    )
    assert finished.returncode == 0, finished


def test_plain_modules_from_a_folder_and_a_server(folders: Path, url: str, tmp_path: Path) -> None:
    run("plain", folders, url, tmp_path=tmp_path)


def test_large_tensors_are_filled_where_they_lie(folders: Path, url: str, tmp_path: Path) -> None:
    run("large", folders, url, tmp_path=tmp_path)


def test_sharded_modules(folders: Path, tmp_path: Path) -> None:
    run("sharded", folders, tmp_path=tmp_path)


def test_the_devices_random_state(tmp_path: Path) -> None:
    run("random_states", tmp_path, tmp_path=tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_engines_of_every_stage(folders: Path, tmp_path: Path) -> None:
    run("engines", folders, tmp_path / "saved", tmp_path=tmp_path)
