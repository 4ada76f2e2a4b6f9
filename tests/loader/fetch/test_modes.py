"""The ways that remote bytes take: straight into tensors, and between nodes; restored right, and counted."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from bad_server import Behaviour, Fault, bad_server
from places import SUPPORT
from processes import run_ranks
from rankload.loader import OptionError, PartialRestoreError, State, load
from wide_model import ALL_BYTES, MODEL_BYTES, a_module, load_local


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOAD_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("mode", ["direct", "auto"])
@pytest.mark.parametrize("verify", ["during", "off"])
def test_a_rank_alone_reads_straight_into_its_tensors(
    saved: bytes, tmp_path: Path, mode: str, verify: str
) -> None:
    module = a_module(seed=1)
    before = [parameter.data_ptr() for parameter in module.parameters()]
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        result = load(
            server.url("/model.pt"),
            State(module),
            load_weights_only=True,
            options={"mode": mode, "verify": verify},
        )
        sent = server.sent_bytes
    assert [parameter.data_ptr() for parameter in module.parameters()] == before
    trained = load_local(saved, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), trained, strict=True))
    assert MODEL_BYTES <= sent <= MODEL_BYTES + (1 << 20)
    assert abs(result.receipt.fetched_bytes - sent) <= 2 * 65536
    straight = [stage for stage in result.receipt.stages if stage.stage == "fetch parts"]
    assert sum(stage.bytes for stage in straight) < 1 << 20, "the weights came through the node's files"


def test_before_and_straight_exclude_each_other(saved: bytes, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r'mode="direct" puts bytes into tensors as they come'):
        load("x", State(a_module()), options={"mode": "direct", "verify": "before"})
    module = a_module(seed=1)
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        load(
            server.url("/model.pt"),
            State(module),
            load_weights_only=True,
            options={"mode": "auto", "verify": "before"},
        )
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), load_local(saved, tmp_path), strict=True)
    )


def test_another_dtype_and_an_optimizer_go_by_the_node(saved: bytes, tmp_path: Path) -> None:
    module = a_module(seed=1).to(torch.float64)
    optimizer = torch.optim.Adam(module.parameters())
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        load(server.url("/model.pt"), State(module, optimizer), options={"mode": "direct"})
    for mine, wanted in zip(module.parameters(), load_local(saved, tmp_path), strict=True):
        assert torch.equal(mine, wanted.double())
    assert len(optimizer.state) == 3


def test_damage_on_the_straight_way_is_found(saved: bytes) -> None:
    wrong = bytearray(saved)
    wrong[len(saved) // 4] ^= 1
    with (
        bad_server({"/wrong.pt": Behaviour(bytes(wrong))}) as server,
        pytest.raises(PartialRestoreError, match="CRC-32"),
    ):
        load(server.url("/wrong.pt"), State(a_module()), load_weights_only=True, options={"mode": "direct"})


def restore(url: str, kind: str, mode: str) -> None:
    """One rank: a plain module, or a sharded one; tells whether it is right, and what was fetched."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    module = a_module(seed=1)
    if kind == "sharded":
        from torch.distributed.fsdp import fully_shard

        fully_shard(module)
    optimizer = torch.optim.Adam(module.parameters())
    receipt = load(url, State(module, optimizer), options={"mode": mode}).receipt
    tensors = [*module.parameters(), *(optimizer.state[p]["exp_avg_sq"] for p in module.parameters())]
    whole = [getattr(one, "full_tensor", lambda one=one: one)() for one in tensors]
    told = {
        "sums": [zlib.crc32(tensor.detach().numpy()) for tensor in whole],
        "fetched": receipt.fetched_bytes,
        "nodes": receipt.n_nodes,
    }
    print(json.dumps(told), flush=True)


@pytest.mark.parametrize(
    ("kind", "mode", "nodes", "times"),
    [
        # On one node a sharded module's halves are each rank's own; a plain one's bytes are shared.
        ("sharded", "direct", (2,), 1),
        ("sharded", "auto", (2,), 1),
        ("plain", "direct", (2,), 1),
        ("plain", "direct", (1, 1), 2),
        ("plain", "job", (2, 1), 1),
        ("plain", "job", (1, 1, 1), 1),
        ("sharded", "job", (1, 1), 1),
    ],
)
def test_bytes_leave_the_server_no_oftener_than_they_must(
    saved: bytes, tmp_path: Path, kind: str, mode: str, nodes: tuple[int, ...], times: int
) -> None:
    world_size = sum(nodes)
    node_of = [node for node, size in enumerate(nodes) for _ in range(size)]
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        finished = run_ranks(
            f"{__file__}:restore", world_size, args=(server.url("/model.pt"), kind, mode), deadline_s=120, nodes=nodes,
            env=lambda rank: {
                "PYTHONPATH": str(SUPPORT),
                "RANKLOAD_CACHE_DIR": str(tmp_path / f"cache{node_of[rank]}"),
            },
        )  # fmt: skip
        sent = server.sent_bytes
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    told = [json.loads(rank.stdout.splitlines()[-1]) for rank in finished]
    assert {one["nodes"] for one in told} == {len(nodes)}
    (tmp_path / "whole.pt").write_bytes(saved)
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)["state"]
    weights = list(whole["model"].values())
    squares = [entry["exp_avg_sq"] for entry in whole["optimizers"]["Adam"]["state"].values()]
    wanted = [zlib.crc32(tensor.detach().numpy()) for tensor in [*weights, *squares]]
    assert [one["sums"] for one in told] == [wanted] * world_size
    assert sent <= times * ALL_BYTES + len(nodes) * (1 << 20), (sent, told)
    assert abs(told[0]["fetched"] - sent) <= len(nodes) * 4 * 65536


def dies(url: str) -> None:
    """The rank that others take from ends in the middle."""
    import threading

    import torch.distributed as dist
    from rankload.loader import RankloadError

    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        threading.Timer(3, os.kill, (os.getpid(), 9)).start()
    try:
        module = a_module(seed=1)
        # Its second 16 MiB are this rank's turn.
        state = State(module, torch.optim.Adam(module.parameters()))
        load(url, state, options={"mode": "job", "stall_timeout_s": 20})
        told = {}
    except RankloadError as error:
        told = {"error": type(error).__name__, "message": str(error)}
    left = [one.name for one in threading.enumerate() if one.name.startswith("rankload")]
    print(json.dumps({**told, "left": left}), flush=True)
    os._exit(0)


def test_a_node_that_dies_while_others_take_from_it_ends_the_load(saved: bytes, tmp_path: Path) -> None:
    # Indexes and early parts come; then the server falls silent, until the rank is gone.
    silent = Fault(send_only=1 << 20, ending="stall")
    behaviour = Behaviour(saved, fault_of=lambda start, stop: silent if stop - start > 1 << 20 else None)
    with bad_server({"/model.pt": behaviour}) as server:
        finished = run_ranks(
            f"{__file__}:dies", 2, args=(server.url("/model.pt"),), deadline_s=90, nodes=(1, 1),
            env=lambda rank: {"PYTHONPATH": str(SUPPORT), "RANKLOAD_CACHE_DIR": str(tmp_path / f"cache{rank}")},
        )  # fmt: skip
    assert [rank.returncode for rank in finished] == [0, -9], finished
    told = json.loads(finished[0].stdout.splitlines()[-1])
    assert told["error"] in ("PartialRestoreError", "PeerError"), told
    assert "rank 1" in told["message"], told
    assert told["left"] == [], told
