"""What the tests of the loader can rely on besides."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A hand-written checkpoint of journey_worker.py's plain model."""
    import torch
    from journey_worker import Plain

    torch.manual_seed(3)
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters())
    model.up(torch.rand(2, 16)).sum().backward()
    model.down(torch.rand(2, 64)).sum().backward()
    optimizer.step()
    path = tmp_path / "step1.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}, path)
    return path
