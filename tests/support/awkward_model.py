"""The model of the folders safetensors-* and dcp-hf-* in tests/data: tied, frozen and odd weights, and buffers."""

from __future__ import annotations

from pathlib import Path

import torch
from places import DATA
from torch import nn

VOCABULARY, WIDTH = 53, 15


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Awkward(nn.Module):
    def __init__(self, seed: int = 5, *, low: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = nn.Linear(WIDTH, 11, bias=False).requires_grad_(False)
        self.blocks = nn.ModuleList([Block()])
        self.low = nn.Linear(WIDTH, WIDTH, bias=False, dtype=low)
        self.odd = nn.Parameter(torch.randn(7) * 0.01)
        self.gain = nn.Parameter(torch.rand(1))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("seen", torch.rand(5))
        self.register_buffer("count", torch.tensor(9))

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        h = self.wte(ids)
        h = h + 0 * self.frozen(h).sum(-1, keepdim=True)
        for block in self.blocks:
            h = block(h)
        h = h + self.low(h.to(self.low.weight.dtype)).to(h.dtype)
        h = h * self.gain + self.odd.sum()
        return nn.functional.cross_entropy(self.head(h).float().flatten(0, 1), targets.flatten())


FOLDERS = ("safetensors-single", "safetensors-sharded-index", "dcp-hf-sharded-w2")
"""In tests/data; each has the checkpoint in ``ckpt`` and what it must restore to in ``oracle.*``."""
EXTRAS = tuple(
    f"state/model/{name}"
    for name in ("f8", "f8_5", "half", "flags", "u8", "u16", "i64", "empty", "scalar", "f64", "c64")
)
"""What safetensors-single has beyond the model."""


def checkpoint(folder: str) -> Path:
    return DATA / folder / "ckpt"


def oracle(folder: str) -> dict[str, torch.Tensor]:
    """The state of the model that was saved, by name."""
    if folder == "safetensors-single":
        saved = torch.load(DATA / folder / "oracle.pt", weights_only=True)
    else:
        from safetensors.torch import load_file

        saved = load_file(DATA / folder / "oracle.safetensors")
    return {name.removeprefix("model/"): value for name, value in saved.items() if name.startswith("model/")}


def check(module: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    """Compares all of the module's state with `wanted`, bit for bit; shards are gathered, so every rank must call."""
    found = module.state_dict()
    assert found.keys() == {*wanted, "head.weight"}
    for name, value in found.items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        expected = wanted["wte.weight" if name == "head.weight" else name]
        assert torch.equal(whole.cpu(), expected.to(whole.dtype)), name
