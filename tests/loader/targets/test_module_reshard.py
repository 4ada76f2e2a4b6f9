"""Native ZeRO checkpoints restored into plain, DDP-wrapped and FSDP2 modules, and single files into FSDP2 modules."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed_ranks import ENVIRONMENT, WITHOUT
from modules_worker import (
    Classifier,
    by_hand,
    check_against_oracle,
    check_plain,
    optimizer_for,
    oracle_of,
    plain_job,
    train,
)
from places import DATA, SUPPORT
from processes import run_ranks
from rankload.loader import LayoutError, MismatchError, State, load
from rankload.loader.targets.dtensor import dtensor_box
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from zero_folders import unpack_zero

pytest.importorskip("safetensors")

WORKER = str(SUPPORT / "modules_worker.py")
STAGES = (1, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Path]:
    """The folders that DeepSpeed saved at 4 ranks, by stage."""
    target = tmp_path_factory.mktemp("zero")
    return {stage: unpack_zero(stage, target) for stage in STAGES}


def run(function: str, world_size: int, *args: object) -> list[str]:
    finished = run_ranks(
        f"{WORKER}:{function}",
        world_size,
        args=args,
        deadline_s=180,
        env=ENVIRONMENT if function == "save_with_deepspeed" else WITHOUT,
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    return [rank.stdout for rank in finished]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", STAGES)
def test_one_process_goes_on_from_four_ranks(
    folders: Mapping[int, Path], stage: int, dtype: torch.dtype
) -> None:
    receipt = check_plain(folders[stage], stage, dtype).receipt
    assert (receipt.saved_world_size, receipt.world_size) == (4, 1)
    states = [name for name in receipt.cast if name.startswith("optimizers/AdamW/state/wte.weight/")]
    if dtype == torch.bfloat16:
        assert receipt.cast["optimizers/AdamW/state/odd/exp_avg"] == "float32 -> bfloat16"
        assert len(states) == 2
    else:
        assert not states
    # The tied head is the module's under two names.
    trained = sum(key.startswith("fp32/") for key in oracle_of(folders[stage])) + 1
    note = f"from the saved fp32 masters, not from the module's file: {trained} weights"
    assert (note in receipt.notes) is (dtype == torch.float32 and stage == 1)
    assert "state/engine" in receipt.not_restored
    assert receipt.missing == receipt.unexpected == ()


def test_plain_and_wrapped_modules_on_two_ranks(folders: Mapping[int, Path]) -> None:
    run("plain", 2, *folders.values())


@pytest.mark.parametrize("world_size", [2, 3])
def test_fully_sharded_modules(folders: Mapping[int, Path], tmp_path: Path, world_size: int) -> None:
    saved_forms(tmp_path)
    composer = DATA / "composer-monolithic-w2" / "ep2-ba8-rank0.pt"
    printed = run("fully_sharded", world_size, *folders.values(), tmp_path, composer)
    receipts = [json.loads(line) for line in printed[0].splitlines() if line.startswith("{")]
    assert [receipt["saved_world_size"] for receipt in receipts] == [4, 4]
    assert all(receipt["world_size"] == world_size for receipt in receipts)
    assert len(set(printed)) == 1


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_other_stages_that_deepspeed_saves(tmp_path: Path) -> None:
    run("save_with_deepspeed", 2, tmp_path)
    for stage, dtype in ((0, torch.float32), (0, torch.bfloat16), (2, torch.float32)):
        state = plain_job(dtype=dtype)
        load(str(tmp_path / f"s{stage}"), state)
        oracle = oracle_of(tmp_path / f"s{stage}")
        check_against_oracle(state, oracle, low=dtype == torch.bfloat16, weights_only=False)
        train(state)


@pytest.mark.parametrize("stage", STAGES)
def test_composers_archives_into_a_plain_module(stage: int) -> None:
    folder = DATA / f"composer-zero{stage}-w2"
    told = json.loads((folder / "expected.json").read_text())
    for weights_only in (True, False):
        model = Classifier()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
        state = State(model, optimizer)
        result = load(str(folder / "ep1-ba4-rank{rank}.pt.tar"), state, load_weights_only=weights_only)
        with torch.no_grad():
            found = model(torch.linspace(-1, 1, 64).reshape(8, 8))
        assert torch.allclose(found, torch.tensor(told["forward_of_linspace"]))
        assert bool(optimizer.state) is not weights_only
        if not weights_only:
            assert state.timestamp["batch"] == 4
            assert all(float(entries["step"]) == 4 for entries in optimizer.state.values())
            assert optimizer.param_groups[0]["lr"] != 0.5
            assert result.rng_states is not None


def saved_forms(folder: Path) -> State:
    """A trained plain job, saved in `folder` in four layouts."""
    state = plain_job(seed=3)
    train(state, 2)
    model, optimizer = state.model.state_dict(), state.optimizers[0].state_dict()
    torch.save({"state": state.state_dict(), "rng": None}, folder / "composer.pt")
    torch.save({"model": model, "optimizer": optimizer}, folder / "hand-written.pt")
    lightning = {"state_dict": model, "optimizer_states": [optimizer], "pytorch-lightning_version": "2.5.0"}
    torch.save(lightning, folder / "lightning.pt")
    torch.save(model, folder / "bare.pt")
    return state


@pytest.mark.parametrize("stage", STAGES)
def test_what_does_not_fit_is_told_and_nothing_is_changed(folders: Mapping[int, Path], stage: int) -> None:
    state = plain_job()
    state.model.odd = torch.nn.Parameter(torch.zeros(8))
    state.model.extra = torch.nn.Linear(2, 2, bias=False)
    state.optimizers = [torch.optim.AdamW(state.model.parameters())]
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    with pytest.raises(MismatchError) as caught:
        load(str(folders[stage]), state)
    for part in (
        "model/odd: expected shape (8,), got (7,)",
        "state/odd/exp_avg: expected shape (8,), got (7,)",
        "model/extra.weight",
        "whose hyperparameters differ",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
    assert not state.optimizers[0].state

    state = plain_job()
    state.optimizers = [torch.optim.SGD(state.model.parameters(), lr=0.1)]
    with pytest.raises(MismatchError, match=r"expected an optimizer with momentum, got one with betas, eps"):
        load(str(folders[stage]), state)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_ignored_or_missing(folders: Mapping[int, Path], stage: int) -> None:
    oracle = oracle_of(folders[stage])
    state = plain_job()
    own = state.model.odd.detach().clone()
    keys = ["state/model/odd", "state/optimizers/*/state/gain/exp_avg", "state/schedulers"]
    result = load(str(folders[stage]), state, ignore_keys=keys)
    assert torch.equal(state.model.odd, own)
    assert torch.equal(state.model.gain, oracle["fp32/gain"])
    entries = state.optimizers[0].state[state.model.gain]
    assert not entries["exp_avg"].any()
    assert torch.equal(entries["exp_avg_sq"], oracle["exp_avg_sq/gain"])
    assert result.receipt.derived[-1] == "optimizers/AdamW/state/gain/exp_avg (zeros)"

    state = plain_job()
    state.model.extra = torch.nn.Linear(2, 2, bias=False)
    del state.model.gain
    state.optimizers = []
    with pytest.raises(MismatchError, match=r"extra.weight"):
        load(str(folders[stage]), state)
    result = load(str(folders[stage]), state, strict_model_weights=False)
    assert result.receipt.missing == ("model/extra.weight",)
    assert "model/gain" in result.receipt.unexpected
    assert torch.equal(state.model.odd, oracle["fp32/odd"])


def test_weights_that_a_callable_exchanged_bring_their_own_masters(folders: Mapping[int, Path]) -> None:
    """The module is of another dtype than saved, so that masters go into it in place of the saved weights."""
    oracle = oracle_of(folders[1])
    state = plain_job()
    one, other = "blocks.0.up.bias", "blocks.1.up.bias"

    def exchange(tree: dict[str, Any]) -> None:
        model = tree["state"]["model"]
        model[one], model[other] = model[other], model[one]

    load(str(folders[1]), state, load_weights_only=False, ignore_keys=exchange)
    own = dict(state.model.named_parameters())
    assert torch.equal(own[one], oracle[f"fp32/{other}"])
    assert torch.equal(own[other], oracle[f"fp32/{one}"])


def test_an_optimizer_that_holds_frozen_parameters_too(folders: Mapping[int, Path]) -> None:
    state = plain_job()
    parameters = list(state.model.parameters())
    groups = [[p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]]
    state.optimizers = [torch.optim.AdamW([{"params": group} for group in groups])]
    load(str(folders[1]), state)
    oracle = oracle_of(folders[1])
    check_against_oracle(state, oracle, low=False, weights_only=False)
    assert train(state) == train(by_hand(oracle, state, low=False))


def test_a_module_on_the_meta_device(folders: Mapping[int, Path]) -> None:
    with torch.device("meta"):
        state = plain_job()
    load(str(folders[3]), state)
    check_against_oracle(state, oracle_of(folders[3]), low=False, weights_only=False)


def test_a_scheduler_of_another_kind_is_missing(folders: Mapping[int, Path]) -> None:
    state = plain_job()
    state.schedulers = [torch.optim.lr_scheduler.StepLR(state.optimizers[0], 5)]
    before, weights = state.schedulers[0].state_dict(), state.model.gain.detach().clone()
    with pytest.raises(
        MismatchError, match="schedulers/StepLR: the checkpoint's is of another kind: it has last_batch"
    ):
        load(str(folders[1]), state)
    assert torch.equal(state.model.gain, weights)
    with pytest.warns(
        UserWarning, match="lacks parts of this job.*StepLR: the checkpoint's is of another kind"
    ):
        result = load(str(folders[1]), state, strict_model_weights=False)
    assert state.schedulers[0].state_dict() == before
    assert "state/schedulers/StepLR" in result.receipt.not_restored
    assert result.receipt.missing[0].startswith("schedulers/StepLR: ")


class OwnState:
    """A state that loads itself, as Composer's does."""

    def __init__(self) -> None:
        self.model = plain_job().model
        self.optimizers = [optimizer_for(self.model)]
        self.given: dict[str, Any] = {}

    def load_state_dict(self, state: dict[str, Any], logger: Any, **options: Any) -> None:
        self.given = state

    def load_model_state(self, state_dict: dict[str, Any], logger: Any, **options: Any) -> None:
        self.given = state_dict


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_that_loads_itself(folders: Mapping[int, Path], stage: int) -> None:
    state = OwnState()
    result = load(str(folders[stage]), state)
    assert "optimizers" not in state.given
    assert "engine" not in state.given
    assert "state/engine" in result.receipt.not_restored
    check_against_oracle(
        State(state.model, state.optimizers), oracle_of(folders[stage]), low=False, weights_only=False
    )


