"""Native ZeRO checkpoints restored into plain, DDP-wrapped and FSDP2 modules, and single files into FSDP2 modules."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from modules_worker import (
    Classifier,
    by_hand,
    check_against_oracle,
    check_plain,
    oracle_of,
    plain_job,
    train,
)
from processes import run_ranks
from rankload.loader import MismatchError, State, load

pytest.importorskip("safetensors")

TESTS = Path(__file__).parent
DATA = TESTS / "data"
WORKER = str(TESTS / "modules_worker.py")
STAGES = (1, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Path]:
    """The folders that DeepSpeed saved at 4 ranks, by stage."""
    target = tmp_path_factory.mktemp("zero")
    for stage in STAGES:
        with tarfile.open(DATA / f"deepspeed-zero{stage}-w4.tar") as archive:
            archive.extractall(target, filter="data")
    return {stage: target / f"s{stage}-w4" for stage in STAGES}


def run(function: str, world_size: int, *args: object) -> list[str]:
    finished = run_ranks(
        f"{WORKER}:{function}",
        world_size,
        args=args,
        deadline_s=180,
        env={"PYTHONPATH": str(TESTS)},
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
        assert receipt.notes == ()
    else:
        assert not states
        assert not [
            name for name in receipt.cast if name != "model/frozen.weight" and name.startswith("optim")
        ]
    # The tied head is the module's under two names.
    trained = sum(key.startswith("fp32/") for key in oracle_of(folders[stage])) + 1
    note = f"{trained} weights come from the saved fp32 masters, not from the module's file"
    assert (note in receipt.notes) is (dtype == torch.float32 and stage == 1)
    assert "state/engine" in receipt.not_restored
    assert receipt.missing == receipt.unexpected == ()


def test_plain_and_wrapped_modules_on_two_ranks(folders: Mapping[int, Path]) -> None:
    run("plain", 2, *folders.values())


@pytest.mark.parametrize("world_size", [2, 3])
def test_fully_sharded_modules(folders: Mapping[int, Path], world_size: int) -> None:
    printed = run("sharded", world_size, *folders.values())
    receipts = [json.loads(line) for line in printed[0].splitlines() if line.startswith("{")]
    assert [receipt["saved_world_size"] for receipt in receipts] == [4, 4]
    assert all(receipt["world_size"] == world_size for receipt in receipts)
    assert len(set(printed)) == 1


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


@pytest.mark.parametrize("world_size", [2, 3])
def test_single_files_into_fully_sharded_modules(tmp_path: Path, world_size: int) -> None:
    saved_forms(tmp_path)
    run("monolithic", world_size, tmp_path, DATA / "composer-monolithic-w2" / "ep2-ba8-rank0.pt")


def test_any_placement_of_any_shape(tmp_path: Path) -> None:
    run("boxes", 3, tmp_path)


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


def test_an_optimizer_that_holds_frozen_parameters_too(folders: Mapping[int, Path]) -> None:
    state = plain_job()
    parameters = list(state.model.parameters())
    groups = [[p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]]
    state.optimizers = [torch.optim.AdamW([{"params": group} for group in groups])]
    load(str(folders[1]), state)
    oracle = oracle_of(folders[1])
    check_against_oracle(state, oracle, low=False, weights_only=False)
    assert train(state) == train(by_hand(oracle, state, low=False))
