"""What the ranks of test_prefetching.py do."""

from __future__ import annotations

import torch
from rankload.loader import State, load
from wide_model import a_module


def restore(url: str) -> None:
    module = a_module(seed=1)
    load(url, State(module, torch.optim.Adam(module.parameters())))
