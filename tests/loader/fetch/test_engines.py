"""DeepSpeed engines restored from a server at another world size, in each mode, as from the local folder."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from bad_server import Behaviour, bad_server
from deepspeed_ranks import ENVIRONMENT
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
            **ENVIRONMENT,
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
    if stage == "1":
        with bad_server(flipped(served)) as bad:
            told = job(
                2, "restore", f"{bad.url('')}/run", stage, json.dumps({"mode": "auto"}), nodes=(1, 1),
                cache=tmp_path / "flipped",
            )  # fmt: skip
            assert not any(flip for one in bad.objects.values() for flip in one.flips.values())
        assert [one["found"] for one in told] == wanted


def flipped(folder: Path) -> dict[str, Behaviour]:
    """What lies in `folder`; a weight that the ranks of a node share comes damaged once, and a master's moment too."""
    served = {}
    for path in (one for one in folder.rglob("*") if one.is_file()):
        data, flips = path.read_bytes(), {}
        if path.suffix == ".pt" and ("model_states" in path.name or "rank_0_" in path.name):
            with zipfile.ZipFile(path) as archive:
                largest = max(archive.infolist(), key=lambda info: info.file_size)
                flips = {data.index(archive.read(largest)) + largest.file_size // 2: 1}
        served[f"/{path.relative_to(folder)}"] = Behaviour(data, flips=flips)
    return served
