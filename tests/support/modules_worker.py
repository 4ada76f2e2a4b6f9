"""What the ranks of test_module_reshard.py do, and what its single-process tests share with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from rankload.loader import LoadOptions, LoadResult, State, load
from rankload.loader.formats.torch_file import read_index
from rankload.loader.materialize.tensors import TensorReader
from rankload.loader.saved.copies import copies_into
from rankload.loader.saved.regions import Run
from rankload.loader.saved.tensor import Piece, SavedTensor
from rankload.loader.targets.dtensor import dtensor_box, kept_part, local_part
from squeezing_model import Squeezing
from torch import nn
from zero_model import VOCABULARY, TinyModel

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


class Classifier(nn.Module):
    """The shape of the model that the composer-zero*-w2 checkpoints hold, under Composer's names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def oracle_of(folder: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder, "oracle.safetensors"))


def optimizer_for(model: nn.Module, kind: str = "AdamW") -> torch.optim.Optimizer:
    """Two groups, as the job that saved had them, but with hyperparameters of this job's own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.3},
        {"params": [p for p in trained if p.dim() < 2]},
    ]
    if kind == "SGD":
        return torch.optim.SGD(groups, lr=0.7, momentum=0.5)
    return torch.optim.AdamW(groups, lr=0.7)


def plain_job(
    seed: int = 7, dtype: torch.dtype = torch.float32, kind: str = "AdamW", device: str = "cpu"
) -> State:
    model = TinyModel(seed).to(dtype)
    if device != "cpu":
        model.to(device)
    return State(model, optimizer_for(model, kind))


def wrapped_job(dtype: torch.dtype = torch.float32, kind: str = "AdamW") -> State:
    """A plain job whose module DistributedDataParallel wraps."""
    state = plain_job(dtype=dtype, kind=kind)
    state.model = nn.parallel.DistributedDataParallel(state.model)
    return state


def sharded_job(
    seed: int = 7,
    *,
    meta: bool = False,
    dtype: torch.dtype = torch.float32,
    kind: str = "AdamW",
    device: str = "cpu",
) -> State:
    """A `TinyModel` of which each rank keeps its shards, two weights cut along their second dimension."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh(device, (WORLD_SIZE,))

    def placed(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if tuple(parameter.shape) == (24, 72) else None

    with torch.device("meta" if meta else device):
        model = TinyModel(seed).to(dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=placed)
    fully_shard(model, mesh=mesh)
    return State(model, optimizer_for(model, kind))


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor, which every rank must ask for, or of another tensor, in the CPU's memory."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()


def moments(oracle: dict[str, torch.Tensor]) -> list[str]:
    """The kinds of optimizer state that `oracle` tells of, in the same order on every rank."""
    return sorted({name.partition("/")[0] for name in oracle} - {"fp32", "module", "buffer", "step"})


def check_against_oracle(
    state: State, oracle: dict[str, torch.Tensor], *, low: bool, weights_only: bool
) -> None:
    """Compares every tensor with what DeepSpeed itself reported when it saved, bit for bit.

    `low`: the weights are those that the module computed with, not the fp32 masters.
    """
    dtype = next(state.model.parameters()).dtype
    found = dict(state.model.named_parameters())
    for name, parameter in found.items():
        key = f"module/{name}" if low or f"fp32/{name}" not in oracle else f"fp32/{name}"
        assert torch.equal(full(parameter).float(), oracle[key].to(dtype).float()), key
    for name, buffer in state.model.named_buffers():
        assert torch.equal(full(buffer).float(), oracle[f"buffer/{name}"]), name
    assert state.model.head.weight is state.model.wte.weight
    if not state.optimizers:
        return
    optimizer = state.optimizers[0]
    if weights_only:
        assert not optimizer.state
        return
    steps = set()
    for name, parameter in found.items():
        entries = optimizer.state.get(parameter, {})
        assert bool(entries) is parameter.requires_grad, name
        assert not entries or entries.keys() >= set(moments(oracle)), name
        for kind in moments(oracle) if entries else ():
            assert type(entries[kind]) is type(parameter.data), (name, kind)
            assert (entries[kind].dtype, entries[kind].device) == (dtype, parameter.device)
            assert getattr(entries[kind], "placements", None) == getattr(parameter, "placements", None)
            assert torch.equal(full(entries[kind]), oracle[f"{kind}/{name}"].to(dtype)), (name, kind)
        if "step" in entries:
            assert float(entries["step"]) == float(oracle.get("step", 3))
            steps.add(id(entries["step"]))
    assert len(steps) == (0 if "momentum_buffer" in moments(oracle) else len(optimizer.state))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(0 < group["lr"] < 1e-3 for group in optimizer.param_groups)


def by_hand(oracle: dict[str, torch.Tensor], restored: State, *, low: bool) -> State:
    """A plain job whose tensors are set from `oracle` one by one; its hyperparameters are those of `restored`."""
    first = next(restored.model.parameters())
    kinds = moments(oracle)
    kind = type(restored.optimizers[0]).__name__
    state = plain_job(seed=11, dtype=first.dtype, kind=kind, device=first.device.type)
    optimizer = state.optimizers[0]
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            key = f"module/{name}" if low or not parameter.requires_grad else f"fp32/{name}"
            parameter.copy_(oracle[key])
            if parameter.requires_grad:
                optimizer.state[parameter] = {
                    kind: oracle[f"{kind}/{name}"].to(parameter, copy=True) for kind in kinds
                }
                if "momentum_buffer" not in kinds:
                    optimizer.state[parameter]["step"] = torch.tensor(float(oracle.get("step", 3)))
        for name, buffer in state.model.named_buffers():
            buffer.copy_(oracle[f"buffer/{name}"])
    for own, theirs in zip(optimizer.param_groups, restored.optimizers[0].param_groups, strict=True):
        own.update({key: value for key, value in theirs.items() if key != "params"})
    return state


def train(state: State, steps: int = 2, clip: float | None = None) -> list[float]:
    """Trains on the same data on every rank."""
    data = torch.Generator().manual_seed(99)
    device = next(state.model.parameters()).device
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, VOCABULARY, (2, 9), generator=data).to(device)
        loss = state.model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        state.optimizers[0].zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(state.model.parameters(), clip)
        state.optimizers[0].step()
        losses.append(float(loss.detach()))
    return losses


