"""What ranks of a job do that resumes by itself."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rankload.loader import RankloadError, State, autoresume, find_checkpoints
from torch import nn


def job() -> State:
    torch.manual_seed(9)
    model = nn.Linear(4, 4)
    return State(model, torch.optim.AdamW(model.parameters()))


def told(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def resume(folder: str | None, options: str = "{}", **arguments: Any) -> None:
    """Resumes from `folder`; says what was taken."""
    logging.basicConfig(stream=sys.stderr)
    state = job()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = autoresume(folder, state, options=json.loads(options), progress_bar=False, **arguments)
        except RankloadError as error:
            told(error=type(error).__name__, message=error.message)
            return
    told(
        step=None if result is None else result.step,
        path=None if result is None else result.receipt.path,
        passed=[] if result is None else [[Path(one.path).name, one.reason] for one in result.passed_over],
        warned=[text for one in caught if "derived" not in (text := str(one.message))],
        weight=float(state.model.weight.detach().sum()),
    )


def resume_newest(folder: str) -> None:
    resume(folder, newest=True)


def resume_or_raise(folder: str) -> None:
    resume(folder, require=True)


def resume_few_times(folder: str, options: str) -> None:
    resume(folder, options, max_attempts=2)


def resume_unlike_others(folder: str, how: str) -> None:
    """The last rank asks for something else than the others."""
    is_last = os.environ["RANK"] != "0"
    if how == "require":
        resume(folder, require=is_last)
    elif is_last:
        resume(None)
    else:
        resume(folder)


def resume_where_told() -> None:
    """By the variable that ``rankload run --resume`` sets, in a group that is there already."""
    dist.init_process_group("gloo")
    result = autoresume(None, job(), progress_bar=False)
    told(step=None if result is None else result.step, found=len(find_checkpoints()))
    dist.destroy_process_group()


def look(folder: str) -> None:
    told(found=[[Path(one.path).name, one.proven, one.reason] for one in find_checkpoints(folder)])
