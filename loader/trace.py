"""A load as a trace that Perfetto and ``chrome://tracing`` show: a row for each rank, a bar for each stage. Pure.

The format is Chrome's trace event format: complete events (``ph`` "X"), times in microseconds.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence

from .receipt import StageRecord


def trace_events(
    stages: Sequence[StageRecord], hosts: Sequence[str], nodes: Sequence[int]
) -> list[dict[str, object]]:
    """`hosts` and `nodes` are by rank. Times count from the first stage of any rank, by each node's own clock."""
    first = min((record.begin_s for record in stages), default=0.0)
    events: list[dict[str, object]] = []
    for rank, (host, node) in enumerate(zip(hosts, nodes, strict=True)):
        events.append(_named("process_name", node, rank, f"node {node} on {host}"))
        events.append(_named("thread_name", node, rank, f"rank {rank}"))
    for record in stages:
        events.append(
            {
                "name": record.stage,
                "ph": "X",
                "ts": round((record.begin_s - first) * 1e6),
                "dur": round(record.seconds * 1e6),
                "pid": nodes[record.rank],
                "tid": record.rank,
                "args": {"bytes": record.bytes},
            }
        )
    return events


def _named(kind: str, node: int, rank: int, name: str) -> dict[str, object]:
    return {"name": kind, "ph": "M", "pid": node, "tid": rank, "args": {"name": name}}


def write_trace(path: str, events: Sequence[dict[str, object]]) -> None:
    """Writes the events to `path`, all or nothing. Raises OSError."""
    part = f"{path}.{uuid.uuid4().hex[:8]}.part"
    try:
        with open(part, "x", encoding="utf-8") as file:
            json.dump({"traceEvents": list(events), "displayTimeUnit": "ms"}, file)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)
