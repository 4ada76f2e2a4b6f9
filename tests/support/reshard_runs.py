"""Runs of reshard_worker.py: ZeRO checkpoints that some ranks save and others restore."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepspeed_ranks import ENVIRONMENT
from places import SUPPORT
from processes import run_ranks
from reshard_worker import SETTINGS
from zero_model import lacking

WORKER = SUPPORT / "reshard_worker.py"

Case = tuple[str, int, str]
"""Setting that saved, by how many ranks, setting that restores."""


def run(world_size: int, function: str, *args: object, **options: Any) -> list[dict[str, Any]]:
    """Runs a function of the worker on every rank, all of which must end well; what rank 0 printed."""
    target = f"{WORKER}:{function}" if function != "main" else WORKER
    extra = options.pop("env", None)
    finished = run_ranks(
        target,
        world_size,
        args=args,
        deadline_s=options.pop("deadline_s", 300),
        env=lambda rank: {**ENVIRONMENT, **(extra(rank) if extra else {})},
        **options,
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    return [json.loads(line) for line in finished[0].stdout.splitlines() if line.startswith("{")]


def save(root: Path, world_size: int, settings: Sequence[str]) -> Path:
    settings = [setting for setting in settings if not lacking(SETTINGS[setting], saves=True)]
    run(world_size, "main", "save", json.dumps({"root": str(root), "settings": settings}))
    return root
