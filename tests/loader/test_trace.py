"""The trace of a load: events that Perfetto and Chrome read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from rankload.loader import State, load
from rankload.loader.receipt import StageRecord, trace_events, write_trace


def test_events_of_two_nodes() -> None:
    stages = [StageRecord(0, "fetch", 1.5, 10, 100.0), StageRecord(1, "fetch", 0.25, 0, 100.5)]
    events = trace_events(stages, ["a", "b"], [0, 1])
    bars = [event for event in events if event["ph"] == "X"]
    assert bars == [
        {"name": "fetch", "ph": "X", "ts": 0, "dur": 1_500_000, "pid": 0, "tid": 0, "args": {"bytes": 10}},
        {"name": "fetch", "ph": "X", "ts": 500_000, "dur": 250_000, "pid": 1, "tid": 1, "args": {"bytes": 0}},
    ]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}  # type: ignore[index]
    assert names == {"node 0 on a", "node 1 on b", "rank 0", "rank 1"}


def test_a_load_writes_its_own(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    load(tmp_path / "model.pt", State(model), options={"trace": tmp_path / "trace.json"})
    told = json.loads((tmp_path / "trace.json").read_text())
    bars = [event for event in told["traceEvents"] if event["ph"] == "X"]
    assert {"locate", "read", "restore"} <= {event["name"] for event in bars}
    assert min(event["ts"] for event in bars) == 0
    assert next(event for event in bars if event["name"] == "restore")["args"]["bytes"] >= 32
    with pytest.warns(UserWarning, match="trace could not be written"):
        load(tmp_path / "model.pt", State(model), options={"trace": tmp_path / "no folder" / "trace.json"})
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "trace.json"]


def test_nothing_is_left_of_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_trace(str(tmp_path / "t.json"), [{"name": object()}])
    assert os.listdir(tmp_path) == []
