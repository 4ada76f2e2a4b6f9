"""DCP folders in stores: which bytes come, and in how many requests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bad_server import BadServer, Behaviour, bad_server
from dcp_folders import assert_same, save, tensors_of
from rankload.loader import CorruptError, NotFoundError, PartialRestoreError, State, load
from torch import nn
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict

ITEMS_OF_A_LAYER = 2 + 2 * 3


def job(seed: int) -> State:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))
    return State(model, torch.optim.AdamW(model.parameters()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    state = job(1)
    state.model(torch.ones(2, 512)).sum().backward()
    state.optimizers[0].step()
    weights, moments = get_state_dict(state.model, state.optimizers[0])
    folder = tmp_path_factory.mktemp("dcp") / "step-1"
    return save(folder, {"model": weights, "optim": moments, "step": 1}), state


@contextlib.contextmanager
def served(folder: Path, **options: bool) -> Iterator[BadServer]:
    objects = {f"/{path.name}": Behaviour(path.read_bytes(), **options) for path in folder.iterdir()}
    with bad_server(objects) as server:
        yield server


def data_bytes(state: State) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(state).values())


def test_all_of_it_comes_once(saved: tuple[Path, State]) -> None:
    folder, expected = saved
    state = job(2)
    with served(folder) as server:
        receipt = load(server.url("/"), state).receipt
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert server.sent_bytes <= 1.05 * size
    assert_same(tensors_of(state), tensors_of(expected))
    assert [one.verified_by for one in receipt.files if one.name.endswith(".distcp")] == [("zip CRC-32",)]


def test_of_weights_alone_come_their_ranges(saved: tuple[Path, State]) -> None:
    """The ends of items in one round: one request for each place between large items, and the weights in few more."""
    folder, expected = saved
    state = job(2)
    with served(folder) as server:
        load(server.url("/"), state, load_weights_only=True)
        weights = sum(one.nbytes for one in expected.model.parameters())
        assert weights < server.sent_bytes < 1.05 * weights + 50_000
        ranges = [one for one in server.asked if one.path == "/__0_0.distcp"]
        assert len(ranges) <= 2 + 2 * 4
    assert_same(state.model.state_dict(), expected.model.state_dict())


@pytest.mark.parametrize(("mode", "most"), [("node", 6), ("auto", 6), ("direct", 40)])
def test_many_small_items_are_few_requests(tmp_path: Path, mode: str, most: int) -> None:
    """Items of which all is wanted come whole, end to end in long ranges; for ``direct`` their ends come first."""
    torch.manual_seed(3)
    tensors = {f"w{index}": torch.randn(40_000) for index in range(16)}
    save(tmp_path / "it", {"model": tensors})
    module = nn.Module()
    for name, value in tensors.items():
        module.register_buffer(name, torch.zeros_like(value))
    with served(tmp_path / "it") as server:
        load(server.url("/"), State(module), options={"mode": mode})
        assert len([one for one in server.asked if one.path == "/__0_0.distcp"]) <= most
        assert server.sent_bytes <= 1.05 * sum(path.stat().st_size for path in (tmp_path / "it").iterdir())
    assert_same(dict(module.named_buffers()), tensors)


def test_of_an_optimizer_that_is_left_out_comes_nothing(saved: tuple[Path, State]) -> None:
    folder, expected = saved
    state = job(2)
    with served(folder) as server:
        load(server.url("/"), state, options={"leave_out": ["optimizer"]})
        assert server.sent_bytes < 1.05 * sum(one.nbytes for one in expected.model.parameters()) + 50_000
    assert_same(state.model.state_dict(), expected.model.state_dict())


def test_a_store_without_ranges_gives_the_file_once(saved: tuple[Path, State]) -> None:
    folder, expected = saved
    state = job(2)
    with served(folder, has_ranges=False) as server:
        load(server.url("/"), state, load_weights_only=True)
        assert server.sent_bytes < 1.5 * sum(path.stat().st_size for path in folder.iterdir())
    assert_same(state.model.state_dict(), expected.model.state_dict())


def test_damage_cuts_and_gaps(saved: tuple[Path, State]) -> None:
    folder, _ = saved
    with served(folder) as server:
        body = bytearray(server.objects["/__0_0.distcp"].body)
        body[len(body) // 2] ^= 1
        server.objects["/__0_0.distcp"] = Behaviour(bytes(body))
        with pytest.raises(CorruptError, match="CRC-32"):
            load(server.url("/"), job(2), options={"verify": "before"})
        # It is the optimizer's, which is read into new memory before anything is changed.
        with pytest.raises(CorruptError, match=r"exp_avg_sq.*CRC-32"):
            load(server.url("/"), job(2), options={"mode": "node"})
        # Bytes that come straight into tensors in any order are compared once all are there.
        with pytest.raises(PartialRestoreError, match=r"exp_avg_sq.*CRC-32"):
            load(server.url("/"), job(2))
        server.objects["/__0_0.distcp"] = Behaviour(bytes(body[:-5]))
        with pytest.raises(CorruptError, match="cut short"):
            load(server.url("/"), job(2))
        del server.objects["/__0_0.distcp"]
        with pytest.raises(NotFoundError, match="__0_0"):
            load(server.url("/"), job(2))


def test_an_item_whose_index_is_long(tmp_path: Path) -> None:
    """It is fetched whole, in a second round."""
    value = {f"a name of some length {index}": index for index in range(2000)}
    save(tmp_path / "it", {"model": {"w": torch.arange(200_000.0)}, "settings": (value, torch.ones(200_000))})
    module = nn.Module()
    module.register_buffer("w", torch.zeros(200_000))
    with served(tmp_path / "it") as server:
        result = load(server.url("/"), State(module))
    assert result.extra["settings"][0] == value
    assert torch.equal(result.extra["settings"][1], torch.ones(200_000))
    assert torch.equal(module.w, torch.arange(200_000.0))


@pytest.mark.skipif(not ZStandard.is_available(), reason="zstandard is not installed")
@pytest.mark.parametrize("size", [100, 400_000])
def test_compressed_items(tmp_path: Path, size: int) -> None:
    """In a file that comes whole, and in one that comes in parts, of which the weights' are all that is fetched."""
    torch.manual_seed(4)
    parts = {"model": {"w": torch.randn(size)}, "other": {"x": torch.randn(size)}}
    writer = FileSystemWriter(tmp_path / "it", _extensions=[ZStandard()])
    save(tmp_path / "it", parts, storage_writer=writer)
    module = nn.Module()
    module.register_buffer("w", torch.zeros(size))
    with served(tmp_path / "it") as server:
        result = load(server.url("/"), State(module), load_weights_only=True)
        # What is small beside the weights costs nothing.
        assert ("other" in result.extra) is (size == 100)
        if size > 100:
            assert server.sent_bytes < 0.6 * len(server.objects["/__0_0.distcp"].body)
    assert torch.equal(module.w, parts["model"]["w"])
