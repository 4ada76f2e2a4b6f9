"""What the ranks of test_ranks.py do with one file a rank: they save their shards by torch alone, and restore them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from journey_worker import start_deepspeed
from mesh_jobs import JOBS, RANK, WORLD_SIZE, train_and_save, whole, with_scheduler
from modules_worker import train
from rankload.loader import CorruptError, State, capture_rng, load
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from zero_model import full_state, make_engine


def save(state: State, folder: Path) -> None:
    """As verl saves; and as training scripts do, in one file of each rank."""
    random.seed(RANK)
    np.random.seed(RANK)
    folder.mkdir(parents=True, exist_ok=True)
    model, optimizer = state.model.state_dict(), state.optimizers[0].state_dict()
    scheduler, rng = state.schedulers[0].state_dict(), capture_rng()
    own = {"cpu": rng["torch"], "numpy": rng["numpy"], "random": rng["python"]}
    of_rank = f"world_size_{WORLD_SIZE}_rank_{RANK}.pt"
    torch.save(model, folder / f"model_{of_rank}")
    torch.save(optimizer, folder / f"optim_{of_rank}")
    torch.save({"lr_scheduler": scheduler, "rng": own}, folder / f"extra_state_{of_rank}")
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": rng, "epoch": 3}
    torch.save(parts, folder / f"by-hand-{RANK}.pt")


def write(root: str, *kinds: str) -> None:
    """Jobs of these kinds train two steps, save, and train on; their tensors and losses lie beside."""
    dist.init_process_group("gloo")
    for kind in kinds:
        train_and_save(JOBS[kind](3), Path(root, kind), save)
    dist.barrier()
    dist.destroy_process_group()


SIZES = {
    "rows": (3, 5),
    "columns": (8, 5),
    "hybrid": (3, 5),
    "tp rows": (3, 17),
    "tp columns": (9, 5),
    "both": (2, 9),
}
"""In and out of linear layers that eight ranks shard, each in another way: unevenly, and with empty shards."""


def layers() -> dict[str, nn.Linear]:
    torch.manual_seed(4)
    return {name: nn.Linear(*size) for name, size in SIZES.items()}


def write_uneven(folder: str) -> None:
    """Shards `layers` over eight ranks, of which each saves its own in one file."""
    dist.init_process_group("gloo")
    shards = layers()
    flat = init_device_mesh("cpu", (8,))
    pairs = init_device_mesh("cpu", (2, 4), mesh_dim_names=("outer", "inner"))
    wide = init_device_mesh("cpu", (4, 2), mesh_dim_names=("outer", "inner"))
    cube = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "tensor"))
    fully_shard(shards["rows"], mesh=flat)
    by_dim = {2: Shard(1), 1: Shard(0)}
    fully_shard(shards["columns"], mesh=flat, shard_placement_fn=lambda one: by_dim[one.dim()])
    fully_shard(shards["hybrid"], mesh=pairs)
    parallelize_module(shards["tp rows"], wide["inner"], ColwiseParallel())
    fully_shard(shards["tp rows"], mesh=wide["outer"])
    parallelize_module(shards["tp columns"], pairs["inner"], RowwiseParallel())
    fully_shard(shards["tp columns"], mesh=pairs["outer"])
    parallelize_module(shards["both"], cube["tensor"], ColwiseParallel())
    fully_shard(shards["both"], mesh=cube["replicate", "shard"])
    torch.save(nn.ModuleDict(shards).state_dict(), Path(folder, f"uneven-{RANK}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def write_fsdp1(folder: str) -> None:
    """Saves a module in FullyShardedDataParallel, with its optimizer, in each form that has a file for each rank."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    dist.init_process_group("gloo")
    for form, mesh in (
        ("sharded", None),
        ("placed", init_device_mesh("cpu", (WORLD_SIZE,))),
        ("local", None),
    ):
        torch.manual_seed(4)
        inner = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        model = FullyShardedDataParallel(
            inner, device_mesh=mesh, use_orig_params=True, device_id=torch.device("cpu")
        )
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        kind = StateDictType.LOCAL_STATE_DICT if form == "local" else StateDictType.SHARDED_STATE_DICT
        with FullyShardedDataParallel.state_dict_type(model, kind):
            state = (
                optimizer.state_dict()
                if form == "local"
                else FullyShardedDataParallel.optim_state_dict(model, optimizer)
            )
            parts = {"model": model.state_dict(), "optimizer": state}
        torch.save(parts, Path(folder, f"{form}-{RANK}.pt"))
        # The optimizer's own flat pieces, since FSDP's full ones are wrong on a CPU.
        own: dict[str, Any] = {"model": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for name, parameter in model.named_parameters():
            plain = name.replace("_fsdp_wrapped_module.", "")
            own["model"][plain] = parameter.detach().flatten()
            for key in ("exp_avg", "exp_avg_sq"):
                own[key][plain] = (
                    optimizer.state[parameter][key].flatten() if parameter.numel() else torch.empty(0)
                )
        pieces: list[Any] = [None] * WORLD_SIZE
        dist.all_gather_object(pieces, own)
        if RANK == 0:
            flat = {
                f"{key}/{name}": torch.cat([piece[key][name] for piece in pieces])
                for key, names in own.items()
                for name in names
            }
            torch.save(flat, Path(folder, f"{form}-whole"))
    dist.barrier()
    dist.destroy_process_group()


def check(path: str, state: State, *, exact: bool = False, saved_by: int = 4) -> None:
    """Restores what is at `path`, a folder or its files by hand, and trains on as the job that saved it did."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    with_scheduler(state)
    result = load(path, state, progress_bar=False)
    expected, found = torch.load(folder / "tensors.pt"), whole(state)
    assert found.keys() == expected.keys()
    assert not [name for name, value in found.items() if not torch.equal(value, expected[name])]
    assert state.schedulers[0].last_epoch == 2
    receipt = result.receipt
    assert (receipt.kind, receipt.saved_world_size) == ("rank-shards", saved_by)
    assert (receipt.missing, receipt.unexpected, receipt.not_restored) == ((), (), ())
    assert result.extra == ({} if folder == Path(path) else {"epoch": 3})
    assert result.rng_states is not None
    for rank, states in enumerate(result.rng_states[:saved_by]):
        assert states["python"] == random.Random(rank).getstate()
    assert len(receipt.derived) == max(0, WORLD_SIZE - saved_by)
    theirs, mine = (
        torch.tensor(json.loads(Path(folder, "losses.json").read_text())),
        torch.tensor(train(state)),
    )
    assert torch.equal(mine, theirs) if exact else torch.allclose(mine, theirs, rtol=1e-5), (mine, theirs)


def restore(root: str, *cases: str) -> None:
    """Each of ``WRITTEN:TARGET[:exact]``, from the folder and from the files by hand."""
    dist.init_process_group("gloo")
    for case in cases:
        written, target, *exact = case.split(":")
        for path in (f"{root}/{written}", f"{root}/{written}/by-hand-{{rank}}.pt"):
            check(path, JOBS[target](seed=11), exact=bool(exact))
    # An error of one rank's is every rank's.
    broken = Path(root, "broken")
    try:
        load(str(broken), JOBS["plain"](), progress_bar=False)
    except CorruptError as error:
        assert "were not saved together" in error.message, error
    else:
        raise AssertionError("files of two saves were restored")
    dist.barrier()
    dist.destroy_process_group()


def engines(root: str, *kinds: str) -> None:
    """DeepSpeed engines of stages 1 and 3: masters, moments, steps and rates are those that were saved."""
    start_deepspeed()
    for kind in kinds:
        saved = torch.load(Path(root, kind, "tensors.pt"))
        for stage in (1, 3):
            engine = make_engine(stage, seed=5, client=True)
            state = State(engine)
            # The checkpoint has no state of the engine's own kind of scheduler.
            load(str(Path(root, kind)), state, progress_bar=False, strict_model_weights=False)
            found = full_state(engine)
            for name, value in found.items():
                part, _, key = name.partition("/")
                if part in ("fp32", "exp_avg", "exp_avg_sq"):
                    expected = saved[f"{'model' if part == 'fp32' else part}/{key}"]
                    assert torch.equal(value, expected), (kind, stage, name)
            assert {float(one["step"]) for one in engine.optimizer.optimizer.state.values()} == {2.0}
    dist.barrier()
    dist.destroy_process_group()
