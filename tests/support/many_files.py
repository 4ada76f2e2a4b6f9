"""Checkpoints of very many files, as DeepSpeed at stage 3 and torch's DCP name, lay out and fill them, made cheaply.

All files of a kind are one file under many names (hard links): every saved rank's shares are of one size, so that
their files differ in nothing that a plan looks at. What they hold is all zeros.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from zero_trees import model_states


def names_of(count: int) -> list[str]:
    return [f"layers.{number}.weight" for number in range(count)]


def write_zero(folder: Path, *, ranks: int, parameters: int, share: int = 1) -> Path:
    """A folder that `ranks` ranks saved at stage 3; each has `share` elements of each of as many `parameters`."""
    folder.mkdir(parents=True)
    names = names_of(parameters)
    shapes = OrderedDict((name, torch.Size([ranks * share])) for name in names)
    module = OrderedDict((name, torch.empty(0, dtype=torch.bfloat16)) for name in names)
    model = model_states(module, [shapes], ranks, stage=3)
    flat = [torch.zeros(parameters * share) for _ in range(3)]
    optimizer = {
        "optimizer_state_dict": {
            "zero_stage": 3,
            "loss_scaler": None,
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": ranks,
            "optimizer_state_dict": {
                "state": {0: {"step": torch.tensor(3.0), "exp_avg": flat[1], "exp_avg_sq": flat[2]}},
                "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}],
            },
            "fp32_flat_groups": [flat[0]],
        },
        "ds_config": model["ds_config"],
        "ds_version": "0.19.8",
    }
    ends = {"mp_rank_00_model_states.pt": model, "mp_rank_00_optim_states.pt": optimizer}
    for end, held in ends.items():
        kind = "bf16_zero_pp_rank_" if held is optimizer else "zero_pp_rank_"
        first = folder / f"{kind}0_{end}"
        torch.save(held, first)
        for rank in range(1, ranks):
            os.link(first, folder / f"{kind}{rank}_{end}")
    return folder


def write_dcp(
    folder: Path, *, files: int, parameters: int, shards: int, rows: int = 1, adam: bool = True
) -> Path:
    """A folder of as many `files` in which each tensor is saved in `shards` chunks, of `rows` rows each.

    `shards` divides `files`: each group of so many ranks has all of the model, as in HSDP, and the tensors are spread
    over the groups as DCP spreads what several ranks have.
    """
    folder.mkdir(parents=True)
    names = names_of(parameters)
    groups = files // shards
    keys = [("model", name) for name in names]
    if adam:
        keys += [("optim", "state", name, entry) for name in names for entry in ("exp_avg", "exp_avg_sq")]
    item = _saved(torch.zeros(rows, 2))
    shape = torch.Size([shards * rows, 2])
    entries: dict[str, Any] = {}
    planner: dict[str, tuple[str | int, ...]] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    filled = [0] * groups
    for number, path in enumerate(keys):
        key, group = ".".join(path), number % groups
        planner[key] = path
        chunks = [
            ChunkStorageMetadata(torch.Size([chunk * rows, 0]), torch.Size([rows, 2]))
            for chunk in range(shards)
        ]
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), shape, chunks)
        for chunk, one in enumerate(chunks):
            info = _StorageInfo(f"__{group * shards + chunk}_0.distcp", filled[group] * len(item), len(item))
            storage[MetadataIndex(key, one.offsets, chunk)] = info
        filled[group] += 1
    objects = {("step",): 3}
    if adam:
        groups_of = {"lr": 0.1, "betas": (0.9, 0.999), "params": [f"{name}" for name in names]}
        objects |= {("optim", "param_groups", 0, entry): value for entry, value in groups_of.items()}
    most = max(filled) * len(item)
    for object_path, value in objects.items():
        key = ".".join(map(str, object_path))
        planner[key] = object_path
        entries[key] = BytesStorageMetadata()
        data = _saved(value)
        (folder / f"__{files}_{len(storage)}.distcp").write_bytes(data)
        storage[MetadataIndex(key)] = _StorageInfo(f"__{files}_{len(storage)}.distcp", 0, len(data))
    first = folder / "__0_0.distcp"
    first.write_bytes(item * (most // len(item)))
    for number in range(1, files):
        os.link(first, folder / f"__{number}_0.distcp")
    metadata = Metadata(entries, planner, storage)
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
    return folder


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
