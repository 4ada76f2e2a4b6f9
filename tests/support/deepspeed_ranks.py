"""What every test needs whose ranks make engines of DeepSpeed."""

from __future__ import annotations

import importlib.util

import pytest
from places import SUPPORT

ENVIRONMENT = {"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
