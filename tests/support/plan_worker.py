"""What the ranks of test_against_loads.py do: they save, and load from a server, as jobs that plans are made for."""

from __future__ import annotations

import os
import warnings

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed.checkpoint as dcp
from awkward_model import Awkward
from rankload.loader import State, load
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

WIDTH = 701
"""About two million bytes of fp32 a layer, in rows that no small number of ranks divides."""


def sharded(model: nn.Module) -> State:
    fully_shard(model)
    return State(model, torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.1))


def layers() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))


def save_dcp(folder: str) -> None:
    state = sharded(layers())
    state.model(torch.ones(1, WIDTH)).sum().backward()
    state.optimizers[0].step()
    model, optimizer = get_state_dict(state.model, state.optimizers[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model, "optim": optimizer}, checkpoint_id=folder)


def restore_dcp(url: str, mode: str) -> None:
    load(url, sharded(layers()), options={"mode": mode})


def restore_plain(url: str, mode: str) -> None:
    model = layers()
    load(url, State(model, torch.optim.AdamW(model.parameters())), options={"mode": mode})


def restore_awkward(url: str, mode: str) -> None:
    """The model of dcp-fsdp2-w2."""
    from modules_worker import optimizer_for

    model = Awkward()
    fully_shard(model)
    load(url, State(model, optimizer_for(model)), options={"mode": mode})


def restore_engine(url: str, stage: str, mode: str) -> None:
    """The model of deepspeed-zero*-w4."""
    from zero_model import make_engine

    load(url, State(make_engine(int(stage))), options={"mode": mode})
