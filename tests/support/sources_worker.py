"""Saves jobs in every form that other programs save, and restores them into every kind of target.

Every rank runs each function. `save` keeps, beside each checkpoint, every tensor of the job that saved it, whole, and
the losses of two further steps. `restore` makes targets of other weights and other rates, loads, compares every tensor
on every rank, bit for bit, and trains two steps; what `torch.distributed.checkpoint` saved is also restored by its own
reader, into a target of the same kind. All ranks train on the same batch, so that the losses do not depend on how many
there are, but for the order in which floats are added.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mesh_jobs import replicated_job, tensor_parallel_job, whole
from modules_worker import optimizer_for, plain_job, sharded_job, train, wrapped_job
from rankload.loader import State, load
from reshard_modules_worker import difference
from reshard_worker import RANK, WORLD_SIZE, differences, say, slug, tensors_at
from safetensors_files import as_safetensors, save_in_files
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn import functional
from zero_model import LATER_DATA_SEED, make_engine
from zero_model import train as train_engine

RATES = [[5e-4, 0.1], [5e-4, 0.0]]
"""Rate and weight decay of each parameter group of the jobs that save."""
STEPS = 2

_LINEAR = functional.linear

Save = Callable[[State, Path], None]


def main(*steps: str) -> None:
    """Does ``function argument function argument ...`` in one process group: starting the ranks costs most."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for function, argument in zip(steps[::2], steps[1::2], strict=True):
        globals()[function](argument)


# --- sources: how a job is saved --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A kind of job and how it is saved."""

    kind: str
    save: Save
    path: str = ""
    """What is loaded, in the folder that was saved to."""
    weights_only: bool = False
    parts: Callable[[State], dict[str, Any]] | None = None
    """The state that `torch.distributed.checkpoint` saved, of any job; None where another writer did."""


def by_name(state: State) -> dict[str, Any]:
    model, optimizer = get_state_dict(state.model, state.optimizers[0])
    return {"model": model, "optim": optimizer}


def flattened(state: State) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = get_state_dict(state.model, state.optimizers[0], options=options)
    return {"model": model, "optim": optimizer}


def by_number(state: State) -> dict[str, Any]:
    return {"model": inner(state.model).state_dict(), "optim": state.optimizers[0].state_dict()}


def with_dcp(kind: str, parts: Callable[[State], dict[str, Any]]) -> Source:
    return Source(kind, lambda state, folder: dcp.save(parts(state), checkpoint_id=folder), parts=parts)


def one_file(state: State, folder: Path) -> None:
    if RANK == 0:
        (folder / "model.safetensors").write_bytes(as_safetensors(weights(state.model)))


def several_files(state: State, folder: Path) -> None:
    if RANK == 0:
        held = weights(state.model)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for position, (name, tensor) in enumerate(held.items()):
            parts.setdefault(f"model-{position % 3 + 1:05}-of-00003.safetensors", {})[name] = tensor
        save_in_files(folder, parts)


def slices(state: State, folder: Path) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(weights(state.model), storage_writer=writer)


def as_trainer(state: State, folder: Path) -> None:
    """The files of transformers' ``checkpoint-N``."""
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(states, folder / f"rng_state_{RANK}.pth")
    one_file(state, folder)
    if RANK == 0:
        (optimizer,) = state.optimizers
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        scheduler = torch.optim.lr_scheduler.LambdaLR(plain_job().optimizers[0], lambda step: 1.0)
        torch.save(scheduler.state_dict(), folder / "scheduler.pt")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": STEPS, "epoch": 1.0}))


def by_hand(state: State, folder: Path) -> None:
    if RANK == 0:
        parts = {"model": state.model.state_dict(), "optimizer": state.optimizers[0].state_dict()}
        torch.save(parts, folder / "job.pt")


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict; of tied weights the first one alone, as safetensors' writer keeps them."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}


def of_each_rank(state: State, folder: Path) -> None:
    """Each rank's shards in files of its own, by verl's names."""
    end = f"world_size_{WORLD_SIZE}_rank_{RANK}.pt"
    torch.save(state.model.state_dict(), folder / f"model_{end}")
    torch.save(state.optimizers[0].state_dict(), folder / f"optim_{end}")


SOURCES = {
    "DCP by name of FSDP2": with_dcp("FSDP2", by_name),
    "DCP flattened of FSDP2": with_dcp("FSDP2", flattened),
    "DCP by number of FSDP2": with_dcp("FSDP2", by_number),
    "DCP by number of plain": with_dcp("plain", by_number),
    "DCP by name of HSDP": with_dcp("HSDP", by_name),
    "DCP by name of TP with FSDP2": with_dcp("TP with FSDP2", by_name),
    "safetensors, one file": Source("plain", one_file, "model.safetensors", weights_only=True),
    "safetensors with an index": Source("plain", several_files, weights_only=True),
    "torch's slices of FSDP2": Source("FSDP2", slices, weights_only=True),
    "Trainer's folder": Source("plain", as_trainer),
    "one file a rank of FSDP2": Source("FSDP2", of_each_rank),
    "one file a rank of TP with FSDP2": Source("TP with FSDP2", of_each_rank),
    "one .pt by hand": Source("plain", by_hand, "job.pt"),
}


