"""A small mixture of experts in a DeepSpeed engine on the CPU: MoE layers whose experts have a frozen bias and a
buffer, beside a tied head, a frozen weight, sizes that no rank count divides, a buffer, and three parameter groups, one
of a single element; of the others DeepSpeed makes groups of experts besides.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import nn
from torch.nn import functional
from zero_model import VOCABULARY, WIDTH

Layers = Sequence[tuple[int, int]]
"""Of each MoE layer: how many experts, and the expert-parallel size."""


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 13)
        self.up.bias.requires_grad_(False)
        self.down = nn.Linear(13, WIDTH)
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return self.down(functional.gelu(self.up(hidden)))


class MoeModel(nn.Module):
    """Every expert of a layer begins with other weights; ranks that have the same expert, with the same."""

    def __init__(self, layers: Layers, seed: int) -> None:
        from deepspeed.moe.layer import MoE

        torch.manual_seed(seed)
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = nn.Linear(WIDTH, 11, bias=False).requires_grad_(False)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.moes = nn.ModuleList(
            # Nothing random, and no token is dropped: losses can be compared at any number of ranks.
            MoE(
                WIDTH, Expert(), num_experts=count, ep_size=ep_size, use_rts=False, capacity_factor=float(count),
                eval_capacity_factor=float(count), min_capacity=0, use_residual=index == 1,
            )
            for index, (count, ep_size) in enumerate(layers)
        )  # fmt: skip
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("seen", torch.zeros(5))

    def begin_experts(self, seed: int, data_first: bool) -> None:
        """Gives each expert weights of its own, by its number over all ranks."""
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for index, moe in enumerate(self.moes):
            ep_rank = rank // (world_size // moe.ep_size) if data_first else rank % moe.ep_size
            first = ep_rank * moe.num_local_experts
            for local, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
                data = torch.Generator().manual_seed(seed + 1000 * index + first + local)
                for parameter in expert.parameters():
                    parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=data))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.wte(tokens)
        hidden = hidden + self.dense(hidden) + 0 * self.frozen(hidden).sum(-1, keepdim=True)
        balance = torch.zeros(())
        for moe in self.moes:
            out, loss, _ = moe(hidden)
            hidden = hidden + out
            balance = balance + loss.float()
        if self.training:
            self.seen += 1
        logits = self.head(hidden * self.gain).float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) + 0.01 * balance


def make_moe_engine(
    stage: int,
    dtype: str = "bf16",
    *,
    layers: Layers,
    seed: int = 0,
    zero: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Any:
    """A DeepSpeed engine around a new `MoeModel`; every rank must call it."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
    from deepspeed.utils import groups as process_groups

    torch.set_num_threads(1)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "steps_per_print": 100_000,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 100_000,
            "allgather_bucket_size": 100_000,
            **(zero or {}),
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        **(config or {}),
    }
    if dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    data_first = bool(settings.get("use_data_before_expert_parallelism"))
    # DeepSpeed keeps its groups of ranks from one engine to the next, in whichever order they were made first.
    for known in (
        process_groups._get_expert_parallel_group_dict(),
        process_groups._get_expert_data_parallel_group_dict(),
    ):
        known.clear()
    model = MoeModel(layers, seed)
    model.begin_experts(seed, data_first)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1, "name": "matrices"},
        {
            "params": [p for p in trained if p.dim() < 2 and p.numel() > 1],
            "weight_decay": 0.0,
            "name": "vectors",
        },
        # On all ranks but the first, its partition is padding alone.
        {"params": [model.gain], "weight_decay": 0.0, "name": "gain"},
    ]
    return deepspeed.initialize(model=model, model_parameters=split(own), config=settings)[0]
