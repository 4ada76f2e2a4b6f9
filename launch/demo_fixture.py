"""Restores a recorded checkpoint that Composer wrote, in one process, so that the demo shows one without DeepSpeed.

``python -m rankload.launch.demo_fixture FILE`` restores the weights of ``ep2-ba8-rank0.pt`` (Composer 0.32.1, a
small convolutional classifier with SqueezeExcite) and prints the receipt.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from ..loader import State, load


def make_model() -> nn.Module:
    """A module with the parameter names and shapes of the one that was saved."""
    excite = nn.Module()
    excite.pool_and_mlp = nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4, bias=False),
        nn.ReLU(),
        nn.Linear(4, 8, bias=False),
    )
    block = nn.Module()
    block.conv = nn.Conv2d(8, 8, 3)
    block.se = excite
    layers = OrderedDict([("0", nn.Conv2d(3, 8, 3)), ("2", block), ("6", nn.Linear(8, 2))])
    model = nn.Module()
    model.module = nn.Sequential(layers)
    return model


def main(path: str) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = load(path, State(model=model), load_weights_only=True, progress_bar=False)
    changed = sum(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    print(f"{Path(path).name}: {changed} of {len(before)} tensors now hold what Composer saved")
    for line in result.receipt.lines():
        print(line)


if __name__ == "__main__":
    main(sys.argv[1])
