"""What the ranks of test_journey.py do. Each function runs on every rank; an assertion ends its process."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from rankload.loader import LoadOptions, RankloadError, State, load, load_checkpoint, read
from torch import nn

RANK = int(os.environ.get("RANK", "0"))


class Classifier(nn.Module):
    """The shape of the model that the composer-zero*-w2 checkpoints hold, under Composer's names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def start_deepspeed() -> Any:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Otherwise a kernel that nobody needs here is compiled first, for two minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def classifier_engine(stage: int, seed: int = 5) -> Any:
    deepspeed = start_deepspeed()
    model = Classifier(seed)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 100_000,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def forward_of_linspace(engine: Any) -> torch.Tensor:
    engine.eval()
    with torch.no_grad():
        return engine(torch.linspace(-1, 1, 64).reshape(8, 8)).clone()


def composer_zero(root: str, expected: str) -> None:
    """Restores Composer's archives of stages 1 and 3, fully and weights only, and compares the forward pass.

    `root` is where the composer-zero*-w2 folders lie, `expected` the folder that has their expected.json. Prints
    the receipts of the full loads.
    """
    receipts = []
    for stage in (1, 3):
        told = json.loads(Path(expected, f"composer-zero{stage}-w2", "expected.json").read_text())
        wanted = torch.tensor(told["forward_of_linspace"])
        path = f"{root}/composer-zero{stage}-w2/ep1-ba4-rank{{rank}}.pt.tar"
        for weights_only in (False, True):
            engine = classifier_engine(stage)
            assert not torch.allclose(forward_of_linspace(engine), wanted)
            state = State(engine)
            result = load(path, state, load_weights_only=weights_only)
            assert torch.allclose(forward_of_linspace(engine), wanted)
            if weights_only:
                assert result.rng_states is None
            else:
                assert state.timestamp["batch"] == 4
                assert result.rng_states is not None
                assert len(result.rng_states) == 2
                assert engine.global_steps == 4
                receipts.append(result.receipt.as_dict())
    print(json.dumps(receipts))


def deepspeed_folder(folder: str, stage: str) -> None:
    """Restores a DeepSpeed folder; compares every tensor with what DeepSpeed recorded when it saved, and the next
    losses with those after DeepSpeed's own load."""
    from safetensors.torch import load_file
    from zero_model import LATER_DATA_SEED, full_state, make_engine, module_state, train

    start_deepspeed()
    wanted = load_file(f"{folder}/oracle.safetensors")
    told = json.loads(Path(folder, "oracle.json").read_text())

    engine = make_engine(int(stage), seed=7)
    result = load(folder, State(engine), load_weights_only=True)
    found = module_state(engine)
    for name, value in wanted.items():
        if name.startswith(("module/", "buffer/")):
            assert torch.equal(found[name], value), name
    assert result.rng_states is None

    engine = make_engine(int(stage), seed=8)
    result = load(folder, State(engine))
    found = full_state(engine)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert engine.global_steps == told["global_steps"]
    assert result.extra == {"epoch": 3}
    assert result.rng_states is not None
    assert len(result.rng_states) == 4
    assert len(result.receipt.derived) == (3 if stage == "1" else 0)
    losses = train(engine, 2, RANK, LATER_DATA_SEED)

    # The recorded losses are another machine's: its arithmetic may round otherwise from the first update on.
    if RANK == 0:
        assert losses[0] == told["losses_after"][0]
        assert abs(losses[1] / told["losses_after"][1] - 1) < 1e-3, (losses, told)
    native = make_engine(int(stage), seed=9)
    native.load_checkpoint(folder)
    assert losses == train(native, 2, RANK, LATER_DATA_SEED)
    print(json.dumps(result.receipt.as_dict()))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)


def plain_state() -> State:
    model = Plain()
    return State(model, torch.optim.AdamW(model.parameters()))


