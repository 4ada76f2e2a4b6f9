"""What Trainer and Accelerate save beside a model, from folders that they saved and from others of the same form."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from framework_model import differences, held
from http_server import Served, counting_server
from places import DATA
from rankload.loader import CorruptError, MismatchError, State, load
from torch import nn

TRAINER, ACCELERATE = DATA / "trainer-plain-w2", DATA / "accelerate-plain-w2"


def module_of(folder: Path) -> nn.Module:
    """A module with the names and shapes that the saving job's model had, its head tied to the embedding."""
    root = nn.Module()
    for name, value in torch.load(folder / "held.pt", weights_only=True).items():
        part, _, path = name.partition("/")
        if part == "model":
            owner = root
            *inner, last = path.split(".")
            for each in inner:
                if not hasattr(owner, each):
                    owner.add_module(each, nn.Module())
                owner = owner.get_submodule(each)
            owner.register_parameter(last, nn.Parameter(torch.zeros_like(value)))
    root.add_module("lm_head", nn.Module())
    root.lm_head.weight = root.transformer.wte.weight
    return root


def job(folder: Path) -> State:
    """As the saving job's, but with other weights and rates."""
    module = module_of(folder)
    numbers = json.loads((folder / "numbers.json").read_text())
    named = dict(module.named_parameters())
    groups = numbers.get("groups") or [list(named)]
    optimizer = torch.optim.AdamW([{"params": [named[name] for name in names]} for names in groups], lr=0.5)
    if "epoch" in numbers:
        scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
    else:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return State(module, optimizer, scheduler)


def rates(state: State) -> list[float]:
    return [group["lr"] for group in state.optimizers[0].param_groups]


@pytest.mark.parametrize("folder", [TRAINER, ACCELERATE], ids=["trainer", "accelerate"])
def test_what_a_framework_saved_is_restored_whole(folder: Path) -> None:
    state = job(folder)
    result = load(folder / "ckpt", state, progress_bar=False)
    numbers = json.loads((folder / "numbers.json").read_text())
    assert differences(folder, held(state.model, state.optimizers)) == []
    assert rates(state) == numbers["rates"]
    assert result.receipt.not_restored == ()
    assert result.receipt.layout == folder.name.partition("-")[0]
    assert result.rng_states is not None
    # One rank goes on with the first one's; the state of the other has no rank here.
    assert len(result.rng_states) == 1
    if folder is TRAINER:
        assert (result.step, result.extra["trainer_state"]["global_step"]) == (4, 4)
    else:
        assert (state.schedulers[0].last_epoch, result.extra["accelerator_step"]) == (numbers["epoch"], 0)


def test_with_deepspeed_inside_the_scheduler_and_random_states_come_from_beside() -> None:
    folder = DATA / "accelerate-zero2-w2"
    state = job(folder)
    result = load(folder / "ckpt", state, progress_bar=False)
    left = [one for one in differences(folder, held(state.model, state.optimizers)) if "step/" not in one]
    assert left == []
    assert state.schedulers[0].last_epoch == 8
    assert result.receipt.not_restored == ("state/engine",)
    assert (result.receipt.kind, result.receipt.layout) == ("deepspeed", "accelerate")
    # The folder with DeepSpeed's files alone has no scheduler.
    with pytest.raises(MismatchError, match="schedulers/StepLR: the checkpoint has none"):
        load(folder / "ckpt" / "pytorch_model", job(folder), progress_bar=False)


