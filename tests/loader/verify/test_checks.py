"""Checksums compared by all ranks together, in real jobs: what each reads, and what a flipped byte does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_server import Behaviour, bad_server
from places import SUPPORT
from processes import run_ranks

WIDE = 1024
"""4 MiB of fp32 a layer."""


def a_module() -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(WIDE, WIDE), torch.nn.Linear(WIDE, 3 * WIDE, bias=False))


def restore(path: str, kind: str, verify: str) -> None:
    """One rank: restores `path` into a module that is plain, or sharded; tells the error, or what was read."""
    import torch.distributed as dist
    from rankload.loader import RankloadError, State, load

    dist.init_process_group("gloo")
    module = a_module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    if kind == "sharded":
        from torch.distributed.fsdp import fully_shard

        fully_shard(module)
    told: dict[str, Any]
    try:
        receipt = load(path, State(module), options={"verify": verify}).receipt
    except RankloadError as error:
        whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in module.parameters()]
        changed = any(bool(tensor.any()) for tensor in whole)
        told = {"error": type(error).__name__, "message": str(error), "changed": changed}
    else:
        right = all(
            torch.equal(getattr(own, "full_tensor", lambda own=own: own)(), wanted)
            for own, wanted in zip(module.parameters(), a_module().parameters(), strict=True)
        )
        stages = ("verify", "restore", "checksums")
        read = [one.bytes for one in receipt.stages if one.rank == dist.get_rank() and one.stage in stages]
        told = {"right": right, "read": sum(read)}
    print(json.dumps(told))
    sys.stdout.flush()
    # Ranks end together, and with nothing left that holds on to the group: gloo's threads may crash otherwise.
    dist.barrier()


def restore_served(url: str, cases: str) -> None:
    """One rank: loads each of `cases` from `url`; tells the error, or whether all is right, and the receipt's bytes."""
    import torch.distributed as dist
    from rankload.loader import RankloadError, State, load
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    wanted = a_module()
    told: dict[str, Any] = {}
    for name, (kind, options) in json.loads(cases).items():
        torch.manual_seed(1)
        module = torch.nn.Sequential(torch.nn.Linear(WIDE, WIDE), torch.nn.Linear(WIDE, 3 * WIDE, bias=False))
        if kind == "sharded":
            fully_shard(module)
        try:
            receipt = load(f"{url}/{name}", State(module), options=options, progress_bar=False).receipt
        except RankloadError as error:
            told[name] = {"error": type(error).__name__, "message": error.message}
            continue
        right = all(
            torch.equal(getattr(own, "full_tensor", lambda own=own: own)(), one)
            for own, one in zip(module.parameters(), wanted.parameters(), strict=True)
        )
        again = [[one.name, one.nbytes] for one in receipt.fetched_again]
        told[name] = {"right": right, "again": again, "fetched": receipt.fetched_bytes}
    print(json.dumps(told))
    sys.stdout.flush()
    dist.barrier()


def job(path: Path, kind: str, verify: str) -> list[dict[str, Any]]:
    finished = run_ranks(
        f"{__file__}:restore", 2, args=(path, kind, verify), deadline_s=90, env={"PYTHONPATH": str(SUPPORT)}
    )
    assert [rank.returncode for rank in finished] == [0, 0], finished
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in finished]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.pt"
    torch.save(a_module().state_dict(), path)
    return path


@pytest.mark.parametrize(("kind", "verify", "most"), [
    ("plain", "during", 1.0),
    ("sharded", "during", 0.51),
    ("sharded", "before", 1.01),
])  # fmt: skip
def test_each_rank_reads_its_own_part_once(saved: Path, kind: str, verify: str, most: float) -> None:
    told = job(saved, kind, verify)
    size = 4 * WIDE * WIDE * 4
    for rank in told:
        assert rank["right"], told
        assert rank["read"] <= most * size + (64 << 10), told


