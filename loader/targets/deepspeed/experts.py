"""The MoE layers of a live DeepSpeed engine, and which of their experts this rank has."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed

from ...errors import LayoutError
from ...sources.zero.model_states import ExpertLayer


def expert_layers(engine: Any) -> tuple[ExpertLayer, ...]:
    """The engine's MoE layers in the order of its module, by which DeepSpeed numbers their files; () without any.

    No collective is used. Raises `LayoutError` for experts that are no `deepspeed.moe.layer.MoE` (AutoEP), and for
    pipeline or tensor parallelism beside them.
    """
    if not getattr(engine, "has_moe_layers", False):
        return ()
    pipeline = getattr(sys.modules.get("deepspeed.runtime.pipe.engine"), "PipelineEngine", ())
    if isinstance(engine, pipeline) or getattr(engine, "mp_world_size", 1) > 1:
        raise LayoutError("restoring experts (MoE) into pipeline or tensor parallelism is not supported")
    kind = getattr(sys.modules.get("deepspeed.moe.layer"), "MoE", ())
    found: list[ExpertLayer] = []
    for name, module in engine.module.named_modules():
        if isinstance(module, kind):
            ep_rank = torch.distributed.get_rank(module.deepspeed_moe.ep_group)
            found.append(ExpertLayer(name, len(found), module.num_experts, module.ep_size, ep_rank))
    if len(found) != len(engine.num_experts):
        raise LayoutError(
            f"the engine has {len(engine.num_experts)} layers of experts, of which {len(found)} are DeepSpeed's MoE: "
            "restoring into others (AutoEP) is not supported"
        )
    return tuple(found)