# --- targets ----------------------------------------------------------------------------------------------------------


class LoadsItself:
    """A job that takes real values in Composer's layout, and loads them by torch's own means."""

    def __init__(self, seed: int) -> None:
        job = plain_job(seed)
        self.model, self.optimizers = job.model, job.optimizers

    def load_state_dict(
        self, state: dict[str, Any], logger: Any, *, exclude_algorithms: Any, algorithm_passes: Any
    ) -> None:
        if "model" in state:
            self.model.load_state_dict(state["model"])
        for optimizer in state.get("optimizers", {}).values():
            set_optimizer_state_dict(self.model, self.optimizers[0], optimizer)

    def load_model_state(
        self,
        state_dict: dict[str, Any],
        logger: Any,
        *,
        strict: bool,
        exclude_algorithms: Any,
        algorithm_passes: Any,
    ) -> None:
        self.model.load_state_dict(state_dict["model"], strict=strict)


def compiled_job(seed: int) -> State:
    """The compiler's own front end, without code for a processor: what is restored is the same, within less time."""
    state = plain_job(seed)
    state.model = torch.compile(state.model, backend="eager")
    return state


@dataclass(frozen=True)
class Modules:
    """A kind of module with an AdamW of torch's."""

    make: Callable[[int], Any]
    kind: str
    """Losses of jobs of one kind and size are equal."""
    reference: Callable[[int], Any] | None = None
    """What torch's own reader restores into, if not what `make` makes."""


@dataclass(frozen=True)
class Engine:
    """A DeepSpeed engine with an AdamW of torch's."""

    stage: int
    dtype: str


TARGETS: dict[str, Modules | Engine] = {
    "plain": Modules(plain_job, "plain"),
    "DDP": Modules(lambda seed: wrapped_job(), "DDP"),
    "compiled": Modules(compiled_job, "compiled"),
    "loads itself": Modules(LoadsItself, "plain", reference=plain_job),
    "FSDP2": Modules(sharded_job, "FSDP2"),
    "FSDP2 on meta": Modules(lambda seed: sharded_job(seed, meta=True), "FSDP2", reference=sharded_job),
    "HSDP": Modules(replicated_job, "HSDP"),
    "TP with FSDP2": Modules(tensor_parallel_job, "TP with FSDP2"),
    **{f"ZeRO {stage} {dtype}": Engine(stage, dtype) for dtype in ("fp32", "bf16") for stage in range(4)},
}

IN_PAIRS = ("HSDP", "TP with FSDP2")
"""Kinds of job whose mesh has two ranks along one of its dimensions, and here at least two along the other."""


def inner(model: Any) -> Any:
    """The module that others wrap."""
    return getattr(model, "_orig_mod", getattr(model, "module", model))


def held(state: Any) -> dict[str, torch.Tensor]:
    return whole(State(inner(state.model), state.optimizers))


def rates(optimizer: torch.optim.Optimizer) -> list[list[float]]:
    return [[group["lr"], group["weight_decay"]] for group in optimizer.param_groups]


def set_rates(optimizer: torch.optim.Optimizer) -> None:
    for group, (rate, decay) in zip(optimizer.param_groups, RATES, strict=True):
        group.update(lr=rate, weight_decay=decay)


# --- what the ranks do -----------------------------------------------------------------------------------------------


def save(request: str) -> None:
    """`request`: JSON of ``root`` and ``settings``, which are names of `SOURCES`. Those that are there are left."""
    told = json.loads(request)
    for name in told["settings"]:
        source, folder = SOURCES[name], Path(told["root"], slug(name, WORLD_SIZE))
        if (folder / "oracle.pt").exists():
            continue
        target = TARGETS[source.kind]
        assert isinstance(target, Modules)
        state = target.make(3)
        set_rates(state.optimizers[0])
        train(state, STEPS)
        (folder / "saved").mkdir(parents=True, exist_ok=True)
        dist.barrier()
        source.save(state, folder / "saved")
        tensors = held(state)
        if source.weights_only:
            state.optimizers = [optimizer_for(state.model)]
            set_rates(state.optimizers[0])
        losses = train(state)
        if RANK == 0:
            torch.save({"tensors": tensors, "losses": losses}, folder / "oracle.pt")
        dist.barrier()
        say({"saved": name})


