"""A plan's bytes of each file are those that a real load of so many ranks asks of the store."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bad_server import BadServer, Behaviour, bad_server
from deepspeed_ranks import ENVIRONMENT, WITHOUT, needs_deepspeed
from places import DATA, SUPPORT
from processes import run_ranks
from rankload.loader.planning.loads import plan_load

WORKER = SUPPORT / "plan_worker.py"
ENGINES = SUPPORT / "fetch_engine_worker.py"
PROBES = 64
"""Bytes of a file that a load may ask for besides: the first one tells whether its server does ranges."""


@contextmanager
def served(folder: Path) -> Iterator[BadServer]:
    files = {
        f"/{path.relative_to(folder)}": Behaviour(path.read_bytes(), headers={"ETag": '"v1"'})
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    with bad_server(files) as server:
        yield server


def run(function: str, world_size: int, *args: object, nodes: tuple[int, ...] = (), cache: Path) -> None:
    sizes = nodes or (world_size,)
    node_of = [node for node, size in enumerate(sizes) for _ in range(size)]
    common = ENVIRONMENT if function.startswith(str(ENGINES)) or function.endswith("_engine") else WITHOUT
    finished = run_ranks(
        function,
        world_size,
        args=args,
        deadline_s=200,
        nodes=nodes or None,
        env=lambda rank: {**common, "RANKLOAD_CACHE_DIR": str(cache / str(node_of[rank]))},
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished


def compare(planned: dict[str, int], sent: dict[str, int], url: str, *, whole: bool = False) -> None:
    """Asserts that the plan has the bytes of each data file within 5 %; where all come `whole`, to the byte."""
    of_file = {file.removeprefix(url): count for file, count in planned.items() if count}
    assert of_file
    assert {file for file, count in sent.items() if count > PROBES} - {
        "/latest",
        "/run/latest",
    } <= of_file.keys()
    for file, count in of_file.items():
        least, most = (count, count + PROBES) if whole else (0.95 * count, 1.05 * count + PROBES)
        assert least <= sent[file] <= most, (file, count, sent[file])


@pytest.fixture(scope="module")
def dcp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    run(f"{WORKER}:save_dcp", 2, folder, cache=folder)
    return folder


@pytest.mark.parametrize(
    ("target", "world_size", "nodes", "mode"),
    [
        ("fsdp2", 2, (), "node"),
        ("fsdp2", 3, (1, 1, 1), "node"),
        ("fsdp2", 2, (1, 1), "direct"),
        ("plain", 2, (1, 1), "job"),
    ],
)
def test_of_a_folder_of_shards(
    dcp: Path, tmp_path: Path, target: str, world_size: int, nodes: tuple[int, ...], mode: str
) -> None:
    function = "restore_dcp" if target == "fsdp2" else "restore_plain"
    with served(dcp) as server:
        url = server.url("/.metadata")
        plan = plan_load(
            url, world_size=world_size, n_nodes=len(nodes) or 1, target=target, options={"mode": mode}
        )
        server.sent.clear()
        run(f"{WORKER}:{function}", world_size, url, mode, nodes=nodes, cache=tmp_path)
        compare(plan.by_file, server.sent, server.url(""))


def test_of_small_files_of_shards(tmp_path: Path) -> None:
    with served(DATA / "dcp-fsdp2-w2/ckpt") as server:
        url = server.url("/.metadata")
        plan = plan_load(url, world_size=2, n_nodes=2, target="fsdp2")
        server.sent.clear()
        run(f"{WORKER}:restore_awkward", 2, url, "node", nodes=(1, 1), cache=tmp_path)
        compare(plan.by_file, server.sent, server.url(""), whole=True)


@needs_deepspeed
@pytest.mark.parametrize(("stage", "nodes"), [(1, (1, 1)), (3, (2,))])
def test_of_small_files_of_an_engine(stage: int, nodes: tuple[int, ...], tmp_path: Path) -> None:
    with tarfile.open(DATA / f"deepspeed-zero{stage}-w4.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    with served(tmp_path / f"s{stage}-w4") as server:
        url = server.url("")
        plan = plan_load(url, world_size=2, n_nodes=len(nodes), target=f"stage{stage}")
        server.sent.clear()
        run(f"{WORKER}:restore_engine", 2, url, stage, "node", nodes=nodes, cache=tmp_path / "cache")
        compare(plan.by_file, server.sent, url, whole=True)


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "ways"),
    [
        ("1", ((2,), (1, 1))),
        ("3", ((1, 1),)),
    ],
)
def test_of_an_engine_in_parts(stage: str, ways: tuple[tuple[int, ...], ...], tmp_path: Path) -> None:
    folder = tmp_path / "served" / "run"
    run(f"{ENGINES}:save", 3, folder, stage, cache=tmp_path)
    with served(tmp_path / "served") as server:
        url = server.url("/run")
        for nodes in ways:
            plan = plan_load(url, world_size=2, n_nodes=len(nodes), target=f"stage{stage}")
            server.sent.clear()
            run(f"{ENGINES}:restore", 2, url, stage, "{}", nodes=nodes, cache=tmp_path / f"cache{len(nodes)}")
            compare(plan.by_file, server.sent, server.url(""))
