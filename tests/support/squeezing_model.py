"""The model of the Composer checkpoints in tests/data that were not sharded."""

from __future__ import annotations

from torch import nn


class Squeezing(nn.Sequential):
    """The module of the composer-monolithic-w2 checkpoints, after SqueezeExcite changed it."""

    def __init__(self) -> None:
        changed = nn.Module()
        changed.conv = nn.Conv2d(8, 8, 3)
        changed.se = nn.Module()
        changed.se.pool_and_mlp = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4, bias=False),
            nn.ReLU(),
            nn.Linear(4, 8, bias=False),
        )
        super().__init__(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            changed,
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 2),
        )
