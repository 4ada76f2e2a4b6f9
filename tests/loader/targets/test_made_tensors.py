"""Sparse and quantized tensors and the like in a module; unknown values beside what is restored."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.tensor
from rankload.loader.errors import MismatchError, UnsafeError
from torch import nn

from rankload import State, load


class Holder(nn.Module):
    def __init__(self, tensor: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("held", tensor)


class Unknown:
    pass


def quantized(values: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(values, 0.5, 1, torch.qint8)


def conjugated(values: torch.Tensor) -> torch.Tensor:
    return torch.complex(values, values + 1).conj()


def complete(values: torch.Tensor) -> torch.Tensor:
    return torch.complex(values, values + 1)


FORMS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[torch.Tensor], Any]]] = {
    "coo": (torch.Tensor.to_sparse, torch.Tensor.to_sparse),
    "csr": (torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csr),
    "quantized": (quantized, quantized),
    "conjugated": (conjugated, complete),
}


def dense(tensor: torch.Tensor) -> list[Any]:
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return (tensor.dequantize() if tensor.is_quantized else tensor.resolve_conj()).tolist()


@pytest.mark.parametrize("form", list(FORMS))
def test_such_tensors_are_restored(tmp_path: Path, form: str) -> None:
    save, own = FORMS[form]
    saved = Holder(save(torch.eye(3)))
    torch.save({"model": saved.state_dict()}, tmp_path / "f.pt")
    model = Holder(own(torch.zeros(3, 3)))
    held = model.held
    load(tmp_path / "f.pt", State(model), progress_bar=False)
    assert model.held is held
    assert dense(held) == dense(saved.held)
    assert torch.equal(model.layer.weight, saved.layer.weight)


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        (
            torch.eye(3).to_sparse(),
            torch.zeros(3, 3),
            "expected an ordinary tensor, got a tensor of layout sparse_coo",
        ),
        (
            torch.eye(3),
            torch.zeros(3, 3).to_sparse_csr(),
            "expected a tensor of layout sparse_csr, got an ordinary",
        ),
        (quantized(torch.eye(3)), torch.zeros(3, 3), "expected an ordinary tensor, got a quantized tensor"),
        (
            quantized(torch.eye(3)),
            torch.quantize_per_channel(torch.eye(3), torch.ones(3), torch.zeros(3).long(), 0, torch.qint8),
            r"expected a quantized tensor \(per_channel_affine\), got a quantized tensor \(per_tensor_affine\)",
        ),
        (
            torch.quantize_per_channel(torch.eye(3), torch.ones(3), torch.zeros(3), 0, torch.qint8),
            torch.quantize_per_channel(torch.eye(3), torch.ones(3), torch.zeros(3).long(), 0, torch.qint8),
            r"expected a quantized tensor \(per_channel_affine\), got a quantized tensor \(.*_float_qparams\)",
        ),
        (torch.eye(3).to_sparse(), torch.zeros(2, 3).to_sparse(), r"expected shape \(2, 3\), got \(3, 3\)"),
        (torch.ones(3, device="meta"), torch.zeros(3), "got a tensor on the meta device"),
    ],
)
def test_what_cannot_be_copied_is_found_before_the_first_change(
    tmp_path: Path, saved: torch.Tensor, own: torch.Tensor, message: str
) -> None:
    torch.save({"model": Holder(saved).state_dict()}, tmp_path / "f.pt")
    model = Holder(own)
    before = model.layer.weight.detach().clone()
    with pytest.raises(MismatchError, match=f"model/held: {message}" if "meta" not in message else message):
        load(tmp_path / "f.pt", State(model), progress_bar=False)
    assert torch.equal(model.layer.weight, before)
    load(tmp_path / "f.pt", State(model), progress_bar=False, ignore_keys=["state/model/held"])
    assert not torch.equal(model.layer.weight, before)


def test_a_bare_state_dict_may_hold_them(tmp_path: Path) -> None:
    saved = Holder(torch.eye(3).to_sparse())
    torch.save(saved.state_dict(), tmp_path / "f.pt")
    model = Holder(torch.zeros(3, 3).to_sparse())
    load(tmp_path / "f.pt", State(model), progress_bar=False)
    assert dense(model.held) == dense(saved.held)


def shard() -> Any:
    """Pickles as one rank's part of a tensor does."""

    class Shard:
        def __reduce__(self) -> Any:
            dtensor = torch.distributed.tensor.DTensor
            arguments = (dtensor, torch.float32, (4,), (1,), 0, torch.strided, torch.device("cpu"), False)
            return torch._tensor._rebuild_from_type_v2, (
                torch._utils._rebuild_wrapper_subclass, dtensor, arguments, {}
            )  # fmt: skip

    return Shard()


@pytest.mark.parametrize("ignored", [[], ["state/optimizers/AdamW/state/0/exp_avg"]])
def test_state_that_cannot_be_restored_is_found_in_the_check(tmp_path: Path, ignored: list[str]) -> None:
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    groups = optimizer.state_dict()["param_groups"]
    state = {0: {"step": torch.tensor(1.0), "exp_avg": shard(), "exp_avg_sq": torch.zeros(2, 2)}}
    contents = {
        "model": {"weight": torch.ones(2, 2)},
        "optimizer": {"state": state, "param_groups": groups},
    }
    torch.save(contents, tmp_path / "f.pt")
    with pytest.raises(
        MismatchError, match=r"state/0/exp_avg: a DTensor, one rank's shard.*ignore_keys"
    ) as caught:
        load(tmp_path / "f.pt", State(model, optimizer), progress_bar=False, ignore_keys=ignored)
    (advised,) = re.findall(r"ignore_keys=\['(.*?)'\]", str(caught.value))
    load(tmp_path / "f.pt", State(model, optimizer), progress_bar=False, ignore_keys=[advised])
    assert model.weight.tolist() == [[1, 1], [1, 1]]
    assert not optimizer.state


def test_unknown_types_are_judged_where_they_are_used(tmp_path: Path) -> None:
    saved = nn.Linear(2, 2)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    contents = {
        "model": saved.state_dict(),
        "scheduler": {**scheduler.state_dict(), "step_size": Unknown()},
        "args": Unknown(),
        "epoch": 2,
    }
    torch.save(contents, tmp_path / "f.pt")
    with pytest.warns(UserWarning, match="scheduler0, for which this job has no counterpart"):
        extra = load(tmp_path / "f.pt", State(model), progress_bar=False).extra
    assert torch.equal(model.weight, saved.weight)
    assert (extra["epoch"], extra["args"].global_name) == (2, f"{__name__}.Unknown")
    with pytest.raises(UnsafeError, match=r"state/schedulers/StepLR/step_size: a .*\.Unknown"):
        load(tmp_path / "f.pt", State(model, schedulers=[scheduler]), progress_bar=False)


def test_an_object_where_a_dict_must_be_is_named(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for value in (Unknown(), argparse.Namespace(lr=1)):
        state = {"model": model.state_dict(), "optimizers": {"SGD": value}}
        torch.save({"state": state, "rng": None}, tmp_path / "f.pt")
        with pytest.raises(
            MismatchError, match=r"optimizers/SGD: expected a dict, got a .*(Unknown|Namespace)"
        ):
            load(tmp_path / "f.pt", State(model, optimizer), progress_bar=False)
