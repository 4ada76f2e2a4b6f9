"""The small files by which processes of a node know each other's entries."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rankload.loader.cache.records import read_json, write_json


def test_a_record_that_found_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "users" / "a"
    path.parent.mkdir()
    write_json(str(path), {"pid": 1})

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(str(path), {"pid": 2})
    assert [one.name for one in path.parent.iterdir()] == ["a"]
    assert read_json(str(path)) == {"pid": 1}
