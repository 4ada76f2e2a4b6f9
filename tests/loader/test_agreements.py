"""How often the ranks of a load wait for each other: counted, since each agreement costs all of them milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from every_kind import KINDS, copy_kind
from processes import run_ranks
from rankload.distributed.agreement import Agreement

from rankload import State, load

MOST = {
    "composer": 9,
    "composer-tar": 9,
    "safetensors": 9,
    "composer-zero1": 12,
    "composer-zero3": 12,
    "sharded": 12,
    "slices": 12,
    "accelerate": 13,
    "trainer": 13,
    "zero1": 14,
    "zero3": 15,
    "dcp": 14,
    "dcp-tp": 14,
    "rank-shards": 14,
    "lightning": 16,
    "accelerate-zero": 17,
}
"""Agreements of a load from a local disk into a module, at any number of ranks; further files take some."""


def count(paths: str) -> None:
    """Loads each of `paths` into a module that has next to nothing of it; prints the names of its agreements."""
    names: list[str] = []
    reach = Agreement.reach

    def counted(self: Any, name: str, *rest: Any) -> bytes:
        names.append(name)
        return reach(self, name, *rest)

    Agreement.reach = counted  # type: ignore[method-assign]
    for kind, path in json.loads(paths).items():
        names.clear()
        load(path, State(torch.nn.Linear(3, 2)), strict_model_weights=False, progress_bar=False)
        print(json.dumps([kind, names]), flush=True)


def test_local_loads_agree_seldom(tmp_path: Path) -> None:
    paths = {kind: copy_kind(kind, tmp_path / kind) for kind in KINDS}
    finished = run_ranks(f"{__file__}:count", 2, args=(json.dumps(paths),), deadline_s=120)
    assert [rank.returncode for rank in finished] == [0, 0], finished
    of_ranks = [dict(map(json.loads, rank.stdout.splitlines())) for rank in finished]
    assert of_ranks[0] == of_ranks[1]
    assert of_ranks[0].keys() == MOST.keys()
    more = {kind: names for kind, names in of_ranks[0].items() if len(names) > MOST[kind]}
    assert not more, more