@pytest.mark.parametrize(
    ("kind", "verify"), [("plain", "during"), ("sharded", "during"), ("sharded", "before")]
)
def test_a_flipped_byte_fails_all_ranks(saved: Path, tmp_path: Path, kind: str, verify: str) -> None:
    """It lies in what rank 1 reads, or sums; both ranks say so."""
    data = bytearray(saved.read_bytes())
    data[len(data) - (2 << 20)] ^= 4
    path = tmp_path / "flipped.pt"
    path.write_bytes(data)
    first, second = job(path, kind, verify)
    assert first["message"].partition(" ")[2] == second["message"].partition(" ")[2]
    for rank in (first, second):
        assert rank["error"] == ("CorruptError" if verify == "before" else "PartialRestoreError")
        assert rank["changed"] == (verify == "during")
        assert "flipped.pt" in rank["message"]
        assert "CRC-32" in rank["message"]
        assert "1.weight" in rank["message"]


SECOND = 3 * WIDE * WIDE * 4
"""Bytes of the second weight, the last storage of the file."""


@pytest.mark.parametrize("nodes", [(2,), (1, 1)])
def test_ranks_fetch_damage_again_once_per_node_and_all_agree(
    saved: Path, tmp_path: Path, nodes: tuple[int, ...]
) -> None:
    """A storage that both ranks sum together, one that each sums alone, and one that is damaged twice."""
    data = saved.read_bytes()
    large, small = len(data) - (2 << 20), data.index(a_module()[0].bias.detach().numpy().tobytes()) + 5
    cases: dict[str, tuple[str, dict[str, str], dict[int, int]]] = {
        "plain": ("plain", {"mode": "auto"}, {large: 1}),
        "sharded": ("sharded", {"mode": "auto"}, {large: 1}),
        "before": ("sharded", {"mode": "node", "verify": "before"}, {large: 1}),
        "small": ("plain", {"mode": "node"}, {small: 1}),
        # One rank alone reads it, directly.
        "twice": ("sharded", {"mode": "auto"}, {large: 3}),
        "twice before": ("plain", {"mode": "node", "verify": "before"}, {large: 2 * len(nodes) + 1}),
    }
    if len(nodes) == 2:
        cases["peers"] = ("plain", {"mode": "job"}, {large: 1})
    served = {
        f"/{name}".replace(" ", "-"): Behaviour(data, flips=flips) for name, (*_, flips) in cases.items()
    }
    asked = {name.replace(" ", "-"): [kind, options] for name, (kind, options, _) in cases.items()}
    with bad_server({**served, "/clean": Behaviour(data)}) as server:
        finished = run_ranks(
            f"{__file__}:restore_served",
            2,
            args=(server.url(""), json.dumps(asked)),
            deadline_s=180,
            nodes=nodes,
            env=lambda rank: {
                "PYTHONPATH": str(SUPPORT),
                "RANKLOAD_CACHE_DIR": str(tmp_path / str(rank if len(nodes) == 2 else 0)),
            },
        )
        assert [rank.returncode for rank in finished] == [0, 0], finished
        sent = dict(server.sent)
        left = {name: behaviour.flips for name, behaviour in served.items()}
    first, second = (json.loads(rank.stdout.splitlines()[-1]) for rank in finished)
    assert first == second
    for name in ("twice", "twice-before"):
        kind = "CorruptError" if "before" in name else "PartialRestoreError"
        assert first[name]["error"] == kind, first[name]
        assert "CRC-32" in first[name]["message"]
        assert "It was fetched twice" in first[name]["message"]
        # Each node fetched twice, and no rank once more.
        assert list(left[f"/{name}"].values()) == [1], name
    for name in first.keys() - {"twice", "twice-before"}:
        told = first[name]
        assert told["right"], (name, told)
        assert not any(left[f"/{name}"].values()), name
        again = sum(nbytes for _, nbytes in told["again"])
        # All of the storage that a node holds, or a rank reads directly; and what came with the index, with its end.
        most = {
            "small": 64 << 10,
            "plain": SECOND * len(nodes),
            "peers": SECOND * 2,
            "before": SECOND,
            "sharded": SECOND,
        }
        assert 0 < again <= most[name] + (600 << 10), (name, told)
        assert told["fetched"] <= sent[f"/{name}"], name
