"""What tests need whose ranks make engines of DeepSpeed."""

from __future__ import annotations

import importlib.util

import pytest
from places import SUPPORT

WITHOUT = {"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
"""The environment of the jobs beside them that make none."""
ENVIRONMENT = {**WITHOUT, "DS_ACCELERATOR": "cpu"}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