def check_plain(
    folder: str | Path,
    stage: int,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    path: str | None = None,
    options: LoadOptions | None = None,
) -> LoadResult:
    """Restores a ZeRO folder into a plain job, and trains on beside one that was set by hand.

    `path`: where it is loaded from, if not from the folder itself.
    """
    oracle = oracle_of(folder)
    path = path or str(folder)
    state = plain_job(dtype=dtype, device=device)
    load(path, state, load_weights_only=True, options=options)
    # With weights only, stages 1 and 2 are read from the module's file alone.
    low = dtype == torch.bfloat16
    check_against_oracle(state, oracle, low=low or stage < 3, weights_only=True)
    state = plain_job(dtype=dtype, device=device)
    held = list(state.model.parameters())
    result = load(path, state, options=options)
    check_against_oracle(state, oracle, low=low, weights_only=False)
    assert all(a is b for a, b in zip(held, state.model.parameters(), strict=True))
    reference = by_hand(oracle, state, low=low)
    assert train(state) == train(reference)
    for (name, mine), theirs in zip(
        state.model.named_parameters(), reference.model.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    return result


def plain(folder_1: str, folder_3: str) -> None:
    """`check_plain` of each stage's folder, once more in a module that DistributedDataParallel wraps."""
    torch.distributed.init_process_group("gloo")
    for stage, folder in ((1, folder_1), (3, folder_3)):
        check_plain(folder, stage, torch.float32)
        state = wrapped_job()
        load(folder, state)
        inner = State(state.model.module, state.optimizers)
        check_against_oracle(inner, oracle_of(folder), low=False, weights_only=False)
        train(state, 1)
    # The group ends when this function has, and its modules with it: see processes.end_together.


def fully_sharded(folder_1: str, folder_3: str, files: str, composer: str) -> None:
    """Everything that is restored into FSDP2 jobs, and DTensors of many shapes. Prints the receipts of ZeRO folders."""
    torch.distributed.init_process_group("gloo")
    for folder in (folder_1, folder_3):
        print(json.dumps(zero_folder(folder).receipt.as_dict()))
    single_files(files)
    of_composer(composer)
    boxes(files)
    torch.distributed.destroy_process_group()


def zero_folder(folder: str) -> LoadResult:
    """Restores a ZeRO folder into FSDP2 jobs, and trains on beside a plain one that was set by hand."""
    oracle = oracle_of(folder)
    state = sharded_job()
    train(state, 1)  # so that FSDP has put its hooks and gathered its weights once
    state.optimizers = [optimizer_for(state.model)]
    result = load(folder, state)
    check_against_oracle(state, oracle, low=False, weights_only=False)
    goes_on(state, oracle)
    if WORLD_SIZE == 2:
        state = sharded_job(meta=True)
        load(folder, state)
        check_against_oracle(state, oracle, low=False, weights_only=False)
        goes_on(state, oracle)
        state = sharded_job(dtype=torch.bfloat16)
        load(folder, state)
        check_against_oracle(state, oracle, low=True, weights_only=False)
        # A hook of the user's runs, and is given shards.
        state = sharded_job()
        seen: list[str] = []
        state.model.register_load_state_dict_pre_hook(lambda module, saved, *rest: seen.extend(saved))
        load(folder, state)
        assert "odd" in seen
        check_against_oracle(state, oracle, low=False, weights_only=False)
    return result


def goes_on(state: State, oracle: dict[str, torch.Tensor]) -> None:
    reference = by_hand(oracle, state, low=False)
    assert torch.allclose(torch.tensor(train(state)), torch.tensor(train(reference)), rtol=1e-5)
    theirs = dict(reference.model.named_parameters())
    for name, mine in state.model.named_parameters():
        assert torch.allclose(full(mine), full(theirs[name]), rtol=1e-4, atol=1e-6), name


def single_files(folder: str) -> None:
    """Restores one job's single files in four layouts into FSDP2 jobs."""
    whole = torch.load(Path(folder, "composer.pt"), weights_only=False)["state"]
    for form in ("composer", "hand-written", "lightning", "bare"):
        state = sharded_job()
        if form == "bare":
            state.optimizers = []
        load(str(Path(folder, f"{form}.pt")), state, load_weights_only=form == "bare")
        for name, parameter in state.model.named_parameters():
            assert torch.equal(full(parameter), whole["model"][name]), name
        for optimizer in state.optimizers:
            theirs = whole["optimizers"]["AdamW"]
            own = [p for group in optimizer.param_groups for p in group["params"]]
            for position, parameter in enumerate(own):
                for key, value in theirs["state"][position].items():
                    assert torch.equal(full(optimizer.state[parameter][key]), value), (position, key)
            assert optimizer.param_groups[0]["lr"] == theirs["param_groups"][0]["lr"]
    # What is ignored stays as it is, or becomes zeros where the optimizer cannot do without.
    state = sharded_job()
    before = full(state.model.odd).clone()
    ignore = ["state/model/odd", "state/optimizers/AdamW/state/*/exp_avg"]
    result = load(str(Path(folder, "composer.pt")), state, ignore_keys=ignore)
    assert torch.equal(full(state.model.odd), before)
    entries = state.optimizers[0].state[state.model.wte.weight]
    assert not full(entries["exp_avg"]).any()
    assert full(entries["exp_avg_sq"]).any()
    assert len(result.receipt.derived) == len(state.optimizers[0].state)
    train(state, 1)


def of_composer(path: str) -> None:
    from torch.distributed.fsdp import fully_shard

    whole = torch.load(path, weights_only=False)["state"]
    model = fully_shard(Squeezing())
    optimizer = torch.optim.Adam(model.parameters())
    state = State(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    load(path, state)
    names = dict(model.named_parameters())
    for key, value in whole["model"].items():
        assert torch.equal(full(names[key.removeprefix("module.")]), value), key
    for key, entries in whole["optimizers"]["Adam"]["state"].items():
        for entry, value in entries.items():
            assert torch.equal(full(optimizer.state[names[key.removeprefix("module.")]][entry]), value), key
    assert state.timestamp["batch"] == 8


def boxes(folder: str) -> None:
    """Fills DTensors of many shapes, placed along each dimension, from a whole tensor and from runs of a flat one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    reader = TensorReader()
    for shape in ((7, 5), (2, 3), (1,), (4,), (3, 1, 5), (5, 4, 2), ()):
        numel = torch.Size(shape).numel()
        path = Path(folder, f"{'-'.join(map(str, shape))}.{RANK}.pt")
        torch.save({"whole": torch.arange(numel).view(shape), "flat": torch.arange(-3, numel + 2)}, path)
        tree = read_index(str(path)).tree
        cut = numel // 3
        (flat,) = tree["flat"].storages
        pieces = (Piece(Run(0, cut), 3, (1,), flat), Piece(Run(cut, numel - cut), 3 + cut, (1,), flat))
        in_runs = SavedTensor.in_pieces("int64", shape, pieces)
        wanted = torch.arange(numel).view(shape)
        for placement in (Replicate(), *(Shard(dim) for dim in range(len(shape)))):
            for source in (tree["whole"], in_runs):
                target = distribute_tensor(torch.full(shape, -1), mesh, [placement])
                region, memory = kept_part(target, "x")
                copies = list(copies_into(source, region, memory, name="x"))
                reader.copy(copies, {"x": local_part(target, "x")[1]})
                assert torch.equal(target.full_tensor(), wanted), (shape, placement)
            local = target.to_local()
            assert dtensor_box(target, "x").sizes == tuple(local.shape) or not local.numel()


def save_with_deepspeed(root: str) -> None:
    """Saves engines of stages 0 (bf16) and 2 (fp32), each with an oracle as in tests/data."""
    import deepspeed
    from safetensors.torch import save_file
    from zero_model import full_state, make_engine, module_state
    from zero_model import train as train_engine

    # Otherwise a kernel that nobody needs here is compiled first, for two minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    for stage, dtype in ((0, "bf16"), (2, "fp32")):
        engine = make_engine(stage, dtype)
        train_engine(engine, 3, RANK)
        folder = Path(root, f"s{stage}")
        if stage:
            oracle = full_state(engine)
        else:
            names = {id(p): name for name, p in engine.module.named_parameters()}
            oracle = module_state(engine)
            optimizer = engine.optimizer
            groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            pairs = [pair for low, high in groups for pair in zip(low, high, strict=True)]
            for low, master in pairs:
                oracle[f"fp32/{names[id(low)]}"] = master.detach().clone()
                for kind in ("exp_avg", "exp_avg_sq"):
                    oracle[f"{kind}/{names[id(low)]}"] = optimizer.optimizer.state[master][kind].clone()
                oracle["step"] = optimizer.optimizer.state[master]["step"].clone()  # one more, at its start
        engine.save_checkpoint(folder)
        if RANK == 0:
            save_file(
                {name: value.contiguous() for name, value in oracle.items()},
                Path(folder, "oracle.safetensors"),
            )
        torch.distributed.barrier()
