"""What the tests of fetching can rely on besides."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of wide_model.py, whose weights are a third of it."""
    from wide_model import save_trained

    path = tmp_path_factory.mktemp("saved") / "model.pt"
    save_trained(path)
    return path.read_bytes()
