"""What the ranks of test_ranks.py do with folders of ``torch.distributed.checkpoint``: they save, and restore."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dcp_folders import assert_same
from mesh_jobs import JOBS, RANK, train_and_save, whole, with_scheduler
from modules_worker import plain_job, sharded_job, train
from rankload.loader import State, load
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

KINDS: dict[str, Callable[..., State]] = {**JOBS, "numbered": plain_job, "flat": sharded_job}


def save(state: State, folder: str | Path, kind: str) -> None:
    """Saves as torch's documentation shows, with the scheduler beside.

    A job of kind ``numbered`` saves its optimizer's own state dict, one of kind ``flat`` as torchtitan does.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=kind == "flat")
    model, optimizer = get_state_dict(state.model, state.optimizers[0], options=options)
    if kind == "numbered":
        optimizer = state.optimizers[0].state_dict()
    weights = model if kind == "flat" else {"model": model}
    parts = {**weights, "optimizer": optimizer, "scheduler": state.schedulers[0].state_dict(), "step": 2}
    dcp.save(parts, checkpoint_id=folder, no_dist=not dist.is_initialized())


def by_dcp(folder: str, state: State) -> None:
    """Restores model and optimizer by torch's own reader."""
    model, optimizer = get_state_dict(state.model, state.optimizers[0])
    parts = {"model": model, "optimizer": optimizer}
    dcp.load(parts, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(
        state.model, state.optimizers[0], model_state_dict=parts["model"], optim_state_dict=parts["optimizer"]
    )


def write(root: str, *kinds: str) -> None:
    """Jobs of these kinds train two steps, save, and train on; their tensors and losses lie beside."""
    dist.init_process_group("gloo")
    for kind in kinds:
        train_and_save(
            KINDS[kind](3),
            Path(root, kind),
            lambda state, folder, kind=kind: save(state, folder / "saved", kind),
        )
    dist.barrier()
    dist.destroy_process_group()


def check(root: str, written: str, state: State, *, exact: bool) -> None:
    """Restores what a job of kind `written` saved, and trains on as that did."""
    folder = Path(root, written)
    with_scheduler(state)
    result = load(str(folder / "saved"), state, progress_bar=False)
    assert_same(whole(state), torch.load(folder / "tensors.pt"))
    assert state.schedulers[0].last_epoch == 2
    assert state.schedulers[0].milestones == {3: 1, 5: 1}
    assert result.extra == {"step": 2}
    assert result.receipt.kind == "dcp"
    assert not (result.receipt.missing)
    assert not (result.receipt.unexpected)
    assert not (result.receipt.not_restored)
    theirs, mine = json.loads(Path(folder, "losses.json").read_text()), train(state)
    assert mine == theirs if exact else torch.allclose(torch.tensor(mine), torch.tensor(theirs), rtol=1e-5), (
        mine,
        theirs,
    )


def restore(root: str, *pairs: str) -> None:
    """For each ``WRITTEN:TARGET``: restores, and compares with torch's own reader into the same kind of target."""
    dist.init_process_group("gloo")
    for pair in pairs:
        written, target, *exact = pair.split(":")
        check(root, written, JOBS[target](seed=11), exact=bool(exact))
        if written == "flat":
            continue  # torch's reader asks for keys of one form
        reference, mine = JOBS[target](seed=12), JOBS[target](seed=13)
        by_dcp(str(Path(root, written, "saved")), reference)
        load(
            str(Path(root, written, "saved")),
            mine,
            progress_bar=False,
            ignore_keys=["state/schedulers", "step"],
        )
        assert_same(whole(mine), whole(reference))
    dist.barrier()
    dist.destroy_process_group()


def large_job(seed: int) -> State:
    """An FSDP2 job of some megabytes: files of more than half a megabyte come in parts."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(640, 640), nn.Linear(640, 640))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return State(model, torch.optim.AdamW(model.parameters()))


def write_large(folder: str) -> None:
    dist.init_process_group("gloo")
    state = large_job(1)
    state.model(torch.ones(2, 640)).sum().backward()
    state.optimizers[0].step()
    model, optimizer = get_state_dict(state.model, state.optimizers[0])
    dcp.save({"model": model, "optim": optimizer}, checkpoint_id=folder)
    tensors = whole(state)
    if RANK == 0:
        torch.save(tensors, f"{folder}.pt")
    dist.barrier()
    dist.destroy_process_group()


def from_a_store(folder: str, url: str, mode: str) -> None:
    """Restores over http."""
    dist.init_process_group("gloo")
    state = large_job(2)
    load(url, state, progress_bar=False, options={"mode": mode})
    assert_same(whole(state), torch.load(f"{folder}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def engines(root: str, written: str) -> None:
    """DeepSpeed engines of stages 1 to 3: masters, moments, steps, rates and scheduler are those that were saved."""
    import deepspeed
    from zero_model import full_state, make_engine

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    saved = torch.load(Path(root, written, "tensors.pt"))
    for stage in (1, 2, 3):
        engine = make_engine(stage, seed=5, client=True)
        base = engine.optimizer.optimizer
        engine.lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(base, [30])
        load(str(Path(root, written, "saved")), State(engine), progress_bar=False)
        found = full_state(engine)
        for name, value in found.items():
            kind, _, key = name.partition("/")
            if kind in ("fp32", "exp_avg", "exp_avg_sq"):
                expected = saved[f"{'model' if kind == 'fp32' else kind}/{key}"]
                assert torch.equal(value, expected), (stage, name)
        assert engine.global_steps == 0
        assert (engine.lr_scheduler.last_epoch, engine.lr_scheduler.milestones) == (2, {3: 1, 5: 1})
        assert {float(one["step"]) for one in base.state.values()} == {2.0}
        assert [group["weight_decay"] for group in base.param_groups] == [0.3, 0.01]
    dist.barrier()
    dist.destroy_process_group()


def faulty(folder: str) -> None:
    """One rank cannot read a file: every rank raises its error. Prints it."""
    from rankload.loader import RankloadError
    from rankload.loader.fetch import items

    dist.init_process_group("gloo")
    if RANK == 1:

        def broken(*args: Any, **options: Any) -> Any:
            raise OSError(5, "Input/output error")

        items.read_item = broken
    try:
        load(folder, plain_job(), progress_bar=False)
    except RankloadError as error:
        print(json.dumps([type(error).__name__, str(error)]))
    dist.barrier()
    dist.destroy_process_group()