def test_with_dcp_folders_inside_the_scheduler_and_random_states_come_from_beside(tmp_path: Path) -> None:
    """As Accelerate saves an FSDP2 job: a DCP folder for the model, one for the optimizer, and files beside them."""
    import torch.distributed.checkpoint as dcp

    saved = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(saved.parameters(), lr=0.25)
    saved(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    names = ["weight", "bias"]
    state = optimizer.state_dict()
    by_name = {
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [{**group, "params": names} for group in state["param_groups"]],
    }
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    schedule.last_epoch = 5
    for folder, part in (
        ("pytorch_model_fsdp_0", {"model": saved.state_dict()}),
        ("optimizer_0", {"optimizer": by_name}),
    ):
        dcp.save(part, checkpoint_id=tmp_path / folder, no_dist=True)
    torch.save(schedule.state_dict(), tmp_path / "scheduler.bin")
    accelerates = {"random_state": states_of(4)["python"], "torch_manual_seed": states_of(4)["cpu"]}
    torch.save(
        {"step": 2, **accelerates, "numpy_random_seed": states_of(4)["numpy"]},
        tmp_path / "random_states_0.pkl",
    )
    model = nn.Linear(2, 2)
    own = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(own, 3)
    result = load(tmp_path, State(model, own, scheduler), progress_bar=False)
    assert torch.equal(model.weight, saved.weight)
    assert torch.equal(own.state[model.weight]["exp_avg"], optimizer.state[saved.weight]["exp_avg"])
    assert scheduler.last_epoch == 5
    assert result.rng_states is not None
    assert torch.equal(result.rng_states[0]["torch"], states_of(4)["cpu"])
    assert (result.receipt.kind, result.receipt.layout) == ("dcp", "accelerate")
    assert result.receipt.not_restored == ()


def test_the_model_alone_asks_for_nothing_beside_it() -> None:
    served = {
        f"/run/ckpt/{one.name}": Served(one.read_bytes())
        for one in (TRAINER / "ckpt").iterdir()
        if one.is_file()
    }
    names = ("trainer_state", "random_states", "optimizer", "scheduler", "rng_state")
    with counting_server(served) as server:
        state = job(TRAINER)
        result = load(server.url("/run/ckpt"), state, load_weights_only=True, progress_bar=False)
        assert "trainer_state" not in result.extra
        assert not [one.path for one in server.requests if any(name in one.path for name in names)]
        load(
            server.url("/run/ckpt"),
            State(state.model),
            options={"leave_out": ["optimizer", "scheduler"]},
            progress_bar=False,
        )
        assert not [one.path for one in server.requests if "/optimizer" in one.path]
        load(server.url("/run/ckpt"), job(TRAINER), progress_bar=False)
        assert server.gets("/run/ckpt/optimizer.pt") >= 1
        # A file that is named by itself is the weights, whatever lies beside it.
        with pytest.raises(
            MismatchError, match="load_weights_only=True, as the checkpoint has weights alone"
        ):
            load(server.url("/run/ckpt/model.safetensors"), job(TRAINER), progress_bar=False)


def states_of(rank: int) -> dict[str, Any]:
    """As Trainer gathers them."""
    generator = torch.Generator().manual_seed(rank)
    return {
        "python": random.Random(rank).getstate(),
        "numpy": np.random.RandomState(rank).get_state(),
        "cpu": generator.get_state(),
    }


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    """A folder with a model of one layer, and `files`: text, or an object that is pickled as its name's end says."""
    folder.mkdir(exist_ok=True)
    torch.save(nn.Linear(2, 2).state_dict(), folder / "pytorch_model.bin")
    for name, value in files.items():
        if isinstance(value, str):
            (folder / name).write_text(value)
        elif name.endswith(".pkl"):
            (folder / name).write_bytes(pickle.dumps(value))
        else:
            torch.save(value, folder / name)
    return folder


@pytest.mark.parametrize("ranks", [1, 8, 9, 25])
def test_random_states_of_as_many_ranks_as_there_are(tmp_path: Path, ranks: int) -> None:
    names = [f"rng_state_{rank}.pth" for rank in range(ranks)] if ranks > 1 else ["rng_state.pth"]
    files: dict[str, Any] = {name: states_of(rank) for rank, name in enumerate(names)}
    # A float that is none is written so by Python, though it is no JSON.
    files["trainer_state.json"] = (
        '{"global_step": 3, "best_metric": -Infinity, "log_history": [{"loss": NaN}]}'
    )
    seen: list[int] = []

    def count(tree: dict[str, Any]) -> None:
        seen.append(len(tree["rng"]))

    result = load(
        write(tmp_path / "run", files), State(nn.Linear(2, 2)), ignore_keys=count, progress_bar=False
    )
    assert seen == [ranks]
    assert result.rng_states is not None
    assert torch.equal(result.rng_states[0]["torch"], states_of(0)["cpu"])
    assert result.step == 3


def optimizer_files(model: nn.Module) -> Sequence[Any]:
    optimizers = [
        torch.optim.AdamW([model.weight], lr=0.1),
        torch.optim.SGD([model.bias], lr=0.2, momentum=0.9),
    ]
    for optimizer in optimizers:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    return [optimizer.state_dict() for optimizer in optimizers]


def test_several_optimizers_and_the_objects_that_were_registered(tmp_path: Path) -> None:
    first, second = optimizer_files(nn.Linear(2, 2))
    generator = torch.Generator().manual_seed(5)
    files = {
        "optimizer.bin": first,
        "optimizer_1.bin": second,
        "random_states_0.pkl": {
            "step": 7, "random_state": random.Random(1).getstate(),
            "numpy_random_seed": np.random.RandomState(1).get_state(),
            "torch_manual_seed": generator.get_state(), "torch_cuda_manual_seed": [],
        },
        "sampler.bin": {"epoch": 2},
        "custom_checkpoint_0.pkl": {"a": 1},
        "custom_checkpoint_1.pkl": {"b": torch.ones(2)},
        "scaler.pt": {
            "scale": 4.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9, "_growth_tracker": 1
        },
    }  # fmt: skip
    model = nn.Linear(2, 2)
    optimizers = [torch.optim.AdamW([model.weight]), torch.optim.SGD([model.bias], momentum=0.1)]
    scaler = torch.amp.GradScaler("cpu")
    result = load(write(tmp_path / "run", files), State(model, optimizers, scaler=scaler), progress_bar=False)
    assert [one.param_groups[0]["lr"] for one in optimizers] == [0.1, 0.2]
    assert torch.equal(
        optimizers[1].state[model.bias]["momentum_buffer"], second["state"][0]["momentum_buffer"]
    )
    assert scaler.get_scale() == 4.0
    assert result.extra["sampler"] == {"epoch": 2}
    assert result.extra["custom_checkpoint_0"] == {"a": 1}
    assert torch.equal(result.extra["custom_checkpoint_1"]["b"], torch.ones(2))
    assert result.extra["accelerator_step"] == 7
    assert result.rng_states is not None
    assert torch.equal(result.rng_states[0]["torch"], generator.get_state())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer.pt", [1], "expected a state_dict, got a list"),
        ("rng_state.pth", (1,), "expected a state_dict, got a tuple"),
        ("trainer_state.json", "{", "is no JSON that can be read"),
        ("trainer_state.json", "", "is no JSON that can be read"),
        ("scheduler.pt", "not pickled", "expected a file that torch.save wrote"),
    ],
)
def test_a_file_of_something_else_is_corrupt_and_named(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    folder = write(tmp_path / "run", {"trainer_state.json": "{}", name: value})
    with pytest.raises(CorruptError, match=message) as told:
        load(folder, State(nn.Linear(2, 2)), progress_bar=False)
    assert name in str(told.value)


def test_a_gap_between_the_ranks_files_is_an_unfinished_save(tmp_path: Path) -> None:
    files = {f"rng_state_{rank}.pth": states_of(rank) for rank in (0, 1, 3)}
    folder = write(tmp_path / "run", {"trainer_state.json": "{}", **files})
    with pytest.raises(
        CorruptError, match=r"rng_state_3\.pth is there, and rng_state_2\.pth beside it is not"
    ):
        load(folder, State(nn.Linear(2, 2)), progress_bar=False)


def test_a_folder_without_either_marker_has_nothing_beside(tmp_path: Path) -> None:
    first, _ = optimizer_files(nn.Linear(2, 2))
    folder = write(tmp_path / "run", {"optimizer.pt": first, "optimizer.bin": first})
    result = load(folder, State(nn.Linear(2, 2)), progress_bar=False)
    assert result.receipt.layout == "state dict"
    copied = tmp_path / "copied"
    shutil.copytree(TRAINER / "ckpt", copied)
    (copied / "trainer_state.json").unlink()
    with pytest.raises(MismatchError, match="optimizers/AdamW: the checkpoint has none"):
        load(copied, job(TRAINER), progress_bar=False)