def snapshot(state: State) -> list[torch.Tensor]:
    """Copies of everything that a load may change."""
    tensors = [value.detach().clone() for value in state.model.state_dict().values()]
    for optimizer in state.optimizers:
        tensors += [v.clone() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    return tensors


def failing_plain(cases_json: str) -> None:
    """Loads of a plain state that fail; see `fails`."""
    fails(cases_json, plain_state, snapshot)


def failing_archives(cases_json: str) -> None:
    """Loads of Composer's archives into an engine of stage 1 that fail; see `fails`."""
    engine = classifier_engine(1)
    fails(cases_json, lambda: State(engine), engine_weights)


def failing_folder(cases_json: str, stage: str) -> None:
    """Loads of a DeepSpeed folder into an engine that fail; see `fails`."""
    from zero_model import make_engine

    start_deepspeed()
    engine = make_engine(int(stage))
    fails(cases_json, lambda: State(engine), engine_weights)


def engine_weights(state: State) -> list[torch.Tensor]:
    parameters = state.model.module.parameters()
    return [getattr(p, "ds_tensor", p).detach().clone() for p in parameters]


def fails(cases_json: str, make: Callable[[], State], copies: Callable[[State], list[torch.Tensor]]) -> None:
    """Runs each case, given as name to [path, options]; prints how it ended, for the parent to compare over ranks:
    name to [type, message, whether anything of the state changed], and the seconds that each took."""
    told: dict[str, list[Any]] = {}
    seconds: dict[str, float] = {}
    for name, (path, options) in json.loads(Path(cases_json).read_text()).items():
        state = make()
        before = copies(state)
        begin = time.monotonic()
        outcome = ["no error", ""]
        try:
            load_checkpoint(path, state, options=options)
        except RankloadError as error:
            outcome = [type(error).__name__, str(error)]
        seconds[name] = time.monotonic() - begin
        after = copies(state)
        # DeepSpeed leaves paddings as they come, which may be NaN.
        same = len(after) == len(before) and all(
            torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(after, before, strict=True)
        )
        told[name] = [*outcome, not same]
    print(json.dumps([told, seconds]))


def restores(path: str, expected: str, options: str = "{}") -> None:
    """A load of a plain state whose weights must become those in the file `expected`; prints the receipt."""
    state = plain_state()
    result = load(path, state, options=json.loads(options))
    wanted = torch.load(expected, weights_only=True)
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, wanted["model"][name]), name
    assert torch.distributed.is_initialized() is False
    print(json.dumps(result.receipt.as_dict()))


def slow_with_a_hasty_group(path: str, expected: str, timeout_s: str) -> None:
    """The same under a default group whose own time-out is much shorter than the load takes."""
    import datetime

    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=float(timeout_s)))
    state = plain_state()
    begin = time.monotonic()
    load(path, state)
    seconds = time.monotonic() - begin
    wanted = torch.load(expected, weights_only=True)
    assert torch.equal(state.model.up.weight, wanted["model"]["up.weight"])
    assert torch.distributed.is_initialized()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    assert seconds > 10 * float(timeout_s), seconds


def restores_ignoring(path: str, ignored: str, weights: str = "") -> None:
    result = load(
        path, plain_state(), load_weights_only=bool(weights), ignore_keys=[ignored] if ignored else None
    )
    print(json.dumps(result.receipt.as_dict()))


def disagreeing(path: str) -> None:
    """Ranks that pass different arguments all hear which."""
    for argument, values in (
        ("load_weights_only", (False, True)),
        ("strict_model_weights", (True, False)),
        ("ignore_keys", (["rng"], ["state"])),
        ("path", (path, path + "x")),
        ("options.verify", ("before", "off")),
    ):
        arguments: dict[str, Any] = {"path": path}
        if argument == "options.verify":
            arguments["options"] = {"verify": values[RANK]}
        else:
            arguments[argument] = values[RANK]
        try:
            load(state=plain_state(), **arguments)
        except RankloadError as error:
            assert f"argument {argument} differs between ranks" in str(error), str(error)
        else:
            raise AssertionError(argument)
    try:
        load(path, plain_state(), options={"chache_dir": "x"} if RANK else None)
    except RankloadError as error:
        assert "unknown option chache_dir" in str(error), str(error)
        assert error.rank == 1
    else:
        raise AssertionError("options")


def interrupted(path: str, number: str) -> None:
    """Rank 0, which downloads, is sent a signal in the middle; the others hear of it."""
    import signal
    import threading

    def once_bytes_arrive() -> None:
        cache = Path(os.environ["RANKLOAD_CACHE_DIR"])
        while not any(file.stat().st_size for file in cache.rglob("work-*/*") if file.is_file()):
            time.sleep(0.05)
        time.sleep(1)
        os.kill(os.getpid(), int(number))

    if RANK == 0:
        threading.Thread(target=once_bytes_arrive, daemon=True).start()
        try:
            load(path, plain_state())
        except KeyboardInterrupt:
            assert int(number) == signal.SIGINT
            sys.exit(130)
        raise AssertionError("not reached")
    begin = time.monotonic()
    try:
        load(path, plain_state())
    except RankloadError as error:
        assert type(error).__name__ == "PeerError", (type(error), str(error))
        assert "rank 0" in str(error)
        print(time.monotonic() - begin)
    else:
        raise AssertionError("the load succeeded")