def restore(request: str) -> None:
    """`request`: JSON of ``root`` (a folder) and ``cases``: [source, N, target]. What fails is told, and the next case
    is tried."""
    told = json.loads(request)
    for name, n, target in told["cases"]:
        # DeepSpeed's stage 3 leaves a linear function of its own in torch, which rounds otherwise.
        functional.linear = _LINEAR
        folder = Path(told["root"], slug(name, n))
        try:
            found = restored(SOURCES[name], n, TARGETS[target], folder)
        except Exception as error:
            found = {
                "problems": [f"{type(error).__name__}: {error}"],
                "apart": 0.0,
                "seconds": 0.0,
                "tensors": 0,
            }
        of_ranks: list[list[str]] = [[] for _ in range(WORLD_SIZE)]
        dist.all_gather_object(of_ranks, found["problems"])
        problems = sorted({problem for one in of_ranks for problem in one})
        say({"source": name, "n": n, "target": target, "m": WORLD_SIZE, **found, "problems": problems})
        gc.collect()


def restored(source: Source, n: int, target: Modules | Engine, folder: Path) -> dict[str, Any]:
    """One case: how many tensors were compared, seconds of the load, what was wrong, how far the losses are apart."""
    oracle = torch.load(folder / "oracle.pt", weights_only=True)
    tensors: dict[str, torch.Tensor] = oracle["tensors"]
    if source.weights_only:
        tensors = {key: value for key, value in tensors.items() if key.startswith("model/")}
    path = folder / "saved" / source.path
    state = target.make(11) if isinstance(target, Modules) else engine_of(target)
    begin = time.perf_counter()
    # Of the targets only engines have schedulers, and of another kind than the sources'.
    options = {"leave_out": ["scheduler"]}
    receipt = load(
        str(path), state, progress_bar=False, load_weights_only=source.weights_only, options=options
    ).receipt
    seconds = time.perf_counter() - begin
    problems = [f"{part}: {found}" for part in ("missing", "unexpected") if (found := getattr(receipt, part))]
    if isinstance(target, Modules):
        got = held(state)
        problems += differences(tensors, got)
        if source.parts is not None:
            reference = (target.reference or target.make)(12)
            with_torch(source.parts, path, reference)
            problems += [f"not as by dcp.load: {key}" for key in differences(held(reference), got)]
        optimizer = state.optimizers[0]
    else:
        tensors = of_engine(tensors, oracle["tensors"], target)
        kinds = () if source.weights_only else ("exp_avg", "exp_avg_sq")
        problems += differences(tensors, dict(tensors_at(state.model, target.stage, kinds)))
        optimizer = getattr(state.model.optimizer, "optimizer", state.model.optimizer)
        steps = {float(entries["step"]) for entries in optimizer.state.values() if "step" in entries}
        if not source.weights_only and steps != {float(STEPS)}:
            problems.append(f"steps {steps}")
    if source.weights_only:
        set_rates(optimizer)
    elif rates(optimizer) != RATES:
        problems.append(f"rates {rates(optimizer)}, expected {RATES}")
    if isinstance(target, Modules):
        losses = train(state)
        exact = (source.kind, n) == (target.kind, WORLD_SIZE)
        allowed = 0.0 if exact else 1e-5
    else:
        losses = train_engine(state.model, 2, rank=0, seed=LATER_DATA_SEED)
        # Another precision rounds otherwise at every step.
        allowed = 1e-5 if target.dtype == "fp32" else 2e-2
    apart = difference(losses, oracle["losses"])
    if apart > allowed:
        problems.append(f"losses {losses}, expected {oracle['losses']}")
    return {"problems": problems, "apart": apart, "seconds": seconds, "tensors": len(tensors)}


def with_torch(parts: Callable[[State], dict[str, Any]], path: Path, state: State) -> None:
    """Restores by torch's own reader."""
    if parts is by_number:
        # An optimizer's own state dict has tensors to read into once it has stepped.
        train(state, 1)
        read = parts(state)
        dcp.load(read, checkpoint_id=path)
        inner(state.model).load_state_dict(read["model"])
        state.optimizers[0].load_state_dict(read["optim"])
        return
    read = parts(state)
    dcp.load(read, checkpoint_id=path)
    options = StateDictOptions(flatten_optimizer_state_dict=parts is flattened)
    set_state_dict(
        state.model,
        state.optimizers[0],
        model_state_dict=read["model"],
        optim_state_dict=read["optim"],
        options=options,
    )


def engine_of(target: Engine) -> State:
    return State(make_engine(target.stage, target.dtype, seed=5, config={"gradient_clipping": 0.0}))


def of_engine(
    tensors: Mapping[str, torch.Tensor], everything: Mapping[str, torch.Tensor], target: Engine
) -> dict[str, torch.Tensor]:
    """`tensors` under the names, and in float32 of the precision, in which an engine reports what it holds.

    Of `everything` that was saved, what has moments is trained, and has a master.
    """
    dtype = torch.bfloat16 if target.dtype == "bf16" else torch.float32
    found: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind in ("exp_avg", "exp_avg_sq"):
            found[key] = value
        elif name in ("seen", "count"):
            found[f"buffer/{name}"] = value.float()
        elif kind == "model" and name != "head.weight":
            found[f"module/{name}"] = value.to(dtype).float()
            if f"exp_avg/{name}" in everything:
                found[f"fp32/{name}"] = value
    return found


if __name__ == "__main__":
    from processes import end_together

    main(*sys.argv[1:])
    end_together()
