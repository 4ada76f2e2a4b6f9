"""DeepSpeed engines restored from a server at another world size, in each mode, as from the local folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from places import SUPPORT
from processes import run_ranks
from real_servers import nginx
from server_process import or_skip

pytest.importorskip("deepspeed")

WORKER = str(SUPPORT / "fetch_engine_worker.py")
STAGES = ("1", "3") if os.environ.get("TEST_ALL") else ("1",)


def job(
    world_size: int, function: str, *arguments: object, nodes: tuple[int, ...] = (), cache: Path | None = None
) -> list[Any]:
    node_of = [node for node, size in enumerate(nodes or (world_size,)) for _ in range(size)]
    finished = run_ranks(
        f"{WORKER}:{function}", world_size, args=arguments, deadline_s=200, nodes=nodes or None,
        env=lambda rank: {
            "PYTHONPATH": str(SUPPORT),
            "OMP_NUM_THREADS": "1",
            "RANKLOAD_CACHE_DIR": str(cache / str(node_of[rank])) if cache else None,
        },
    )  # fmt: skip
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in finished if function == "restore"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_gets_the_same_whichever_way_bytes_take(stage: str, tmp_path: Path) -> None:
    served = tmp_path / "served"
    job(3, "save", served / "run", stage)
    wanted = [one["found"] for one in job(2, "restore", served / "run", stage, "{}")]
    saved = sum(path.stat().st_size for path in served.rglob("*.pt"))
    with or_skip(nginx(served, tmp_path / "servers")) as server:
        ways = [("direct", (2,)), ("job", (1, 1))] + [("auto", (1, 1))] * bool(os.environ.get("TEST_ALL"))
        for mode, nodes in ways:
            before = sum(size for *_, size in server.sent())
            told = job(
                2, "restore", f"{server.url}/run", stage, json.dumps({"mode": mode}), nodes=nodes,
                cache=tmp_path / mode,
            )  # fmt: skip
            assert [one["found"] for one in told] == wanted, mode
            sent = sum(size for *_, size in server.sent()) - before
            # A node that does not hold all masters reads the module's weights, unless another hands them on.
            weights = 2 * 4 * 700 * 701 if stage == "1" and mode != "job" else 0
            indexes = len(nodes) * 4 * (512 << 10)
            assert sent <= saved + (len(nodes) - 1) * weights + indexes, (mode, sent, saved)