class Callback:
    """On rank 1, ends its process in the middle of a restore."""

    def state_dict(self) -> dict[str, int]:
        return {"value": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if RANK == 1:
            os._exit(7)


class Refusing:
    """A tracker that is down."""

    def log_metrics(self, metrics: dict[str, float]) -> None:
        raise ValueError("the tracker is down")


def a_peer_dies_in_the_restore(folder: str) -> None:
    """The others are told that they hold half of something; before that, a logger that raises harms nobody."""
    import warnings

    path = f"{folder}/callbacks-{RANK}.pt"
    torch.save({"state": State(Plain(), callbacks=Callback()).state_dict()}, path)
    path = f"{folder}/callbacks-0.pt"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load(path, State(Plain()), Refusing())
    assert any("the tracker is down" in str(one.message) for one in told) == (RANK == 0)
    begin = time.monotonic()
    try:
        load(path, State(Plain(), callbacks=Callback()))
    except RankloadError as error:
        assert type(error).__name__ == "PartialRestoreError", (type(error), str(error))
        assert "rank 1" in str(error), str(error)
        assert time.monotonic() - begin < 10
    else:
        raise AssertionError("the load succeeded")


class Clock:
    """A timestamp of the user's own, as Composer's: an object with ``batch``."""

    def __init__(self, batch: int = 0) -> None:
        self.batch = batch

    def state_dict(self) -> dict[str, int]:
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch = state["batch"]


class AwryClock(Clock):
    """One rank restores another moment."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch = state["batch"] + RANK


def draws() -> list[Any]:
    import random

    import numpy as np

    return [random.random(), float(np.random.rand()), torch.rand(2).tolist()]


def round_trip(folder: str) -> None:
    """Saves with `State.state_dict` and `gather_rng`, restores into fresh objects, DDP-wrapped, and goes on."""
    from rankload.loader import TimestampError, gather_rng, restore_rng
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo")
    torch.manual_seed(100 + RANK)

    def job() -> State:
        model = DistributedDataParallel(Plain())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return State(model, optimizer, scheduler, timestamp=Clock(), rank_zero_seed=17, run_name="mine")

    def step(state: State) -> None:
        state.model.module.up.weight.data.add_(0.1)
        for parameter in state.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        state.optimizers[0].step()
        state.schedulers[0].step()
        state.timestamp.batch += 1

    first = job()
    step(first)
    path = f"{folder}/step1.pt"
    saved = {"state": first.state_dict(), "rng": gather_rng(), "note": {"epoch": 3}}
    if RANK == 0:
        torch.save(saved, path)
    expected = draws()
    torch.distributed.barrier()

    second = job()
    second.model.module.down.weight.data.zero_()
    result = load(path, second)
    assert second.timestamp.batch == 1
    assert result.extra == {"note": {"epoch": 3}}
    assert result.rng_states is not None
    assert len(result.rng_states) == torch.distributed.get_world_size()
    assert draws() != expected
    restore_rng(result.rng_states)
    assert draws() == expected
    step(first)
    step(second)
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)

    assert load_checkpoint(path, job(), ignore_keys=["rng"]) is None
    assert load_checkpoint(path, job(), load_weights_only=True) is None
    third = job()
    before = snapshot(third)
    ignoring = load(path, third, load_weights_only=True, ignore_keys=["state/model"])
    assert all(torch.equal(a, b) for a, b in zip(snapshot(third), before, strict=True))
    assert ignoring.receipt.ignored == ("state/model",)

    fourth = job()
    fourth.timestamp = AwryClock()
    try:
        load(path, fourth)
    except TimestampError as error:
        assert isinstance(error, RuntimeError)
        assert "rank 0: 1, rank 1: 2" in str(error), str(error)
    else:
        raise AssertionError("the ranks restored different moments")
    torch.distributed.destroy_process_group()
    print(json.dumps(result.receipt.as_dict()))


def another_world(path: str) -> None:
    """The same file where there are fewer or more ranks: what lacks is derived, alike on every rank."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model = Plain()
    state = State(model, torch.optim.AdamW(model.parameters()))
    result = load(path, state)
    assert result.rng_states is not None
    assert len(result.rng_states) == world_size
    again = load(path, state).rng_states
    assert str(again) == str(result.rng_states)
    assert len({str(entry["python"]) for entry in result.rng_states}) == world_size
    print(json.dumps(result.receipt.as_dict()))


def saves_and_restores(folder: str, stages: str) -> None:
    """DeepSpeed saves at each stage; a fresh engine restores it by URL-like names alone, fully and bit for bit."""
    import random

    from rankload.loader import gather_rng
    from zero_model import full_state, make_engine, module_state, train

    start_deepspeed()
    random.seed(RANK)
    for stage in map(int, stages.split(",")):
        dtype = "fp32" if stage == 0 else "bf16"
        first = make_engine(stage, dtype, seed=0)
        train(first, 2, RANK)
        root = f"{folder}/stage{stage}"
        states = gather_rng()
        first.save_checkpoint(root, client_state={"epoch": 2, "rng": states})
        torch.distributed.barrier()
        second = make_engine(stage, dtype, seed=1)
        result = load(root, State(second))
        assert result.extra == {"epoch": 2}
        assert result.rng_states is not None
        assert [str(state["python"]) for state in result.rng_states] == [str(s["python"]) for s in states]
        assert result.receipt.derived == ()
        assert second.global_steps == 2
        state_of = module_state if stage == 0 else full_state
        wanted, found = state_of(first), state_of(second)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), stage
        assert train(first, 2, RANK, 5) == train(second, 2, RANK, 5)
    print(json.dumps(result.receipt.as_dict()))


