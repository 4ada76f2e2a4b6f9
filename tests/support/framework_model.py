"""A tiny GPT-2, its data, and what a job held when it saved: for the tests with real frameworks.

`hold` writes down, in full and in fp32, every weight and moment that a job has; `compare` finds what a restored job
holds otherwise. Batches are told by the samples' numbers, which are their first tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
SAMPLES = 64
GLOBAL_BATCH = 4
SHARED_BATCH = 6
"""Which one, two and three ranks can share."""
SAVED_AT = 4
"""The step after which each job saves; it goes on for as many."""


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def tiny_gpt2(seed: int = 0) -> nn.Module:
    """Two blocks of 8, without dropout; its head is tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97, n_positions=16, n_embd=8, n_layer=2, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """`SAMPLES` samples of 12 tokens, the same in each process."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 97, (12,), generator=torch.Generator().manual_seed(index))
        tokens[0] = index
        return {"input_ids": tokens, "labels": tokens.clone()}


def batches(first: int, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's part of each of `steps` batches from number `first` on, in the samples' order."""
    data, each = Tokens(), GLOBAL_BATCH // world_size()
    for step in range(first, first + steps):
        start = (step * GLOBAL_BATCH + rank() * each) % SAMPLES
        samples = [data[index] for index in range(start, start + each)]
        yield {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor on each rank, as a copy in fp32. Every rank must call where it is sharded."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().float().clone()


def held(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> dict[str, torch.Tensor]:
    """Weights, buffers and moments by the module's own names. Every rank must call where they are sharded."""
    parameters = dict(module.named_parameters())
    found = {f"model/{name}": full(value) for name, value in [*parameters.items(), *module.named_buffers()]}
    name_of = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key in MOMENTS:
                if key in state:
                    found[f"{key}/{name_of[parameter]}"] = full(torch.as_tensor(state[key]))
    return found


def held_by_engine(engine: Any) -> dict[str, torch.Tensor]:
    """The same of a DeepSpeed engine, as DeepSpeed itself reports it; weights are the fp32 masters."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        found[f"model/{name}"] = full(parameter if master is None else master)
        for key in ("exp_avg", "exp_avg_sq"):
            try:
                value = safe_get_full_optimizer_state(parameter, key)
            except (KeyError, TypeError):  # of an optimizer that has none
                value = None
            if value is not None:
                found[f"{key}/{name}"] = full(value)
    return found


def group_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters in the optimizer's groups, in its order."""
    name_of = {parameter: name for name, parameter in module.named_parameters()}
    return [[name_of[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def hold(folder: str | Path, found: dict[str, torch.Tensor], **numbers: Any) -> None:
    """Rank 0 keeps what the job held, and further `numbers`, beside the checkpoint."""
    if rank() == 0:
        torch.save(found, Path(folder, "held.pt"))
        Path(folder, "numbers.json").write_text(json.dumps(numbers))


def differences(
    folder: str | Path, found: dict[str, torch.Tensor], *, without: tuple[str, ...] = ()
) -> list[str]:
    """The names of tensors that the saving job held otherwise, or not at all: none where all are equal, bit for bit.

    Those that begin like one of `without` are left out: DeepSpeed tells no parameter's step.
    """
    expected = torch.load(Path(folder, "held.pt"), weights_only=True)
    return sorted(
        name
        for name in expected.keys() | found.keys()
        if not name.startswith(without)
        and (name not in found or name not in expected or not torch.equal(expected[name], found[name]))
    )


def numbers(folder: str | Path) -> Any:
    """The further numbers that `hold` kept."""
    return json.loads(Path(folder, "numbers.json").read_text())


def of_all_ranks(value: float) -> float:
    """The mean over the ranks. Every rank must call."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return float(total) / world_size()


def gathered(value: Any) -> list[Any]:
    """Every rank's, by rank. Every rank must call."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def by_step(seen: list[list[int]]) -> list[list[int]]:
    """The samples of each step over all ranks, sorted. Every rank must call."""
    return [sorted(sample for one in ranks for sample in one) for ranks in zip(*gathered(seen), strict=True)]


def random_digest() -> list[str]:
    """The random states of this process, in short."""
    return [
        hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
        hashlib.sha256(np.random.get_state()[1].tobytes()).hexdigest(),
        hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
    ]


def tell(**found: Any) -> None:
    """Rank 0 prints what a job has found, for the test that runs it."""
    if rank() == 0:
        print(json.dumps(found))