class Mesh:
    """As much of a two-dimensional device mesh as a box asks for."""

    def __init__(self, sizes: tuple[int, int], coordinate: tuple[int, int]) -> None:
        self.sizes, self.coordinate = sizes, coordinate

    def get_coordinate(self) -> list[int]:
        return list(self.coordinate)

    def size(self, dim: int) -> int:
        return self.sizes[dim]


@pytest.mark.parametrize("dims", [(0, 0), (0, 1), (1, 0), (None, 0), (1, None), (-1, 0)])
def test_boxes_of_two_dimensional_meshes(dims: tuple[int | None, int | None]) -> None:
    whole = torch.arange(7 * 5).view(7, 5)
    placements = [Replicate() if dim is None else Shard(dim % 2) for dim in dims]
    for coordinate in product(range(2), range(3)):
        wanted = whole
        for dim, position, count in zip(dims, coordinate, (2, 3), strict=True):
            if dim is not None:
                chunks = wanted.chunk(count, dim)
                wanted = chunks[position] if position < len(chunks) else wanted.narrow(dim, 0, 0)
        tensor = SimpleNamespace(
            shape=whole.shape, ndim=2, placements=placements, device_mesh=Mesh((2, 3), coordinate)
        )
        box = dtensor_box(tensor, "x")
        found = whole
        for dim, (start, size) in enumerate(zip(box.starts, box.sizes, strict=True)):
            found = found.narrow(dim, start, size)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(45, 3), (12, 2), (5, 7), (1, 4), (0, 2)])
