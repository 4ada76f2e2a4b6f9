"""The folders that DeepSpeed saved at four ranks, with what they must restore to; tests/data keeps them packed."""

from __future__ import annotations

import tarfile
from pathlib import Path

from places import DATA


def unpack_zero(stage: int, target: Path) -> Path:
    """Unpacks the one of `stage` (1 or 3) into `target`; the folder ``s1-w4`` or ``s3-w4`` in there."""
    with tarfile.open(DATA / f"deepspeed-zero{stage}-w4.tar") as archive:
        archive.extractall(target, filter="data")
    return target / f"s{stage}-w4"
