"""What one rank of test_cuda.py does, on the device that it is told: ``cuda``, or ``cpu`` to try the test itself."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from modules_worker import check_against_oracle, check_plain, goes_on, oracle_of, sharded_job
from rankload.loader import State, capture_rng, gather_rng, load, load_checkpoint, restore_rng
from rankload.loader.rng import complete_states
from zero_model import full_state, make_engine, train

ROWS = 3_000


def start(device: str) -> None:
    """One process group of the device's own backend, and sums in the same order every time."""
    torch.use_deterministic_algorithms(True)
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")


def plain(device: str, folders: str, url: str) -> None:
    """ZeRO folders of four ranks into plain modules, from the folder and from a server."""
    start(device)
    for stage in (1, 3):
        folder = Path(folders, f"s{stage}-w4")
        for dtype in (torch.float32, torch.bfloat16):
            check_plain(folder, stage, dtype, device=device)
        for mode in ("node", "direct", "auto", "job"):
            check_plain(
                folder,
                stage,
                torch.float32,
                device=device,
                path=f"{url}/s{stage}-w4",
                options={"mode": mode},  # type: ignore[arg-type]
            )


def large(device: str, folder: str, url: str) -> None:
    """Tensors of several reads each, two of them not contiguous, into modules of two precisions."""
    saved = torch.load(Path(folder, "large.pt"), weights_only=True)
    for dtype in (torch.float32, torch.float16):
        for path in (folder, url):
            for verify in ("during", "before", "off"):
                module = large_module(seed=1).to(device, dtype)
                places = [tensor.data_ptr() for tensor in module.state_dict().values()]
                load(
                    f"{path}/large.pt",
                    State(module),
                    load_weights_only=True,
                    options={"mode": "auto", "verify": verify},
                )
                for name, tensor in module.state_dict().items():
                    assert torch.equal(tensor.cpu(), saved["state"]["model"][name].to(dtype)), name
                assert [tensor.data_ptr() for tensor in module.state_dict().values()] == places


def large_module(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    module = torch.nn.Module()
    module.straight = torch.nn.Parameter(torch.randn(ROWS, 1_001))
    module.crossed = torch.nn.Parameter(torch.randn(1_001, ROWS).t())
    module.register_buffer("picked", torch.randn(ROWS, 700)[:, ::7])
    return module


def save_large(folder: str) -> None:
    torch.save({"state": {"model": large_module(seed=0).state_dict()}}, Path(folder, "large.pt"))


def sharded(device: str, folders: str) -> None:
    """ZeRO folders into FSDP2 modules, those that lie on the meta device before too."""
    start(device)
    for stage in (1, 3):
        folder = Path(folders, f"s{stage}-w4")
        oracle = oracle_of(folder)
        for meta in (False, True):
            state = sharded_job(meta=meta, device=device)
            load(str(folder), state)
            assert {parameter.device.type for parameter in state.model.parameters()} == {device}
            check_against_oracle(state, oracle, low=False, weights_only=False)
            goes_on(state, oracle)


def random_states(device: str, folder: str) -> None:
    """The device's generator is saved, restored, sent between ranks, and derived where no rank saved it."""
    start(device)
    torch.manual_seed(3)
    draws(device)
    state = State(torch.nn.Linear(2, 2).to(device))
    rng = gather_rng()
    assert ("cuda" in rng[0]) == (device == "cuda")
    path = Path(folder, "random.pt")
    torch.save({"state": state.state_dict(), "rng": rng}, path)
    first = draws(device)
    assert draws(device) != first
    restore_rng(load_checkpoint(str(path), state))
    assert draws(device) == first
    states, derived = complete_states([capture_rng()], 2, None)
    assert len(derived) == 1
    seen = []
    for one in (states[1], states[0], states[1]):
        restore_rng([one])
        seen.append(draws(device))
    assert seen[0] == seen[2] != seen[1]


def draws(device: str) -> tuple[Any, ...]:
    return (
        random.random(),
        float(np.random.rand()),
        float(torch.rand(1)),
        torch.rand(3, device=device).tolist(),
    )


def engines(device: str, folders: str, saved: str) -> None:
    """ZeRO folders of four ranks into engines of every stage, whose own checkpoints then come back."""
    import deepspeed

    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo", verbose=False)
    for stage in (1, 3):
        folder = Path(folders, f"s{stage}-w4")
        oracle = oracle_of(folder)
        later = json.loads((folder / "oracle.json").read_text())
        for target in (1, 2, 3):
            engine = make_engine(target, seed=5)
            assert engine.device.type == device
            result = load(str(folder), State(engine))
            assert result.receipt.saved_world_size == 4
            problems = differences(oracle, full_state(engine))
            assert not problems, (stage, target, problems)
            assert engine.global_steps == later["global_steps"]
            own = Path(saved, f"{stage}-{target}")
            train(engine, 1, rank=0)
            engine.save_checkpoint(str(own), client_state={"rng": gather_rng()})
            before, first = full_state(engine), draws(device)
            losses = train(engine, 2, rank=0)
            engine = make_engine(target, seed=6)
            restore_rng(load_checkpoint(str(own), State(engine)))
            assert draws(device) == first
            problems = differences(before, full_state(engine))
            assert not problems, (stage, target, problems)
            again = train(engine, 2, rank=0)
            assert all(abs(a / b - 1) < 1e-3 for a, b in zip(again, losses, strict=True)), (again, losses)


def differences(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> list[str]:
    return sorted(
        name
        for name in expected.keys() | got.keys()
        if name != "step" and (name not in expected or not torch.equal(expected[name], got.get(name)))
    )
