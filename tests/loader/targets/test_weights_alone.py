"""Weights in safetensors files, into every kind of target on several ranks; bit for bit what the writer held."""

from __future__ import annotations

import importlib.util
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward_model import EXTRAS, FOLDERS, Awkward, check, checkpoint, oracle
from bad_server import Behaviour, bad_server
from deepspeed_ranks import ENVIRONMENT, WITHOUT
from processes import Finished, run_ranks
from rankload.loader import State, load
from safetensors_files import as_safetensors

WIDE = 1024


def run(
    function: str, world_size: int, *args: object, nodes: tuple[int, ...] = (), cache: str = ""
) -> list[Any]:
    """Runs a function of this file on every rank, which must all end well; what each printed last, as JSON."""
    node_of = [node for node, size in enumerate(nodes or (world_size,)) for _ in range(size)]

    def environment(rank: int) -> Mapping[str, str | None]:
        own = {"RANKLOAD_CACHE_DIR": f"{cache}{node_of[rank]}"} if cache else {}
        return {**(WITHOUT if function == "modules" else ENVIRONMENT), **own}

    finished: list[Finished] = run_ranks(
        f"{__file__}:{function}", world_size, args=args, deadline_s=200, nodes=nodes or None, env=environment
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in finished]


def ignored(folder: str) -> list[str] | None:
    return list(EXTRAS) if folder == "safetensors-single" else None


def modules() -> None:
    """Each folder into DDP-wrapped, compiled and FSDP2 modules, of memory and of none."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo")
    for folder in FOLDERS:
        wrapped = DistributedDataParallel(Awkward())
        load(checkpoint(folder), State(wrapped), load_weights_only=True, ignore_keys=ignored(folder))
        check(wrapped.module, oracle(folder))
        compiled = torch.compile(Awkward())
        load(checkpoint(folder), State(compiled), load_weights_only=True, ignore_keys=ignored(folder))
        check(compiled._orig_mod, oracle(folder))
        for meta in (False, True):
            with torch.device("meta" if meta else "cpu"):
                model = Awkward()
            for block in [*model.blocks, model.low]:
                fully_shard(block)
            fully_shard(model)
            load(checkpoint(folder), State(model), load_weights_only=True, ignore_keys=ignored(folder))
            check(model, oracle(folder))
    print(json.dumps("done"), flush=True)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4] if "TEST_ALL" not in os.environ else [1, 2, 3, 4, 8])
def test_modules_on_any_number_of_ranks(world_size: int) -> None:
    assert run("modules", world_size) == ["done"] * world_size


def engine_of(stage: int, model: torch.nn.Module, dtype: str) -> Any:
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 100_000,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    return deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=config)[0]


def engines() -> None:
    """Each folder into engines of each stage: their weights, and the masters that the optimizer updates."""
    from deepspeed.utils import safe_get_full_fp32_param

    for dtype in ("fp32", "bf16"):
        for stage in (0, 1, 2, 3):
            for folder in FOLDERS if stage in (1, 3) or "TEST_ALL" in os.environ else FOLDERS[1:2]:
                wanted = oracle(folder)
                engine = engine_of(stage, Awkward(low=torch.float32), dtype)
                load(checkpoint(folder), State(engine), load_weights_only=True, ignore_keys=ignored(folder))
                low = torch.bfloat16 if dtype == "bf16" else torch.float32
                for name, parameter in engine.module.named_parameters():
                    assert torch.equal(whole(parameter), wanted[name].to(low)), (stage, folder, name)
                    if parameter.requires_grad and stage:
                        master = safe_get_full_fp32_param(parameter)
                        assert torch.equal(master, wanted[name].float()), (stage, folder, name)
                assert torch.equal(engine.module.seen, wanted["seen"].to(engine.module.seen.dtype))
                assert int(engine.module.count) == int(wanted["count"])
    print(json.dumps("done"), flush=True)


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("world_size", [2] if "TEST_ALL" not in os.environ else [1, 2, 3, 4, 8])
def test_engines_of_every_stage(world_size: int) -> None:
    assert run("engines", world_size) == ["done"] * world_size


# --- from a server ---------------------------------------------------------------------------------------------------


def wide(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDE, WIDE, bias=False) for _ in range(3)))


def wide_files() -> dict[str, bytes]:
    """A model of 12 MiB in two files, beside as many bytes that no job here wants."""
    weights = wide(3).state_dict()
    parts = {
        "model-00001-of-00002.safetensors": {
            "0.weight": weights["0.weight"],
            "other": torch.ones(3, WIDE, WIDE),
        },
        "model-00002-of-00002.safetensors": {name: weights[name] for name in ("1.weight", "2.weight")},
    }
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    files = {name: as_safetensors(tensors) for name, tensors in parts.items()}
    return {**files, "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}


def from_server(url: str, kind: str) -> None:
    """One rank of a job without the weight ``other``; tells what it holds of the others, and what was fetched."""
    torch.distributed.init_process_group("gloo")
    model = wide(4)
    state = State(model)
    if kind == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    elif kind == "ZeRO-3":
        state = State(engine_of(3, model, "fp32"))
    result = load(url, state, load_weights_only=True, ignore_keys=["state/model/other"])
    gathered = [whole(one) for one in model.parameters()] if kind == "ZeRO-3" else [
        getattr(one, "full_tensor", lambda one=one: one)().detach() for one in model.parameters()
    ]  # fmt: skip
    sums = [zlib.crc32(one.numpy()) for one in gathered]
    told = {"sums": sums, "fetched": result.receipt.fetched_bytes, "nodes": result.receipt.n_nodes}
    print(json.dumps(told), flush=True)


@pytest.mark.parametrize(
    ("kind", "nodes", "times"),
    [
        ("plain", (2,), 1),
        ("plain", (1, 1), 2),
        ("FSDP2", (1, 1), 1),
        ("FSDP2", (2, 1), 1),
        ("ZeRO-3", (1, 1), 1),
    ],
)
def test_each_node_fetches_what_its_ranks_keep(
    tmp_path: Path, kind: str, nodes: tuple[int, ...], times: int
) -> None:
    if kind == "ZeRO-3":
        pytest.importorskip("deepspeed")
    wanted = [zlib.crc32(one.numpy()) for one in wide(3).state_dict().values()]
    with bad_server({f"/m/{name}": Behaviour(data) for name, data in wide_files().items()}) as server:
        told = run(
            "from_server", sum(nodes), server.url("/m"), kind, nodes=nodes, cache=str(tmp_path / "cache")
        )
        sent = server.sent_bytes
    assert [one["sums"] for one in told] == [wanted] * sum(nodes)
    assert {one["nodes"] for one in told} == {len(nodes)}
    model = 3 * WIDE * WIDE * 4
    # Of each file, a node also gets the first 256 KiB, and whole blocks.
    assert times * model <= sent <= times * model + len(nodes) * 2 * (256 << 10) + (64 << 10), sent / model