def read_files(root: str, folder: str) -> None:
    """Reads a file that all ranks share, and each rank's own; prints the errors where the last rank's is bad."""
    assert read(f"{root}/checkpoint-8/optimizer.pt")["param_groups"][0]["lr"] == 0.5
    assert read(f"{root}/checkpoint-8/rng_state_{{rank}}.pth")["python"] == RANK
    told = []
    for path in (f"{root}/damaged_{{rank}}.pt", f"{root}/hostile_{{rank}}.pt", f"{folder}/gone_{{rank}}.pt"):
        try:
            read(path)
        except RankloadError as error:
            told.append([type(error).__name__, str(error), error.rank])
    print(json.dumps(told))


def left_out_of_engine(folder: str) -> None:
    """An engine of each stage keeps its optimizer and scheduler; weights, fp32 masters and counters are restored.

    Another kind of optimizer is left out as well. Prints the error of a model that is left out.
    """
    from zero_model import full_state, make_engine, module_state, train

    def kept(engine: Any) -> str:
        optimizer = engine.basic_optimizer
        groups = [{**group, "params": None} for group in optimizer.param_groups]
        return repr((list(optimizer.state.values()), groups, engine.lr_scheduler.state_dict()))

    def weights(engine: Any) -> dict[str, torch.Tensor]:
        found = full_state(engine) if engine.zero_optimization_stage() else module_state(engine)
        return {name: value for name, value in found.items() if not name.startswith("exp_avg")}

    start_deepspeed()
    torch.set_printoptions(threshold=10**6)
    options = LoadOptions(leave_out=["optimizer", "scheduler"])
    for stage in range(4):
        dtype, root = "bf16" if stage else "fp32", f"{folder}/stage{stage}"
        saver = make_engine(stage, dtype, seed=0)
        train(saver, 2, RANK)
        saver.save_checkpoint(root, client_state={"epoch": 4})
        own = make_engine(stage, dtype, seed=1)
        train(own, 3, RANK)
        before, wanted = kept(own), weights(saver)
        assert before != kept(saver)
        result = load(root, State(own), options=options)
        found = weights(own)
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), stage
        assert kept(own) == before
        assert own.global_steps == 2
        assert result.extra == {"epoch": 4}
        assert result.receipt.ignored == ("state/optimizers", "state/schedulers"), result.receipt.ignored
        assert result.receipt.missing == result.receipt.not_restored == ()
        other = make_engine(
            stage, dtype, seed=1, optimizer="SGD", config={"zero_allow_untested_optimizer": True}
        )
        load(root, State(other), options=options)
        found = module_state(other)
        assert all(torch.equal(found[name], wanted[name]) for name in found), stage
        assert load(root, State(other), load_weights_only=True).extra == {"epoch": 4}
    try:
        load(root, State(own), options={"leave_out": ["model"]})
    except RankloadError as error:
        print(json.dumps(str(error)))


if __name__ == "__main__":
    # deepspeed's launcher puts --local_rank=N before the script's own arguments.
    name, *arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    from processes import end_together

    globals()[name](*arguments)
    end_together()
