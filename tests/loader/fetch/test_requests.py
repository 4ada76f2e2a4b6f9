"""How many requests and bytes a load takes: what the docs promise, whatever the sizes of the tensors."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from paced_server import paced_server
from places import SUPPORT
from processes import run_ranks
from rankload.loader import State, gather_rng, load
from rankload.loader.byte_ranges import ByteRange, total_bytes
from rankload.loader.fetch.plan import FetchRequest, plan_fetch

CHUNK = 8 << 20
WIDTH, LAYERS = 512, 24
"""24 MiB of weights of 1 MiB each, with a bias of 2 KiB after each."""

MODES = pytest.mark.parametrize("mode", ["node", "auto", "direct"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOAD_CACHE_DIR", str(tmp_path / "cache"))


def a_model(seed: int, width: int = WIDTH, layers: int = LAYERS) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))


def bytes_of(model: torch.nn.Module) -> int:
    return sum(one.nbytes for one in model.state_dict().values())


@pytest.mark.parametrize(
    ("mode", "verify"), [("node", "before"), ("node", "during"), ("auto", "during"), ("direct", "during")]
)
def test_requests_depend_on_bytes_and_not_on_tensors(tmp_path: Path, mode: str, verify: str) -> None:
    """A model with its optimizer, of which half of the storages have 2 KiB, and a third of the rest 4 bytes."""
    saved = a_model(1)
    optimizer = torch.optim.AdamW(saved.parameters())
    saved(torch.ones(2, WIDTH)).sum().backward()
    optimizer.step()
    whole = State(saved, optimizer)
    torch.save({"state": whole.state_dict(), "rng": gather_rng()}, tmp_path / "full.pt")
    size = (tmp_path / "full.pt").stat().st_size
    model = a_model(2)
    state = State(model, torch.optim.AdamW(model.parameters()))
    with paced_server(tmp_path) as server:
        options = {"mode": mode, "verify": verify}
        result = load(server.url("full.pt"), state, progress_bar=False, options=options)
        asked, sent = server.of("full.pt"), server.sent_bytes
    assert result.receipt.unverified == ()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
    steps = [one["step"] for one in state.optimizers[0].state.values()]
    assert [float(step) for step in steps] == [1.0] * (2 * LAYERS)
    assert len(asked) <= size / CHUNK + 8, server.told()
    assert sent <= size + 1, server.told()


SHARDS = "model_world_size_2_rank_{}.pt"


def a_sharded_model(seed: int) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = a_model(seed)
    fully_shard(model)
    return model


def save_shards(folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.save(a_sharded_model(1).state_dict(), Path(folder, SHARDS.format(dist.get_rank())))
    dist.barrier()


def restore_shards(*urls: str) -> None:
    """One of two ranks of a node, which reads a file of its own in each mode that a URL ends with."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    saved = a_sharded_model(1)
    told = {}
    for url in urls:
        mode, model = url.rpartition("/")[2], a_sharded_model(2)
        options = {"mode": mode}
        result = load(url, State(model), load_weights_only=True, progress_bar=False, options=options)
        pairs = zip(model.state_dict().values(), saved.state_dict().values(), strict=True)
        right = all(torch.equal(one.to_local(), other.to_local()) for one, other in pairs)
        told[mode] = right and result.receipt.unverified == ()
    print(json.dumps(told), flush=True)


def test_ranks_with_files_of_their_own_send_no_more_requests(tmp_path: Path) -> None:
    """Small ranges come along into the node's file although another rank, its leader, holds that."""
    modes = ["node", "auto", "direct"]
    (tmp_path / "saved").mkdir()
    env = {"PYTHONPATH": str(SUPPORT)}
    finished = run_ranks(
        f"{__file__}:save_shards", 2, args=(str(tmp_path / "saved"),), deadline_s=60, env=env
    )
    assert [rank.returncode for rank in finished] == [0, 0], finished
    for mode in modes:
        (tmp_path / mode).symlink_to("saved")
    with paced_server(tmp_path) as server:
        urls = [server.url(mode) for mode in modes]
        finished = run_ranks(f"{__file__}:restore_shards", 2, args=urls, deadline_s=60, env=env)
        assert [rank.returncode for rank in finished] == [0, 0], finished
        for rank in range(2):
            assert json.loads(finished[rank].stdout.splitlines()[-1]) == dict.fromkeys(modes, True)
            size = (tmp_path / "saved" / SHARDS.format(rank)).stat().st_size
            assert size > 10 << 20
            for mode in modes:
                asked = [one for one in server.of(f"{mode}/{SHARDS.format(rank)}") if one.n_bytes]
                assert len(asked) <= size / CHUNK + 8, (mode, server.told())
                assert sum(one.n_bytes for one in asked) <= size + 8, (mode, server.told())


