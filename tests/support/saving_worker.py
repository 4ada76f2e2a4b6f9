"""What the ranks of test_saving.py do. Each function runs on every rank; an assertion ends its process."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from journey_worker import start_deepspeed
from modules_worker import full, plain_job, sharded_job, train, wrapped_job

from rankload import LoadResult, RankloadError, State, load, restore_rng, save_checkpoint

RANK = int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def gloo() -> Iterator[None]:
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def job(kind: str, seed: int = 7) -> State:
    state = {"plain": plain_job, "ddp": lambda _: wrapped_job(), "fsdp2": sharded_job}[kind](seed)
    state.schedulers = [torch.optim.lr_scheduler.StepLR(state.optimizers[0], 1)]
    return state


def values(state: State) -> dict[str, torch.Tensor]:
    """Every tensor of the model and its optimizer, whole."""
    model = getattr(state.model, "module", state.model)
    (optimizer,) = state.optimizers
    names = {id(one): name for name, one in model.named_parameters()}
    found = {f"model/{name}": full(one).clone() for name, one in model.state_dict().items()}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            found[f"{key}/{names[id(parameter)]}"] = full(value).clone()
    return found


def draw() -> list[float]:
    """What this rank's generators give next."""
    return [random.random(), float(torch.rand(()))]


def save(path: str, kind: str) -> None:
    """Trains, saves, and writes beside it what was saved and what each rank draws next."""
    with gloo():
        state = job(kind)
        train(state, 2)
        random.seed(RANK)
        torch.manual_seed(RANK)
        written = save_checkpoint(path, state, extra={"epoch": 3, "loss": 0.5 + RANK})
        assert written == path
        draws: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(draws, draw())
        found = values(state)
        if RANK == 0:
            torch.save((found, draws), f"{path}.expected")


def restore(path: str, kind: str) -> None:
    """Restores what `save` saved, at any world size, and compares it."""
    with gloo():
        expected, draws = torch.load(f"{path}.expected")
        state = job(kind, seed=9)
        result = load(path, state)
        check(result, state, expected)
        restore_rng(result)
        if len(draws) > RANK:
            assert draw() == draws[RANK]


def check(result: LoadResult, state: State, expected: dict[str, torch.Tensor]) -> None:
    assert result.extra == {"epoch": 3, "loss": 0.5}
    assert result.epoch == 3
    files = result.receipt.as_dict()["files"]
    assert any("sha256" in how for one in files for how in one["verified_by"]) or all(
        one["fetched_bytes"] == 0 for one in files
    )
    found = values(state)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def engines(folder: str) -> None:
    """Engines of stages 1 and 3: saved, saved once more under the same tag, and restored into fresh ones."""
    start_deepspeed()
    from zero_model import full_state, make_engine
    from zero_model import train as train_engine

    for stage in (1, 3):
        engine = make_engine(stage, seed=3)
        train_engine(engine, 2, RANK)
        path = f"{folder}/stage{stage}"
        for state in (State(engine), State(engine.module)):
            written = save_checkpoint(path, state, extra={"epoch": 3})
            assert written == f"{path}/global_step2"
            assert {name for name in os.listdir(path) if not name.endswith(".py")} == {
                "global_step2",
                "latest",
            }
        expected, seeds = full_state(engine), draw()
        fresh = make_engine(stage, seed=5)
        result = load(path, State(fresh))
        assert result.extra == {"epoch": 3}
        restore_rng(result)
        assert draw() == seeds
        told = [how for one in result.receipt.as_dict()["files"] for how in one["verified_by"]]
        found = full_state(fresh)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (stage, name)
        print(json.dumps({"stage": stage, "verified_by": sorted(set(told))}), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def uploads(folder: str) -> None:
    """Nodes with a temporary folder each upload an engine's files, twice under the same tag, and load them again."""
    start_deepspeed()
    from zero_model import full_state, make_engine
    from zero_model import train as train_engine

    options = {"storage_options": {"path": folder, "target_protocol": "file"}}
    engine = make_engine(1, seed=3)
    train_engine(engine, 1, RANK)
    for _ in range(2):
        written = save_checkpoint("dir://run", State(engine), tag="a/b", extra={"epoch": 3}, options=options)
        assert written == "dir://run/a/b"
    expected = full_state(engine)
    fresh = make_engine(1, seed=5)
    result = load("dir://run", State(fresh), options=options)
    assert (result.extra, result.step) == ({"epoch": 3}, 1)
    found = full_state(fresh)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    print(json.dumps([one["name"] for one in result.receipt.as_dict()["files"]]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def saves_on_own_disks(folder: str) -> None:
    """Each node is in a folder of its own, in which the same path is its own disk's."""
    os.chdir(f"{folder}/disk{os.environ['GROUP_RANK']}")
    start_deepspeed()
    from zero_model import make_engine
    from zero_model import train as train_engine

    engine = make_engine(1, seed=3)
    train_engine(engine, 1, RANK)
    for _ in range(2):
        assert save_checkpoint("run", State(engine), tag="step1") == "run/step1"
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def is_killed(folder: str, stage: str, point: str) -> None:
    """Resumes from `folder`, trains a step, and saves it under one of two tags in turn; is killed at `point`."""
    from rankload.loader import saving

    start_deepspeed()
    from zero_model import make_engine
    from zero_model import train as train_engine

    def kill(*args: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    engine = make_engine(int(stage), seed=3)
    if os.path.exists(f"{folder}/latest"):
        result = load(folder, State(engine))
        assert result.extra["losses"] == engine.global_steps
        print(engine.global_steps, flush=True)
    train_engine(engine, 1, RANK)
    place, _, name = point.partition(":")
    if place == "engine":
        setattr(engine, name, kill)
    elif place == "saving":
        setattr(saving, name, kill)
    elif place == "after":
        threading.Timer(float(name), kill).start()
    elif place == "second rename":
        rename, calls = os.rename, [0]

        def rename_once(*args: Any) -> None:
            calls[0] += 1
            if calls[0] == 2:
                kill()
            rename(*args)

        os.rename = rename_once
    save_checkpoint(
        folder, State(engine), tag=f"step{engine.global_steps}", extra={"losses": engine.global_steps}
    )
    torch.distributed.barrier()


def fails(path: str, kind: str, how: str) -> None:
    """The last rank dies, or raises, in the middle of a save; the others say after how long which error they got."""
    from rankload.loader import saving
    from rankload.loader import state as states

    last = int(os.environ["WORLD_SIZE"]) - 1
    begin = time.monotonic()

    def fail(*args: Any, **more: Any) -> Any:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("this rank's own")

    if kind == "engine":
        start_deepspeed()
        from zero_model import make_engine

        engine = make_engine(1, seed=3)
        state = State(engine)
        if last == RANK:
            engine._save_zero_checkpoint = fail
    else:
        torch.distributed.init_process_group("gloo")
        state = job(kind)
        train(state, 1)
        if last == RANK:
            # Of a sharded job, in the middle of its collectives.
            if kind == "fsdp2":
                states._gathered = fail
            else:
                saving.full_state_dict = fail
    try:
        save_checkpoint(path, state)
    except RankloadError as error:
        print(json.dumps([type(error).__name__, error.message, time.monotonic() - begin]), flush=True)
        if last == RANK:
            # Its connections stay open, so that the others' collectives do not notice.
            time.sleep(5)
        os._exit(3)
    sys.exit(4)
