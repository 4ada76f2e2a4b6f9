"""Collectives that a load or a save does not run itself: a rank that stands still or dies in them hangs no other."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from rankload.distributed.watchdog import EXIT_CODE
from rankload.loader import RankloadError
from torch import nn

from rankload import State, load

THIS = __file__


class LoadsItself:
    """A state whose own loading waits for the other ranks, as Composer's does with FSDP."""

    def __init__(self) -> None:
        self.model = nn.Linear(2, 2)

    def load_state_dict(self, state: Any, logger: Any = None, **others: Any) -> None:
        dist.barrier()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))

    def load_model_state(self, state: Any, logger: Any, **others: Any) -> None:
        raise AssertionError("not asked for")


def loads(path: str) -> None:
    dist.init_process_group("gloo")
    try:
        load(path, LoadsItself(), options={"stall_timeout_s": 1.5})
    except RankloadError as error:
        print(type(error).__name__, error, flush=True)
    os._exit(3)


def gathers(path: str) -> None:
    from rankload.loader import state
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    if dist.get_rank() == 1:
        state._kept = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    try:
        State(model=model).state_dict()
    except RankloadError as error:
        print(type(error).__name__, error, flush=True)
    os._exit(3)


@pytest.mark.parametrize(
    ("work", "codes", "cause"),
    [
        (
            "loads",
            {EXIT_CODE},
            r"waits in collectives that an object's own loading runs.*StalledError: no progress for .* rank 1 .*"
            "the process is stopped",
        ),
        ("gathers", {3, EXIT_CODE}, r"PeerError:? rank 1 .* ended in stage 'State.state_dict'"),
    ],
    ids=["an object that loads itself", "a state's shards"],
)
def test_no_rank_hangs_in_others_collectives(work: str, codes: set[int], cause: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"state": {"model": nn.Linear(2, 2).state_dict()}, "rng": None}, path)
    finished = run_ranks(
        f"{THIS}:{work}",
        3,
        args=(path,),
        deadline_s=45,
        kill_once_others_end={1} if work == "loads" else (),
    )
    for rank in (finished[0], finished[2]):
        assert rank.returncode in codes, finished
        assert re.search(cause, rank.stderr + rank.stdout), finished
