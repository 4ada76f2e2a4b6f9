"""What a file's names hold reaches no terminal and no log as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rankload.loader import MismatchError, State, load


def test_names_of_a_file_cannot_write_to_the_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A key, a file's name and a glob that move the cursor, or would forge a line, in an error, a warning and a log."""
    hostile, shown = "w\x1b[2J\nrestored: all", "w\\x1b[2J\\nrestored: all"
    path = tmp_path / f"{hostile}.pt"
    torch.save(
        {"state": {"model": {"weight": torch.ones(1, 1), "bias": torch.ones(1), hostile: torch.ones(1)}}},
        path,
    )
    model = torch.nn.Linear(1, 1)
    with pytest.raises(MismatchError, match="unexpected") as told:
        load(path, State(model))
    assert f"  model/{shown}" in str(told.value).splitlines()
    assert f"{shown}.pt" in str(told.value)
    assert told.value.details["unexpected"] == [f"model/{hostile}"]
    with caplog.at_level("INFO", "rankload"), pytest.warns(UserWarning, match="nothing") as warned:
        result = load(path, State(model), strict_model_weights=False, ignore_keys=[f"no/{hostile}"])
    assert any(shown in str(one.message) for one in warned)
    assert any(shown in line for line in caplog.messages)
    said = [str(told.value), str(result), *caplog.messages, *(str(one.message) for one in warned)]
    assert not any("\x1b" in text or "\nrestored: all" in text for text in said)
