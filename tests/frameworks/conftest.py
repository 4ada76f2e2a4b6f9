"""Tests with real frameworks, in an environment of their own: `make test-frameworks` makes it, and runs them."""

from __future__ import annotations

import os
import subprocess

import pytest

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
