"""Contents of a ZeRO checkpoint's files as they are read, made up: for one rank, of any shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rankload.loader.saved.regions import row_major_stride
from rankload.loader.saved.tensor import SavedTensor, StorageRef
from rankload.loader.saved.values import InertObject


def tensor(*shape: int, dtype: str = "float32", file: str = "nowhere") -> SavedTensor:
    storage = StorageRef(file, "0", 0, 4 * math.prod(shape), None)
    return SavedTensor.in_storage(storage, dtype, shape, row_major_stride(shape))


def model_tree(
    shapes: list[dict[str, tuple[int, ...]]], ranks: int, *, stage3: bool = False
) -> dict[str, Any]:
    module = {
        name: tensor(0) if stage3 else tensor(*shape, dtype="bfloat16")
        for group in shapes
        for name, shape in group.items()
    }
    found = model_states({**module, "seen": tensor(5)}, shapes, ranks, stage=3 if stage3 else 1)
    return {**found, "buffer_names": ["seen"], "epoch": 3}


def model_states(
    module: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]], ranks: int, *, stage: int
) -> dict[str, Any]:
    """What DeepSpeed saves in a model file, without buffers: `module`, and the `shapes` of each parameter group."""
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": shapes,
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": {"last_batch_iteration": 2},
        "skipped_steps": 0,
        "global_steps": 3,
        "global_samples": 24,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_config": {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}},
        "ds_version": "0.19.8",
    }


def optim_tree(numels: list[int], ranks: int, *, paddings: list[int] | None = None) -> dict[str, Any]:
    """Of stage 1; `numels` are the partitions' sizes with padding."""
    paddings = paddings or [0] * len(numels)
    groups = [{"lr": 0.1 * (i + 1), "betas": (0.9, 0.999), "params": [i]} for i in range(len(numels))]
    states = {
        i: {"step": tensor(), "exp_avg": tensor(n), "exp_avg_sq": tensor(n)} for i, n in enumerate(numels)
    }
    return {
        "optimizer_state_dict": {
            "zero_stage": InertObject("deepspeed.runtime.zero.config.ZeroStageEnum", (1,), known=True),
            "loss_scaler": None,
            "overflow": False,
            "base_optimizer_state": {"state": states, "param_groups": groups},
            "single_partition_of_fp32_groups": [tensor(n - p) for n, p in zip(numels, paddings, strict=True)],
            "group_paddings": paddings,
            "partition_count": [ranks] * len(numels),
            "param_slice_mappings": "never looked at",
        }
    }


def stage_3_tree(numels: list[int], ranks: int) -> dict[str, Any]:
    states = {i: {"step": tensor(), "exp_avg": tensor(n)} for i, n in enumerate(numels)}
    return {
        "optimizer_state_dict": {
            "zero_stage": 3,
            "partition_count": ranks,
            "optimizer_state_dict": {
                "state": states,
                "param_groups": [{"lr": 0.1, "params": list(range(len(numels)))}],
            },
            "fp32_flat_groups": [tensor(n) for n in numels],
        }
    }
