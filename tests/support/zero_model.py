"""A small language model with the awkward parts of large ones, in a DeepSpeed engine on the CPU.

Names, shapes, seeds and training data are those that the deepspeed-zero*-w4 checkpoints in tests/data were made with:
a tied head, a frozen weight, sizes that no rank count divides, a parameter of one element, buffers of two dtypes and
two parameter groups.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn import functional

VOCABULARY = 97
WIDTH = 24
DATA_SEED = 1234
LATER_DATA_SEED = 99
"""What the recorded losses after a restore were computed on."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = functional.gelu(self.up(self.norm(hidden)))
        return hidden + self.down(wide)


class TinyModel(nn.Module):
    def __init__(
        self, seed: int, *, vocabulary: int = VOCABULARY, width: int = WIDTH, blocks: int = 2
    ) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.frozen = nn.Linear(width, 11, bias=False).requires_grad_(False)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.odd = nn.Parameter(0.01 * torch.randn(7))
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("seen", torch.zeros(5))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.wte(tokens)
        hidden = hidden + 0 * self.frozen(hidden).sum(-1, keepdim=True)
        for block in self.blocks:
            hidden = block(hidden)
        if self.training:
            self.seen += 1
            self.count += 1
        hidden = hidden * self.gain + self.odd.sum()
        logits = self.head(hidden).float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@cache
def is_older() -> bool:
    """Whether this is a DeepSpeed of the time when it could not yet do what `lacking` tells."""
    try:
        return tuple(map(int, version("deepspeed").split(".")[:2])) < (0, 19)
    except PackageNotFoundError:
        return False


def lacking(settings: Mapping[str, Any], *, saves: bool = False) -> str:
    """Why this DeepSpeed cannot make (and save, with `saves`) an engine of these `make_engine` settings; or nothing."""
    if not is_older():
        return ""
    if settings.get("zero", {}).get("parameter_alignment"):
        return "it knows no parameter_alignment"
    if "data_types" in settings.get("config", {}):
        return "it makes another optimizer where a BF16_Optimizer is asked for"
    if saves and settings["stage"] == 0 and settings.get("dtype", "bf16") == "bf16":
        return "it saves no optimizer state at stage 0 in bf16"
    return ""


def make_engine(
    stage: int,
    dtype: str = "bf16",
    *,
    seed: int = 0,
    zero: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    optimizer: str = "AdamW",
    client: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> Any:
    """A DeepSpeed engine around a new `TinyModel`; every rank must call it. `zero` and `config` add options.

    With `client` DeepSpeed is handed an AdamW of torch's that was made before. `sizes` make the model another one's
    size.
    """
    import deepspeed

    # Otherwise a kernel that nobody needs here is compiled first, for two minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    if is_older():
        _wait_for_each_gather()
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
        "optimizer": {"type": optimizer, "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        **(config or {}),
    }
    if optimizer != "AdamW":
        settings["optimizer"]["params"] = {"lr": 1e-3, "momentum": 0.9}
    if dtype == "bf16":
        settings["bf16"] = {"enabled": True, **settings.get("bf16", {})}
    model = TinyModel(seed, **(sizes or {}))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    if client:
        del settings["optimizer"]
        settings["zero_allow_untested_optimizer"] = True
        own = torch.optim.AdamW(groups, lr=1e-3)
        return deepspeed.initialize(model=model, optimizer=own, config=settings)[0]
    return deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]


@cache
def _wait_for_each_gather() -> None:
    """DeepSpeed before 0.19 starts one gather for each parameter and waits for the last alone.

    On gloo others may end after it: parameters hold what was in that memory, after its own load and every step.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    several = Init._allgather_params_coalesced

    def one_by_one(self: Any, parameters: list[Any], hierarchy: int = 0, quantize: bool = False) -> None:
        for parameter in parameters:
            several(self, [parameter], hierarchy, quantize)

    Init._allgather_params_coalesced = one_by_one


def train(engine: Any, steps: int, rank: int, seed: int = DATA_SEED) -> list[float]:
    """Trains on data of its own for each rank; this rank's losses."""
    data = torch.Generator().manual_seed(seed + rank)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, VOCABULARY, (2, 9), generator=data).to(engine.device)
        loss = engine(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def full_state(engine: Any) -> dict[str, torch.Tensor]:
    """Whole tensors by name in float32, as DeepSpeed itself reports them; every rank must call it.

    ``fp32/``, ``exp_avg/`` and ``exp_avg_sq/`` of trained parameters, ``module/`` of all, ``buffer/``. Not to be
    trusted for optimizer state with ``round_robin_gradients``.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links parameters to their state after the first group's step, when others have none yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            found[f"fp32/{name}"] = _copy(safe_get_full_fp32_param(parameter))
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key}/{name}"] = _copy(safe_get_full_optimizer_state(parameter, key))
    return {**found, **module_state(engine)}


def module_state(engine: Any) -> dict[str, torch.Tensor]:
    """``module/`` and ``buffer/`` of `full_state`; every rank must call it."""
    return dict(module_tensors(engine))


def module_tensors(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What `module_state` tells, one after the other; every rank must take them all."""
    import deepspeed

    for name, parameter in engine.module.named_parameters():
        partitioned = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if partitioned else contextlib.nullcontext():
            whole = _copy(parameter)
        yield f"module/{name}", whole
    for name, buffer in engine.module.named_buffers():
        yield f"buffer/{name}", _copy(buffer)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu().clone()
