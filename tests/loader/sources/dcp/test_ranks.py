"""DCP folders that several ranks saved, into targets of several ranks: bit-equal to what was saved and to torch's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from bad_server import Behaviour, bad_server
from dcp_worker import check
from deepspeed_ranks import ENVIRONMENT, WITHOUT, needs_deepspeed
from modules_worker import plain_job
from places import SUPPORT
from processes import Finished, run_ranks

WORKER = str(SUPPORT / "dcp_worker.py")


def run(function: str, world_size: int, *args: object, nodes: Sequence[int] | None = None) -> list[Finished]:
    env = ENVIRONMENT if function == "engines" else WITHOUT
    finished = run_ranks(f"{WORKER}:{function}", world_size, args=args, deadline_s=240, env=env, nodes=nodes)
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    return finished


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What FSDP2 jobs of two ranks saved, one as torchtitan does."""
    root = tmp_path_factory.mktemp("two")
    run("write", 2, root, "fsdp2", "flat")
    return root


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What jobs of four ranks saved: tensor parallel under FSDP2, and FSDP2 in two replicas."""
    root = tmp_path_factory.mktemp("four")
    run("write", 4, root, "tp", "hsdp")
    return root


def test_the_same_ranks_go_on_exactly(of_two: Path) -> None:
    run("restore", 2, of_two, "fsdp2:fsdp2:exact", "flat:fsdp2:exact", "fsdp2:plain", "flat:plain")


def test_one_process_goes_on(of_two: Path, of_four: Path) -> None:
    check(str(of_two), "fsdp2", plain_job(seed=9), exact=False)
    check(str(of_four), "tp", plain_job(seed=9), exact=False)


def test_four_ranks_go_on(of_two: Path, of_four: Path) -> None:
    run("restore", 4, of_four, "tp:tp:exact", "hsdp:hsdp:exact", "tp:fsdp2", "hsdp:tp")
    run("restore", 4, of_two, "fsdp2:fsdp2", "fsdp2:hsdp")


@pytest.mark.parametrize("mode", ["job", "node", "direct"])
def test_nodes_fetch_what_their_ranks_keep(tmp_path: Path, mode: str) -> None:
    """Two nodes of one rank each: together they fetch every byte once, whichever files have them."""
    folder = tmp_path / "saved"
    run("write_large", 2, folder)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    objects = {f"/{name}": Behaviour(Path(folder, name).read_bytes()) for name in sizes}
    with bad_server(objects) as server:
        run("from_a_store", 2, folder, server.url("/"), mode, nodes=[1, 1])
        assert server.sent_bytes < 1.02 * sum(sizes.values()) + 100_000
        asked = Counter(one.path for one in server.asked)
    # The first byte, the ends of large items between small ones, and the rest; from each node.
    assert all(count <= 2 * 12 for path, count in asked.items() if path.endswith(".distcp"))


@needs_deepspeed
def test_deepspeed_engines(of_two: Path, tmp_path: Path) -> None:
    run("engines", 2, of_two, "fsdp2")
    run("engines", 2, of_two, "flat")
    run("write", 1, tmp_path, "numbered")
    run("engines", 1, tmp_path, "numbered")


def test_the_error_of_one_rank_is_every_ranks(of_two: Path) -> None:
    printed = [json.loads(rank.stdout.splitlines()[-1]) for rank in run("faulty", 2, of_two / "fsdp2/saved")]
    assert printed[0] == printed[1]
    kind, message = printed[0]
    assert kind == "CorruptError"
    assert "Input/output error" in message
    assert "rank 1" in message
