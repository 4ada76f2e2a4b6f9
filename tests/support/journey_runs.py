"""Runs of journey_worker.py: one function on every rank, which must all end well."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deepspeed_ranks import ENVIRONMENT, WITHOUT
from places import SUPPORT
from processes import Finished, run_ranks

WORKER = str(SUPPORT / "journey_worker.py")
_OF_ENGINES = frozenset(
    {
        "composer_zero", "deepspeed_folder", "failing_archives", "failing_folder", "left_out_of_engine",
        "saves_and_restores",
    }
)  # fmt: skip


def run(
    function: str, world_size: int, *args: object, deadline_s: float = 120, **options: Any
) -> list[dict[str, Any]]:
    """Runs a function of the worker on every rank, which must all end well; what each printed last, as JSON."""
    env = options.pop("env", None)
    common = ENVIRONMENT if function in _OF_ENGINES else WITHOUT

    def environment(rank: int) -> Mapping[str, str | None]:
        return {**common, **(env(rank) if env else {})}

    finished = run_ranks(
        f"{WORKER}:{function}", world_size, args=args, deadline_s=deadline_s, env=environment, **options
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    return [last_json(rank) for rank in finished]


def last_json(rank: Finished) -> Any:
    return json.loads(rank.stdout.strip().splitlines()[-1])
