"""Checkpoints that one DeepSpeed saved, restored into another's engines: `make test-older` tells where the older is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reshard_runs import Case, run

OLDER = os.environ.get("OLDER_PYTHON", "")
pytestmark = pytest.mark.skipif(not OLDER, reason="make test-older runs it")

CASES: tuple[Case, ...] = (
    ("0 fp32", 4, "1 fp32"),
    ("1 bf16 round-robin", 4, "3 bf16"),
    ("1 bf16 round-robin", 4, "0 bf16"),
    ("2 bf16 elastic", 4, "2 bf16"),
    ("2 fp32 round-robin", 4, "2 fp32 round-robin"),
    ("3 bf16 subgroups", 4, "1 bf16 round-robin"),
    ("3 bf16 subgroups", 4, "3 fp32"),
)
"""Settings that both versions have."""
NEWER_ONLY: tuple[Case, ...] = (
    ("0 bf16", 4, "0 bf16"),
    ("1 BF16_Optimizer", 4, "1 bf16"),
    ("2 bf16 aligned", 4, "3 bf16"),
)
"""Checkpoints that only the newer writes."""


def version_of(python: str) -> str:
    code = "from importlib.metadata import version; print(version('deepspeed'))"
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


@pytest.mark.parametrize("older_saves", [True, False], ids=["older saves", "newer saves"])
def test_the_other_versions_checkpoints(tmp_path: Path, older_saves: bool) -> None:
    assert version_of(OLDER) != version_of(sys.executable)
    saver, restorer = (OLDER, sys.executable) if older_saves else (sys.executable, OLDER)
    cases = CASES if older_saves else (*CASES, *NEWER_ONLY)
    sources = list(dict.fromkeys(source for source, _, _ in cases))
    run(4, "main", "save", json.dumps({"root": str(tmp_path), "settings": sources}), python=saver)
    request = {"root": str(tmp_path), "oracles": str(tmp_path), "cases": cases}
    told = run(2, "main", "restore", json.dumps(request), python=restorer)
    assert len(told) == len(cases)
    assert [(one["source"], one["target"], one["problems"]) for one in told if one["problems"]] == []
