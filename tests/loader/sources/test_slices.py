"""Weights that torch's HuggingFaceStorageWriter saved as each rank's slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rankload.loader import CorruptError, FormatError, LayoutError, MismatchError, NotFoundError, State, load
from safetensors_files import as_safetensors


def save_slices(
    folder: Path, ranks: dict[int, dict[str, tuple[list[int], torch.Tensor]]], parts: int = 1
) -> None:
    """Saves each rank's slices, with their offsets, in `parts` files as torch's writer does."""
    for rank, slices in ranks.items():
        for part in range(1, parts + 1):
            mine = {name: one for i, (name, one) in enumerate(slices.items()) if i % parts == part - 1}
            offsets = {name: {"saved_offsets": start} for name, (start, _) in mine.items()}
            metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
            data = as_safetensors({name: tensor for name, (_, tensor) in mine.items()}, metadata)
            (folder / f"shard-{rank:05}-model-{part:05}-of-{parts:05}.safetensors").write_bytes(data)


def rows(total: int, ranks: int) -> tuple[torch.Tensor, dict[int, dict[str, tuple[list[int], torch.Tensor]]]]:
    """A weight, and its rows and a bias over `ranks` ranks, empty ones too."""
    weight = torch.rand(total, 3)
    bias = torch.arange(float(total))
    step = -(-total // ranks)
    cut = [min(total, step * rank) for rank in range(ranks + 1)]
    return weight, {
        rank + 1: {
            "weight": ([cut[rank], 0], weight[cut[rank] : cut[rank + 1]]),
            "bias": ([cut[rank]], bias[cut[rank] : cut[rank + 1]]),
        }
        for rank in range(ranks)
    }


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (3, 2), (8, 1), (9, 1), (30, 2), (5, 8)])
def test_slices_of_any_number_of_ranks(tmp_path: Path, ranks: int, parts: int) -> None:
    weight, slices = rows(17, ranks)
    save_slices(tmp_path, slices, parts)
    module = torch.nn.Linear(3, 17)
    receipt = load(tmp_path, State(module)).receipt
    assert torch.equal(module.weight, weight)
    assert (receipt.kind, receipt.saved_world_size) == ("slices", ranks)
    assert any(f"files of {ranks} were found" in note for note in receipt.notes)


def test_slices_of_two_dimensions(tmp_path: Path) -> None:
    whole = torch.rand(5, 7)
    quarters = {
        1: ([0, 0], whole[:3, :4]),
        2: ([0, 4], whole[:3, 4:]),
        3: ([3, 0], whole[3:, :4]),
        4: ([3, 4], whole[3:, 4:]),
    }
    save_slices(tmp_path, {rank: {"weight": one} for rank, one in quarters.items()})
    module = torch.nn.Linear(7, 5, bias=False)
    load(tmp_path, State(module))
    assert torch.equal(module.weight, whole)


@pytest.mark.parametrize(("ranks", "lost"), [(3, 1), (3, 2), (12, 8), (9, 8), (40, 16)])
def test_a_lost_rank_between_others_is_told_by_the_gap(tmp_path: Path, ranks: int, lost: int) -> None:
    _, slices = rows(ranks, ranks)
    save_slices(tmp_path, {rank: one for rank, one in slices.items() if rank != lost})
    path = tmp_path if lost != 1 else tmp_path / "shard-00003-model-00001-of-00001.safetensors"
    with pytest.raises(NotFoundError, match=f"between others that are there: shard-{lost:05}-model"):
        load(path, State(torch.nn.Linear(3, ranks)))


def test_a_lost_last_rank_is_told_by_the_jobs_shapes(tmp_path: Path) -> None:
    _, slices = rows(9, 3)
    save_slices(tmp_path, {rank: one for rank, one in slices.items() if rank != 3})
    with pytest.raises(MismatchError, match=r"model/weight: expected shape \(9, 3\), got \(6, 3\)"):
        load(tmp_path, State(torch.nn.Linear(3, 9)))


def test_a_lost_part_and_slices_of_two_saves_are_told_by_the_cover(tmp_path: Path) -> None:
    _, slices = rows(9, 3)
    save_slices(tmp_path, slices, parts=2)
    (tmp_path / "shard-00002-model-00001-of-00002.safetensors").unlink()
    with pytest.raises(
        CorruptError, match=r"the slices of 'weight' in 2 files .* \(9, 3\).*18 of 27 elements"
    ):
        load(tmp_path, State(torch.nn.Linear(3, 9)))
    _, others = rows(9, 2)
    save_slices(tmp_path, {**slices, 1: others[1]})
    (tmp_path / "shard-00001-model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CorruptError, match="of several saves"):
        load(tmp_path / "shard-00001-model-00001-of-00001.safetensors", State(torch.nn.Linear(3, 9)))


@pytest.mark.parametrize(
    ("offsets", "part"),
    [
        ({}, "has None for tensor 'weight'"),
        ({"weight": 3}, "has None for tensor"),
        ({"weight": {"saved_offsets": [0]}}, r"has \[0\] for tensor 'weight' of shape \(2, 2\)"),
        ({"weight": {"saved_offsets": [0, -1]}}, "expected an offset for each dimension"),
        ({"weight": {"saved_offsets": [0, 2**70]}}, "expected an offset for each dimension"),
        ({"weight": {"saved_offsets": [0, True]}}, "expected an offset for each dimension"),
        ([], "has None for tensor"),
    ],
)
def test_offsets_that_are_none(tmp_path: Path, offsets: Any, part: str) -> None:
    data = as_safetensors({"weight": torch.ones(2, 2)}, {"DCP_SHARDING_INFO": json.dumps(offsets)})
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match=part):
        load(tmp_path, State(torch.nn.Linear(2, 2, bias=False)))


def test_slices_that_say_nothing_or_too_much(tmp_path: Path) -> None:
    path = tmp_path / "shard-00001-model-00001-of-00001.safetensors"
    path.write_bytes(as_safetensors({"weight": torch.ones(2, 2)}))
    with pytest.raises(FormatError, match="does not say where"):
        load(tmp_path, State(torch.nn.Linear(2, 2, bias=False)))
    save_slices(tmp_path, {1: {"weight": ([0] * 9, torch.ones([1] * 9))}})
    with pytest.raises(LayoutError, match="9 dimensions"):
        load(tmp_path, State(torch.nn.Linear(2, 2, bias=False)))
    save_slices(tmp_path, {1: {"weight": ([0, 2**62], torch.ones(2, 2))}})
    with pytest.raises(CorruptError, match="do not make up"):
        load(tmp_path, State(torch.nn.Linear(2, 2, bias=False)))
    save_slices(
        tmp_path,
        {1: {"weight": ([0, 0], torch.ones(1, 2))}, 2: {"weight": ([1, 0], torch.ones(1, 2).half())}},
    )
    with pytest.raises(CorruptError, match=r"float32 of 2 dimensions in .*float16 of 2"):
        load(tmp_path, State(torch.nn.Linear(2, 2, bias=False)))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("way", ["whole", "slices", "consolidated"])
def test_what_torchs_own_writer_saves(tmp_path: Path, way: str, parts: int) -> None:
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    pytest.importorskip("safetensors")
    if not hasattr(checkpoint, "HuggingFaceStorageWriter"):
        pytest.skip("this torch has no such writer")
    # The consolidation aligns nothing, and takes no integers.
    saved = {"weight": torch.rand(5, 3, dtype=torch.float64), "bias": torch.rand(5).to(torch.float64)}
    writer = checkpoint.HuggingFaceStorageWriter(
        str(tmp_path),
        fqn_to_index_mapping={name: 1 + number % parts for number, name in enumerate(saved)},
        save_distributed=way != "whole",
        enable_consolidation=way == "consolidated",
    )
    checkpoint.save(dict(saved), storage_writer=writer, no_dist=True)
    for folder in (tmp_path, tmp_path / "sharded") if way == "consolidated" else (tmp_path,):
        module = torch.nn.Linear(3, 5, dtype=torch.float64)
        receipt = load(folder, State(module)).receipt
        assert receipt.kind == ("slices" if way == "slices" or folder != tmp_path else "sharded")
        assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
