"""Models that are split over pipeline stages or tensor-parallel ranks, in DeepSpeed engines on the CPU.

They have the awkward parts of large ones: a tied head, a frozen weight, sizes that no rank count divides, buffers of
two dtypes, and two parameter groups. All data-parallel ranks train on the same batches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

VOCABULARY = 23
WIDTH = 12
_LINEAR = functional.linear

SETTINGS: dict[str, dict[str, Any]] = {
    "pipeline 0 fp32": {"kind": "pipeline", "stage": 0, "dtype": "fp32"},
    "pipeline 1 fp32": {"kind": "pipeline", "stage": 1, "dtype": "fp32"},
    "pipeline 1 bf16": {"kind": "pipeline", "stage": 1},
    "pipeline 1 BF16_Optimizer": {
        "kind": "pipeline", "stage": 1, "config": {"data_types": {"grad_accum_dtype": "fp32"}},
    },
    "pipeline 1 bf16 of 3": {"kind": "pipeline", "stage": 1, "stages": 3},
    "pipeline 1 bf16 of 4": {"kind": "pipeline", "stage": 1, "stages": 4},
    "pipeline 1 bf16 by parameters": {"kind": "pipeline", "stage": 1, "method": "parameters"},
    "pipeline 1 bf16 wider": {"kind": "pipeline", "stage": 1, "width": 9},
    "pipeline and tensor 1 bf16": {"kind": "pipeline", "stage": 1, "tensor": 2},
    "tensor 0 fp32": {"kind": "tensor", "stage": 0, "dtype": "fp32"},
    "tensor 0 bf16": {"kind": "tensor", "stage": 0},
    "tensor 1 bf16": {"kind": "tensor", "stage": 1},
    "tensor 2 bf16": {"kind": "tensor", "stage": 2},
    "tensor 3 bf16": {"kind": "tensor", "stage": 3},
    "tensor 1 bf16 of 4": {"kind": "tensor", "stage": 1, "tensor": 4},
    "DeepSpeed's tensor 1 bf16": {"kind": "automatic", "stage": 1},
    "DeepSpeed's tensor 2 bf16": {"kind": "automatic", "stage": 2},
}  # fmt: skip


class Grid:
    """The least that DeepSpeed asks of an ``mpu``: neighbours share tensors, the others are data-parallel."""

    def __init__(self, size: int) -> None:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        self.size = size
        for first in range(0, ranks, size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= rank < first + size:
                self.model_group = group
        for part in range(size):
            members = list(range(part, ranks, size))
            group = dist.new_group(members)
            if rank in members:
                self.data_group, self.data_ranks = group, members

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.model_group)

    def get_model_parallel_world_size(self) -> int:
        return self.size

    def get_model_parallel_group(self) -> Any:
        return self.model_group

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data_group)

    def get_data_parallel_world_size(self) -> int:
        return len(self.data_ranks)

    def get_data_parallel_group(self) -> Any:
        return self.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.data_ranks


class _Enter(torch.autograd.Function):
    """What the ranks of a group compute with apart: gradients are added up on the way back."""

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, group: Any) -> torch.Tensor:
        context.group = group
        return hidden

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=context.group)
        return gradient, None


class _Leave(torch.autograd.Function):
    """The sum of what the ranks of a group computed."""

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, group: Any) -> torch.Tensor:
        hidden = hidden.contiguous().clone()
        dist.all_reduce(hidden, group=group)
        return hidden

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class Split(nn.Module):
    """Two matrices, of which each tensor-parallel rank has its columns and rows."""

    def __init__(self, grid: Any, seed: int) -> None:
        super().__init__()
        self.grid = [grid]
        part, size = grid.get_model_parallel_rank(), grid.get_model_parallel_world_size()
        torch.manual_seed(1000 * seed + part)
        self.up = nn.Linear(WIDTH, 36 // size)
        self.down = nn.Linear(36 // size, WIDTH, bias=False)
        for parameter in self.parameters():
            parameter.model_parallel = True
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        group = self.grid[0].get_model_parallel_group()
        if self.training:
            self.seen += 1 + self.grid[0].get_model_parallel_rank()
        wide = functional.gelu(self.up(_Enter.apply(hidden, group)))
        return hidden + _Leave.apply(self.down(wide), group)


class TensorModel(nn.Module):
    def __init__(self, grid: Any, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.frozen = nn.Linear(WIDTH, 5, bias=False).requires_grad_(False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.split = Split(grid, seed)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.split(self.norm(self.embed(tokens)))
        hidden = hidden + 0 * self.frozen(hidden).sum(-1, keepdim=True)
        return cross_entropy(self.head(hidden), targets)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, 4 * WIDTH)
        self.down_proj = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down_proj(functional.gelu(self.up_proj(hidden)))


class WholeModel(nn.Module):
    """What DeepSpeed splits by itself (``autotp_size``)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Perceptron(), Perceptron()])
        self.out = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return cross_entropy(self.out(hidden), targets)


