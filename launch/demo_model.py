"""The demo's model and data: small, and dependent on all three random generators."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 61
LENGTH = 24
BATCH = 4


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a norm and with dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.before_feed = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.attention(self.before_attention(x)).view(
            batch, length, 3, self.heads, width // self.heads
        )
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).reshape(batch, length, width)))
        fed: Tensor = self.dropout(self.down(functional.gelu(self.up(self.before_feed(x)))))
        return x + fed


class SmallTransformer(nn.Module):
    """Next-token prediction on `VOCABULARY` symbols; ``forward(ids)`` gives the loss, as one number."""

    def __init__(self, width: int = 96, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.long))
        self.batches_seen: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        inputs, targets = ids[:, :-1], ids[:, 1:]
        x = self.tokens(inputs) + self.places(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x = block(x)
        if self.training:
            self.batches_seen += 1
        scores: Tensor = self.head(self.norm(x))
        return functional.cross_entropy(scores.flatten(0, 1), targets.flatten())


def make_model(seed: int) -> SmallTransformer:
    """The model with the weights that follow from `seed`."""
    torch.manual_seed(seed)
    return SmallTransformer()


def seed_generators(seed: int) -> None:
    """Sets Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def next_batch() -> Tensor:
    """``(BATCH, LENGTH + 1)`` token ids: arithmetic progressions whose start and step are drawn at random."""
    starts = np.random.randint(0, VOCABULARY, size=(BATCH, 1))
    steps = np.array([[random.choice((1, 2, 3, 5, 7))] for _ in range(BATCH)])  # noqa: S311 - data, no secret
    return torch.from_numpy((starts + steps * np.arange(LENGTH + 1)) % VOCABULARY)
