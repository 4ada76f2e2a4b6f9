"""DCP folders that tests make in one process, and jobs of the shape of those in tests/data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rankload.loader import State
from torch import nn


def save(folder: Path | str, state: Mapping[str, Any], **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), checkpoint_id=str(folder), no_dist=True, **options)
    return Path(folder)


def module_of(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module that has zeros of these names, shapes and dtypes: parameters, but buffers where they are integers."""
    root = nn.Module()
    for name, tensor in tensors.items():
        node = root
        *above, last = name.split(".")
        for part in above:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]
        if tensor.is_floating_point():
            node.register_parameter(last, nn.Parameter(torch.zeros_like(tensor)))
        else:
            node.register_buffer(last, torch.zeros_like(tensor))
    return root


def job_of(oracle: Mapping[str, torch.Tensor], prefix: str = "") -> State:
    """A job for the tensors that an oracle has, with an AdamW over those that have moments."""
    weights = {prefix + name[6:]: tensor for name, tensor in oracle.items() if name.startswith("model/")}
    model = module_of(weights)
    trained = [
        one for name, one in model.named_parameters() if f"exp_avg/{name.removeprefix(prefix)}" in oracle
    ]
    groups = [
        {"params": [one for one in trained if one.dim() > 1]},
        {"params": [one for one in trained if one.dim() < 2]},
    ]
    optimizer = torch.optim.AdamW(groups)
    return State(model, optimizer, [torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 10)])


def tensors_of(state: State, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a job, by an oracle's names."""
    found = {f"model/{name.removeprefix(prefix)}": value for name, value in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        entries = state.optimizers[0].state.get(parameter, {}) if state.optimizers else {}
        found.update({f"{key}/{name.removeprefix(prefix)}": value for key, value in entries.items()})
    return found


def assert_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name