AUTOMATIC = {
    "autotp_size": 2,
    "partition_config": {
        "use_default_specs": False,
        "layer_specs": [
            {"patterns": [r".*\.up_proj\.weight$"], "partition_type": "column"},
            {"patterns": [r".*\.down_proj\.weight$"], "partition_type": "row"},
        ],
    },
}


class Embedding(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(0.1 * torch.randn(VOCABULARY, WIDTH))
        self.register_buffer("scale", torch.full((3,), 1.0 + seed))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.embedding(tokens, self.weight)


class Block(nn.Module):
    def __init__(self, seed: int, width: int = 37) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, width)
        self.down = nn.Linear(width, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count += 1
            self.seen += 0.5
        hidden = hidden + 0.1 * self.frozen(hidden)
        return hidden + self.down(functional.gelu(self.up(self.norm(hidden))))


def head(embedding: Embedding, hidden: torch.Tensor) -> torch.Tensor:
    return functional.linear(hidden, embedding.weight)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Loss(nn.Module):
    """Has a buffer, which DeepSpeed saves in no layer's file."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(VOCABULARY))

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, targets)


def pipeline_module(seed: int, *, stages: int, tensor: int, method: str, width: int = 7) -> Any:
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    layers = [
        TiedLayerSpec("embed", Embedding, seed, tied_weight_attr="weight"),
        LayerSpec(Block, 100 * seed + 1),
        lambda hidden: hidden * 1.0,
        LayerSpec(Block, 100 * seed + 2, 19),
        LayerSpec(Block, 100 * seed + 3, width),
        nn.LayerNorm(WIDTH),
        TiedLayerSpec("embed", Embedding, seed, forward_fn=head, tied_weight_attr="weight"),
    ]
    split: dict[str, Any] = {"num_stages": stages}
    if tensor > 1:
        ranks = dist.get_world_size() // stages // tensor
        split = {"topology": PipeModelDataParallelTopology(stages, tensor, ranks)}
    return PipelineModule(layers, loss_fn=Loss(), partition_method=method, **split)


def engine_of(setting: str, seed: int) -> Any:
    """A new engine; every rank must call."""
    import deepspeed

    # DeepSpeed's stage 3 leaves a linear function of its own in torch, which rounds otherwise.
    functional.linear = _LINEAR
    told = SETTINGS[setting]
    kind = told["kind"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "steps_per_print": 100_000,
        "zero_optimization": {"stage": told["stage"]},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        **told.get("config", {}),
    }
    if told.get("dtype", "bf16") == "bf16":
        config["bf16"] = {"enabled": True}
    grid = None
    if kind == "pipeline":
        config["gradient_accumulation_steps"] = 2
        stages, tensor = told.get("stages", 2), told.get("tensor", 1)
        method, width = told.get("method", "uniform"), told.get("width", 7)
        model = pipeline_module(seed, stages=stages, tensor=tensor, method=method, width=width)
    elif kind == "tensor":
        grid = Grid(told.get("tensor", 2))
        model = TensorModel(grid, seed)
    else:
        config["tensor_parallel"] = AUTOMATIC
        model = WholeModel(seed)
    if kind == "automatic":
        # DeepSpeed replaces parameters, so it has to be given the module's own list.
        groups: Any = list(model.parameters())
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
    extra = {} if grid is None else {"mpu": grid}
    return deepspeed.initialize(model=model, model_parameters=groups, config=config, **extra)[0]


def batches(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    data = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(0, VOCABULARY, (2, 9), generator=data)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train(engine: Any, steps: int, seed: int) -> list[float]:
    """The losses, the same on every rank."""
    data = batches(seed)
    if hasattr(engine, "train_batch") and hasattr(engine, "stage_id"):
        return [float(engine.train_batch(data)) for _ in range(steps)]
    losses = []
    for _ in range(steps):
        loss = engine(*next(data))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses
