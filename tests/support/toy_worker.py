"""What the ranks of test_fourth_source.py do: each restores a toy checkpoint into targets of one kind."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from modules_worker import full, plain_job, sharded_job, train
from rankload.loader import LoadResult, State, load
from rankload.loader.sources import kinds
from toy_source import ToySource


def load_toy(folder: str | Path, state: Any, **options: Any) -> LoadResult:
    """`load` with the toy source before the others: all that a further source needs."""
    own = kinds.SOURCES
    kinds.SOURCES = (ToySource(), *own)
    try:
        return load(str(Path(folder, "header.toy")), state, **options)
    finally:
        kinds.SOURCES = own


def make_job() -> State:
    """A job that trained two steps."""
    state = plain_job(seed=3)
    state.schedulers = [torch.optim.lr_scheduler.StepLR(state.optimizers[0], 1)]
    train(state, 2)
    state.schedulers[0].step()
    return state


def saved_job(folder: str | Path) -> State:
    """The job that was saved in `folder`. Made anew it would differ in bits, by the number of threads."""
    job: State = torch.load(Path(folder, "job.pt"), weights_only=False)
    return job


def named_state(state: State) -> dict[str, Any]:
    """The job's parts under Composer's names, the optimizer's by the parameters' names."""
    (optimizer,) = state.optimizers
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    entries = {names[id(parameter)]: dict(values) for parameter, values in optimizer.state.items()}
    scheduler = state.schedulers[0].state_dict()
    return {
        "model": dict(state.model.state_dict()),
        "optimizers": {"AdamW": {"state": entries, "param_groups": groups}},
        "schedulers": {"StepLR": scheduler},
        "timestamp": {"batch": 2},
    }


def write_toy(folder: Path, job: State, *, ranks: int | None = None, **more: Any) -> None:
    """Writes `job`, and `more` parts, in the toy format: tensors in boxes, runs or whole, in turn, in two files."""
    files = {"a.bin": bytearray(), "b.bin": bytearray()}
    turn = count()

    def place(tensor: torch.Tensor) -> tuple[str, int]:
        name = ("a.bin", "b.bin")[next(turn) % 2]
        # Something between the pieces, and each at a whole element.
        files[name] += b"\xff" * (16 - len(files[name]) % 8)
        offset = len(files[name])
        files[name] += tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return name, offset

    def pieces(tensor: torch.Tensor) -> list[Any]:
        form = ("boxes", "runs", "whole")[next(turn) % 3]
        if form == "runs" and tensor.numel() > 1:
            cuts = [0, tensor.numel() // 3, tensor.numel() // 3 * 2 + 1, tensor.numel()]
            runs = [(a, b - a) for a, b in pairwise(cuts)]
            flat = tensor.contiguous().view(-1)
            return [[*place(flat.narrow(0, start, size)), start, size] for start, size in reversed(runs)]
        if form == "boxes" and tensor.ndim and tensor.shape[-1] > 1:
            half = tensor.shape[-1] // 2
            found = []
            for start, size in ((0, half), (half, tensor.shape[-1] - half)):
                box = tensor.narrow(-1, start, size)
                starts = [*(0 for _ in tensor.shape[1:]), start]
                found.append([*place(box), starts, list(box.shape)])
            return found
        return [[*place(tensor), [0] * tensor.ndim, list(tensor.shape)]]

    def encoded(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            plain = value.detach()
            return {"tensor": [str(plain.dtype).removeprefix("torch."), list(plain.shape), pieces(plain)]}
        if isinstance(value, Mapping):
            return {key: encoded(item) for key, item in value.items()}
        return [encoded(item) for item in value] if isinstance(value, list | tuple) else value

    header = {"ranks": ranks, "state": encoded({**named_state(job), **more})}
    header["files"] = {name: len(content) for name, content in files.items()}
    folder.mkdir()
    torch.save(job, folder / "job.pt")
    for name, content in files.items():
        Path(folder, name).write_bytes(content)
    Path(folder, "header.toy").write_text(json.dumps(header))


def same_state(state: State, saved: State) -> None:
    """Compares the weights and the optimizer's state of a restored job, and trains both on."""
    theirs = dict(saved.model.named_parameters())
    (mine,), (other,) = state.optimizers, saved.optimizers
    for name, parameter in state.model.named_parameters():
        assert torch.equal(full(parameter), theirs[name]), name
        expected = other.state.get(theirs[name], {})
        assert mine.state.get(parameter, {}).keys() == expected.keys(), name
        for key, value in expected.items():
            assert torch.equal(full(mine.state[parameter][key]), value), (name, key)
    for name, buffer in state.model.named_buffers():
        assert torch.equal(full(buffer), saved.model.get_buffer(name)), name
    for group, expected in zip(mine.param_groups, other.param_groups, strict=True):
        assert (group["lr"], group["weight_decay"]) == (expected["lr"], expected["weight_decay"])
    assert state.schedulers[0].state_dict() == saved.schedulers[0].state_dict()
    assert state.timestamp == {"batch": 2}


def fully_sharded(folder: str) -> None:
    """An FSDP2 job, whose shards along the first dimension are uneven."""
    torch.distributed.init_process_group("gloo")
    saved = saved_job(folder)
    for meta in (False, True):
        state = sharded_job(meta=meta)
        state.schedulers = [torch.optim.lr_scheduler.StepLR(state.optimizers[0], 1)]
        assert len({one.to_local().shape for one in state.model.parameters()}) > 1
        load_toy(folder, state)
        same_state(state, saved)
    losses, expected = train(state), train(saved)
    assert torch.allclose(torch.tensor(losses), torch.tensor(expected), rtol=1e-5), (losses, expected)
    torch.distributed.destroy_process_group()


def engines(weights: str, whole: str) -> None:
    """DeepSpeed engines of stages 1 and 3: from a file without an engine's part the weights, from one with it all."""
    import deepspeed
    from zero_model import full_state, make_engine, module_state
    from zero_model import train as train_engine

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    saved = saved_job(whole)
    theirs = dict(saved.model.named_parameters())
    entries = {name: saved.optimizers[0].state[one] for name, one in theirs.items() if one.requires_grad}
    for stage in (1, 3):
        for folder in (weights, whole):
            engine = make_engine(stage, seed=5)
            # The file has no state for the engine's scheduler.
            options = {"load_weights_only": folder == weights, "strict_model_weights": folder == weights}
            load_toy(folder, State(engine), **options)
            for name, value in module_state(engine).items():
                kind, _, key = name.partition("/")
                held = theirs[key].bfloat16() if kind == "module" else saved.model.get_buffer(key)
                assert torch.equal(value, held.float()), (stage, name)
            found = full_state(engine) if folder == whole else masters(engine)
            for name in entries:
                assert torch.equal(found[f"fp32/{name}"], theirs[name]), (stage, name)
                for key in ("exp_avg", "exp_avg_sq") if folder == whole else ():
                    assert torch.equal(found[f"{key}/{name}"], entries[name][key]), (stage, name, key)
            if folder == whole:
                assert engine.global_steps == 2
                base = engine.optimizer.optimizer
                assert {float(one["step"]) for one in base.state.values()} == {2.0}
                rates = [group["lr"] for group in saved.optimizers[0].param_groups]
                assert [group["lr"] for group in base.param_groups] == rates
            losses = train_engine(engine, 2, torch.distributed.get_rank())
            assert all(map(math.isfinite, losses)), losses
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def masters(engine: Any) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        f"fp32/{name}": safe_get_full_fp32_param(parameter).detach().float().cpu().clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
