"""One rank of a job of the matrix: runs one step after another, as the harness writes them, and says how each ended.

    rank_worker.py FOLDER
    rank_worker.py FOLDER once

``FOLDER/step-3.json`` is a `Step`. The answer is ``FOLDER/step-3.rank-1.json``: an `Ending`. A step without a journey
ends the job. Once: the first step alone, without its fault if that has happened already, as torchrun's agents start a
rank again; the answer is ``FOLDER/rank-1.json``, and the exit code says how it went.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
from injector import VARIABLE, InjectedError, from_environment
from rankload.loader.exporting.export import export_checkpoint
from torch import nn

from rankload import RankloadError, State, autoresume, load, save_checkpoint

RANK = int(os.environ.get("RANK", "0"))
POLL_S = 0.02
SETTLED_S = 3.0
"""How long threads and sockets that are ending have before they count as left behind."""


@dataclass(frozen=True)
class Step:
    """What every rank of a job does next."""

    journey: str = ""
    """A key of `JOURNEYS`."""
    path: str = ""
    out: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    """An `Injection` as JSON; none, where it is empty."""


@dataclass
class Ending:
    """How a step ended on one rank."""

    error: str = ""
    """Its type's name; empty where the journey came to its end."""
    message: str = ""
    met_by: int | None = None
    cause: str = ""
    """The type of its ``__cause__``."""
    injected: bool = False
    """Whether what this rank raised itself is there as the cause."""
    at: float = 0.0
    """When, by `time.monotonic`."""
    changed: bool = False
    """Whether any tensor or random state is another than before, bit for bit."""
    restored: bool = False
    """Whether every tensor is the checkpoint's, bit for bit."""
    left: list[str] = field(default_factory=list)
    """Threads, sockets and process groups that were not there before."""
    notes: list[str] = field(default_factory=list)
    """The receipt's, where there is one."""
    took: str = ""
    """The checkpoint that was restored, or what was written."""


class Net(nn.Module):
    """Of a checkpoint of 7 MB, so that it is fetched and restored in several parts."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(512, 1024)
        self.down = nn.Linear(1024, 64)


def plain_state(seed: int = 1) -> State:
    model = Net(seed)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model.down(model.up(torch.ones(2, 512))).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return State(model, optimizer)


def tensors_of(state: State) -> list[torch.Tensor]:
    engine = state.model
    if hasattr(engine, "zero_optimization_stage"):
        return engine_tensors(engine)
    found = list(state.model.state_dict().values())
    for optimizer in state.optimizers:
        found += [one for entry in optimizer.state.values() for one in entry.values() if torch.is_tensor(one)]
    return [getattr(one, "_local_tensor", one) for one in found]


def engine_tensors(engine: Any) -> list[torch.Tensor]:
    """What this rank has of an engine's weights, masters and moments."""
    found = [getattr(parameter, "ds_tensor", parameter).data for parameter in engine.module.parameters()]
    masters = engine.optimizer.fp32_partitioned_groups_flat
    return found + [one.data for one in masters]


def digest(state: State) -> str:
    """Of every bit that a load may change, and of the random states, which it must not."""
    summed = hashlib.sha256()
    for tensor in tensors_of(state):
        summed.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    for one in (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()):
        summed.update(repr(one).encode())
    return summed.hexdigest()


class Job:
    """What this rank keeps from step to step."""

    def __init__(self) -> None:
        self._engine: Any = None

    def plain(self) -> State:
        return plain_state()

    def sharded(self) -> State:
        """In a process group of the job's own, as FSDP needs one."""
        from modules_worker import sharded_job, train

        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        state = sharded_job(7)
        train(state, 1)
        return state

    def engine(self) -> State:
        from journey_worker import start_deepspeed
        from zero_model import make_engine, train

        start_deepspeed()
        if self._engine is None:
            self._engine = make_engine(3, seed=3)
            train(self._engine, 1, RANK)
        for tensor in engine_tensors(self._engine):
            tensor.add_(1)  # other than an earlier load may have left it
        return State(self._engine)


def options_of(step: Step) -> dict[str, Any]:
    """Those of the step; a folder on the small disk is another one on each node."""
    if step.options.get("cache_dir") == "small":
        return {**step.options, "cache_dir": f"{os.environ['FAULTS_SMALL']}/cache"}
    return step.options


def load_plain(step: Step, state: State) -> tuple[list[str], str]:
    result = load(step.path, state, options=options_of(step), progress_bar=False)
    return list(result.receipt.notes), result.receipt.path


def resume_plain(step: Step, state: State) -> tuple[list[str], str]:
    result = autoresume(step.path, state, options=options_of(step), progress_bar=False)
    assert result is not None, "nothing to resume from"
    return list(result.receipt.notes), result.receipt.path


def save(step: Step, state: State) -> tuple[list[str], str]:
    # What is saved is another state than the one before, so that the two can be told apart.
    tag = {"tag": step.out} if step.out else {}
    return [], save_checkpoint(step.path, state, extra={"epoch": 2}, options=options_of(step), **tag)


