"""A model of a few MiB, and a file of it that is worth fetching in parts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rankload.loader import State, gather_rng, load

WIDE = 1024
"""4 MiB of fp32 a layer."""
MODEL_BYTES = 2 * WIDE * WIDE * 4
ALL_BYTES = 3 * MODEL_BYTES + 800_000
"""Model, optimizer, and what nobody claims."""


def a_module(seed: int = 7) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(WIDE, WIDE), torch.nn.Linear(WIDE, WIDE, bias=False))


def save_trained(path: Path) -> None:
    """A file with a model, an optimizer with twice as many bytes, and something that nobody claims."""
    module = a_module()
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, WIDE)).sum().backward()
    optimizer.step()
    state = State(module, optimizer)
    torch.save({"state": state.state_dict(), "rng": gather_rng(), "mine": torch.arange(100_000)}, path)


def load_local(saved: bytes, folder: Path) -> list[torch.Tensor]:
    path = folder / "local.pt"
    path.write_bytes(saved)
    module = a_module(seed=2)
    load(path, State(module), load_weights_only=True)
    return list(module.parameters())


def alone(url: str) -> None:
    """A process that loads, for the tests that kill it."""
    module = a_module(seed=1)
    result = load(url, State(module, torch.optim.Adam(module.parameters())))
    print(json.dumps({"fetched": result.receipt.fetched_bytes}), flush=True)
