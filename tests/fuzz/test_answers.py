"""What comes over the network, made hostile: the same inputs in each run. `make fuzz` makes others."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

TARGETS = ["http-headers", "http-load", "peer"]


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_bytes_do_no_harm(tmp_path: Path, name: str) -> None:
    fuzz.check(name, tmp_path)