def export(step: Step, state: State) -> tuple[list[str], str]:
    exported = export_checkpoint(step.path, step.out, options=options_of(step))
    return list(exported.notes), exported.out


Run = Callable[[Step, State], "tuple[list[str], str]"]
JOURNEYS: dict[str, tuple[Callable[[Job], State], Run]] = {
    "load": (Job.plain, load_plain),
    "load into an engine": (Job.engine, load_plain),
    "autoresume": (Job.plain, resume_plain),
    "save": (Job.plain, save),
    "save of shards": (Job.sharded, save),
    "save of an engine": (Job.engine, save),
    "export": (Job.plain, export),
}


def run(step: Step, job: Job) -> Ending:
    make, work = JOURNEYS[step.journey]
    state = make(job)
    gc.collect()
    threads, sockets = set(threading.enumerate()), open_sockets()
    grouped = torch.distributed.is_initialized()
    before, ending = digest(state), Ending()
    os.environ.pop(VARIABLE, None)
    if step.fault:
        os.environ[VARIABLE] = step.fault
    injector = from_environment()
    if injector is not None:
        injector.install()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ending.notes, ending.took = work(step, state)
    except (Exception, SystemExit) as error:
        ending.at = time.monotonic()
        ending.error, ending.message = type(error).__name__, str(error)
        ending.met_by, ending.cause = getattr(error, "rank", None), type(error.__cause__).__name__
        ending.injected = isinstance(error, SystemExit) or has_cause(error, InjectedError)
        if not isinstance(error, RankloadError | SystemExit):
            import traceback

            traceback.print_exc()
    ending.at = ending.at or time.monotonic()
    if injector is not None:
        injector.remove()
    ending.changed = digest(state) != before
    if step.journey.startswith(("load", "autoresume")) and not ending.error:
        ending.restored = is_restored(state, ending.took)
    ending.left = left(threads, sockets, grouped)
    return ending


def has_cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    seen: set[int] = set()
    # Errors that were raised again may be each other's cause.
    while error is not None and id(error) not in seen:
        if isinstance(error, kind):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def is_restored(state: State, path: str) -> bool:
    """Whether the state is what the harness wrote down beside the job, where it did."""
    expected = Path(os.environ["FAULTS_EXPECTED"])
    if not expected.exists() or hasattr(state.model, "zero_optimization_stage"):
        return True
    known = torch.load(expected)
    wanted = known.get(Path(path).name) or known["*"]
    return all(torch.equal(a, b) for a, b in zip(tensors_of(state), wanted, strict=True))


def left(threads: set[threading.Thread], sockets: dict[str, str], grouped: bool) -> list[str]:
    """What has not gone away some time later."""
    until = time.monotonic() + SETTLED_S
    while True:
        gc.collect()
        found = [f"thread {one.name}" for one in threading.enumerate() if one not in threads]
        if not grouped:
            # A group of the job's own connects its ranks when they first need it.
            found += [f"socket {what}" for key, what in open_sockets().items() if key not in sockets]
        if torch.distributed.is_initialized() and not grouped:
            found.append("process group")
        if not found or time.monotonic() > until:
            return sorted(found)
        time.sleep(POLL_S)


def open_sockets() -> dict[str, str]:
    """The connections of this process: inode to addresses, as in /proc/net/tcp."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = dict.fromkeys(inodes, "")
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/self/net/{table}", encoding="ascii") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                if fields[9] in found:
                    found[fields[9]] = f"{fields[1]} to {fields[2]}"
    return {inode: what for inode, what in found.items() if what}


def main(folder: str) -> None:
    # What torch has made is not looked through again by each collection.
    gc.freeze()
    job, number = Job(), 0
    while True:
        told = Path(folder, f"step-{number}.json")
        while not told.exists():
            time.sleep(POLL_S)
        step = Step(**json.loads(told.read_text()))
        if not step.journey:
            break
        answer = Path(folder, f"step-{number}.rank-{RANK}.json")
        part = answer.with_suffix(".part")
        part.write_text(json.dumps(asdict(run(step, job))))
        part.rename(answer)
        number += 1
    # A group of the job's own is ended with the process: others in it may be dead.
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        os._exit(0)


def main_once(folder: str) -> None:
    step = Step(**json.loads(Path(folder, "step-0.json").read_text()))
    if Path(json.loads(step.fault)["journal"]).exists():
        step = replace(step, fault="")
    ending = run(step, Job())
    part = Path(folder, f"rank-{RANK}.part")
    part.write_text(json.dumps(asdict(ending)))
    part.rename(part.with_suffix(".json"))
    sys.exit(f"{ending.error}: {ending.message}" if ending.error else 0)


if __name__ == "__main__":
    (main_once if len(sys.argv) > 2 else main)(sys.argv[1])