def test_a_strided_shard_cuts_what_later_dimensions_left(shape: tuple[int, int]) -> None:
    """So does FSDP2 over tensor parallelism: first the shares of the layer, then FSDP's of each of those."""
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    placements = (_StridedShard(0, split_factor=3), Shard(0))
    for coordinate in product(range(2), range(3)):
        layers = [*whole.chunk(3), whole[:0], whole[:0]]
        shards = [*layers[coordinate[1]].chunk(2), whole[:0]]
        tensor = SimpleNamespace(
            shape=whole.shape, ndim=2, placements=placements, device_mesh=Mesh((2, 3), coordinate)
        )
        box = dtensor_box(tensor, "x")
        found = whole
        for dim, (start, size) in enumerate(zip(box.starts, box.sizes, strict=True)):
            found = found.narrow(dim, start, size)
        assert torch.equal(found, shards[coordinate[0]])


@pytest.mark.parametrize(
    "placements",
    [[Partial()], [_StridedShard(0, split_factor=2)], [_StridedShard(0, split_factor=2), Shard(0)]],
)
def test_placements_that_are_no_boxes_are_refused(placements: list[Any]) -> None:
    tensor = SimpleNamespace(shape=(4,), ndim=1, placements=placements, device_mesh=Mesh((2, 3), (0, 0)))
    with pytest.raises(LayoutError, match="only Shard and Replicate"):
        dtensor_box(tensor, "x")
