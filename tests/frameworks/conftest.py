"""Tests with real frameworks, in an environment of their own: `make test-frameworks` makes it, and runs them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from framework_jobs import run_job

SavedRun = Callable[..., Path]
PYTHON = os.environ.get("FRAMEWORKS_PYTHON", "")


@pytest.fixture(scope="session")
def frameworks() -> str:
    """The interpreter that has them."""
    if not PYTHON:
        pytest.skip("make test-frameworks runs it")
    return PYTHON


@pytest.fixture(scope="session")
def torchtitan(frameworks: str) -> str:
    """The same, where it has torchtitan too."""
    code = "import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ('torchtitan', 'triton'))))"
    if subprocess.run([frameworks, "-c", code], check=False).returncode:
        pytest.skip("torchtitan is not installed, or not triton, which it needs")
    return frameworks


@pytest.fixture(scope="session")
def saved_run(frameworks: str, tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    """Runs ``save`` of a job (``trainer_resume_job``), once for each number of ranks and arguments; gives the folder
    that it wrote. A limit of time is passed as ``deadline_s``."""
    known: dict[tuple[object, ...], Path] = {}

    def save(job: str, world_size: int, *args: str, deadline_s: float) -> Path:
        key = (job, world_size, *args)
        if key not in known:
            folder = tmp_path_factory.mktemp("-".join(map(str, key)))
            run_job(frameworks, f"{job}.py:save", world_size, folder, *args, deadline_s=deadline_s)
            known[key] = folder
        return known[key]

    return save