@MODES
def test_thousands_of_small_tensors_are_a_few_requests(tmp_path: Path, mode: str) -> None:
    saved = {f"weight.{number}": torch.full((16,), float(number)) for number in range(3000)}
    torch.save({"model": saved}, tmp_path / "many.pt")
    model = torch.nn.Module()
    model.register_module("weight", torch.nn.ParameterList(torch.zeros(16) for _ in saved))
    with paced_server(tmp_path) as server:
        load(
            server.url("many.pt"),
            State(model),
            load_weights_only=True,
            progress_bar=False,
            options={"mode": mode},
        )
        asked = server.of("many.pt")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    size = (tmp_path / "many.pt").stat().st_size
    assert size > 2 * (256 << 10)
    assert len(asked) <= size / CHUNK + 8, server.told()


@MODES
@pytest.mark.parametrize(("between", "are_read"), [(16 << 10, True), (400 << 10, False)])
def test_small_gaps_are_read_through_and_large_ones_are_not(
    tmp_path: Path, between: int, are_read: bool, mode: str
) -> None:
    """Weights of 1 MiB, with something of other sizes between them that nobody wants."""
    weights = dict(a_model(1, layers=16).state_dict())
    whole: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        whole[name] = weight
        if name.endswith("weight"):
            whole[f"other.{name}"] = torch.ones(between // 4)
    torch.save({"model": whole}, tmp_path / "gaps.pt")
    model = a_model(2, layers=16)
    with paced_server(tmp_path) as server:
        load(
            server.url("gaps.pt"),
            State(model),
            load_weights_only=True,
            progress_bar=False,
            ignore_keys=["state/model/other.*"],
            options={"mode": mode},
        )
        asked, sent = server.of("gaps.pt"), server.sent_bytes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    wanted, gaps = bytes_of(model), 0 if are_read else 16
    assert len(asked) <= wanted / CHUNK + gaps + 8, server.told()
    assert sent <= 1.05 * (wanted + 2 * (256 << 10)), (sent, wanted)


@MODES
def test_only_what_the_check_reads_comes_before_the_weights(tmp_path: Path, mode: str) -> None:
    """An entry that `load` returns is one small request; biases, and entries that nobody wants, are none."""
    saved = a_model(1)
    others = {name: value.clone() for name, value in saved.state_dict().items()}
    torch.save(
        {"others": others, "mine": torch.arange(1000), "model": saved.state_dict()}, tmp_path / "mine.pt"
    )
    model = a_model(2)
    with paced_server(tmp_path) as server:
        result = load(
            server.url("mine.pt"),
            State(model),
            load_weights_only=True,
            progress_bar=False,
            options={"mode": mode},
        )
        small = [one for one in server.asked if 1 < one.n_bytes < 128 << 10]
    assert torch.equal(result.extra["mine"], torch.arange(1000))
    assert "others" not in result.extra
    assert len(small) == 1, server.told()


def _of_one(node: int, wanted: list[ByteRange], direct: list[ByteRange] | None = None) -> FetchRequest:
    return FetchRequest(node, {"f": wanted}, {"f": direct if direct is not None else wanted})


def _layers(first: int, n_layers: int) -> list[ByteRange]:
    """A weight of 2 MiB, its bias of 2 KiB, 24 bytes after each, and so on."""
    found, position = [], first
    for _ in range(n_layers):
        for n_bytes in (2 << 20, 2 << 10):
            found.append(ByteRange(position, position + n_bytes))
            position += n_bytes + 24
    return found


def test_auto_reads_small_ranges_with_the_large_ones_around_them() -> None:
    mine, other = _layers(0, 40), _layers(1 << 30, 40)
    alone = [ByteRange(1 << 32, (1 << 32) + 1000)]
    plans = plan_fetch([_of_one(0, [*mine, *alone]), _of_one(0, other)], "auto")
    assert plans[0].direct["f"] == mine
    assert plans[1].direct["f"] == other
    assert plans[0].bring == {"f": alone}


@pytest.mark.parametrize("mode", ["node", "job"])
def test_what_belongs_to_records_is_one_range(mode: str) -> None:
    ranges = _layers(0, 10)
    stop = ranges[-1].stop
    plans = plan_fetch([_of_one(0, ranges), _of_one(0, ranges)], mode)  # type: ignore[arg-type]
    assert plans[0].bring == {"f": [ByteRange(0, stop)]}


def test_a_nodes_turn_is_not_cut_by_what_others_leave_out() -> None:
    """Two nodes that want the same 16 MiB, but for gaps, leave them to one of them, turn by turn."""
    ranges = [ByteRange(at, at + (1 << 20)) for at in range(0, 64 << 20, (1 << 20) + (8 << 10))]
    plans = plan_fetch([_of_one(0, ranges), _of_one(1, ranges)], "job")
    brought = [plan.bring["f"] for plan in plans]
    assert sum(map(total_bytes, brought)) == total_bytes(ranges)
    owners = [
        rank for _, rank in sorted((one.start, rank) for rank, own in enumerate(brought) for one in own)
    ]
    assert sum(before != after for before, after in pairwise(owners)) <= 4, owners
