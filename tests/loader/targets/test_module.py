"""What of a module is filled from which saved entry, and what is found not to fit before anything changes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rankload.loader import MismatchError, PartialRestoreError, State, load
from rankload.loader.targets import buffers
from rankload.loader.targets.dtensor import unfillable
from rankload.loader.targets.module import loading_overrides, module_tensors
from torch import nn


def restored(path: Path, saved: Any, module: nn.Module, **arguments: Any) -> Any:
    torch.save({"model": saved}, path / "a.pt")
    return load(str(path / "a.pt"), State(module), load_weights_only=True, progress_bar=False, **arguments)


class Scaled(nn.Module):
    """Keeps its scale as extra state, of which it may have none yet."""

    def __init__(self, scale: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.scale = scale

    def get_extra_state(self) -> Any:
        return self.scale

    def set_extra_state(self, state: Any) -> None:
        self.scale = state


@pytest.mark.parametrize("now", [None, {}, torch.empty(0), torch.zeros(7), {"amax": torch.zeros(1)}])
@pytest.mark.parametrize("then", [None, torch.arange(7), torch.empty(0), {"amax": torch.ones(3)}, 4])
def test_extra_state_is_restored_whatever_the_target_has(tmp_path: Path, now: Any, then: Any) -> None:
    job = nn.Sequential(Scaled(now), nn.Linear(2, 2))
    restored(tmp_path, nn.Sequential(Scaled(then), nn.Linear(2, 2)).state_dict(), job)
    got = job[0].scale
    if isinstance(then, dict):
        got, then = got["amax"], then["amax"]
    assert torch.equal(got, then) if isinstance(then, torch.Tensor) else got == then


@pytest.mark.parametrize("now", [None, torch.zeros(7)])
def test_wrong_weights_beside_extra_state_are_found_before_anything_changes(tmp_path: Path, now: Any) -> None:
    # A tensor as extra state must not send the whole module through its own, unchecked, loading.
    job = Scaled(now)
    assert loading_overrides(job) == []
    with pytest.raises(MismatchError, match=r"model/weight: expected shape \(2,\), got \(3,\)"):
        restored(tmp_path, {"weight": torch.ones(3), "_extra_state": torch.ones(7)}, job)
    assert job.scale is now


def test_extra_state_of_a_shared_submodule_may_have_one_name(tmp_path: Path) -> None:
    shared = Scaled()
    job = nn.ModuleDict({"a": shared, "b": shared})
    restored(tmp_path, {"a.weight": torch.ones(2), "a._extra_state": 3}, job)
    assert shared.scale == 3


def test_extra_state_that_nobody_takes_is_unexpected_and_one_that_is_missing_is_missing(
    tmp_path: Path,
) -> None:
    class Giving(nn.Linear):
        def get_extra_state(self) -> Any:
            return torch.ones(2)

    giving = Giving(1, 1)
    with pytest.raises(MismatchError, match=r"unexpected in the checkpoint \(1\):\n  model/_extra_state"):
        restored(tmp_path, giving.state_dict(), giving)
    with pytest.raises(MismatchError, match=r"missing from the checkpoint \(1\):\n  model/_extra_state"):
        restored(tmp_path, {"weight": torch.ones(2)}, Scaled())


def test_what_a_saving_hook_adds_is_unexpected_where_nothing_loads_it(tmp_path: Path) -> None:
    job = nn.Linear(1, 1)
    job.register_state_dict_post_hook(lambda module, state, prefix, local: state.update(version=3))
    assert set(module_tensors(job)) == {"weight", "bias"}
    with pytest.raises(MismatchError, match="unexpected"):
        restored(tmp_path, job.state_dict(), job)
    result = restored(tmp_path, job.state_dict(), job, strict_model_weights=False)
    assert result.receipt.unexpected == ("model/version",)


class One(nn.Module):
    def __init__(
        self, shape: tuple[int, ...], value: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, value))
        self.register_buffer("count", torch.full(shape, int(value), dtype=dtype))


@pytest.mark.parametrize(("then", "now"), [((1,), ()), ((), (1,))])
def test_a_number_and_a_tensor_of_one_element_fit_each_other(
    tmp_path: Path, then: tuple[int, ...], now: tuple[int, ...]
) -> None:
    first, job = One(then, 3.0), One(now)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1) for module in (first, job)]

    def train(module: Any, optimizer: Any) -> float:
        module.weight.sum().square().backward()
        optimizer.step()
        optimizer.zero_grad()
        return module.weight.item()

    train(first, optimizers[0])
    torch.save({"model": first.state_dict(), "optimizer": optimizers[0].state_dict()}, tmp_path / "a.pt")
    load(str(tmp_path / "a.pt"), State(job, optimizers[1]), progress_bar=False)
    assert job.weight.shape == job.count.shape == now
    assert job.count.item() == 3
    assert optimizers[1].state[job.weight]["exp_avg"].shape == now
    assert train(job, optimizers[1]) == train(first, optimizers[0])
    with pytest.raises(MismatchError, match=r"expected shape \(1, 1\), got "):
        load(str(tmp_path / "a.pt"), State(One((1, 1))), load_weights_only=True, progress_bar=False)


def masked(dtype: torch.dtype, values: Any) -> nn.Module:
    module = nn.Module()
    module.register_buffer("mask", torch.tensor(values).to(dtype))
    return module


NUMBERS = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32)


@pytest.mark.parametrize("then", NUMBERS)
def test_buffers_of_another_kind_are_cast(tmp_path: Path, then: torch.dtype) -> None:
    for now in NUMBERS:
        job = masked(now, [0, 0, 0])
        receipt = restored(tmp_path, masked(then, [1, 0, 1]).state_dict(), job).receipt
        assert job.mask.dtype == now
        assert job.mask.tolist() == [1, 0, 1]
        names = [str(dtype).removeprefix("torch.") for dtype in (then, now)]
        assert receipt.cast == ({} if then is now else {"model/mask": " -> ".join(names)})


@pytest.mark.parametrize(
    ("then", "values", "now", "lost"),
    [
        (torch.int64, [1, 2], torch.bool, "2"),
        (torch.float32, [1.0, 0.5], torch.int64, "0.5"),
        (torch.float32, [0.0, float("-inf")], torch.bool, "-inf"),
        (torch.float32, [float("nan")], torch.uint8, "nan"),
        (torch.int64, [300], torch.uint8, "300"),
        (torch.int64, [2**24 + 1], torch.float32, "16777217"),
        (torch.int32, [-1], torch.uint8, "-1"),
    ],
)
def test_a_buffer_whose_values_do_not_survive_is_refused(
    tmp_path: Path, then: torch.dtype, values: Any, now: torch.dtype, lost: str
) -> None:
    job = masked(now, [0] * len(values))
    with pytest.raises(MismatchError, match=f"model/mask: expected .*with the value {lost}, which"):
        restored(tmp_path, masked(then, values).state_dict(), job)
    assert not job.mask.any()
    with pytest.raises(MismatchError, match="with the value"):
        buffers.check_read({"mask": (torch.tensor(values, dtype=then), job.mask)}, "a file")


def test_parameters_are_not_cast_to_another_kind(tmp_path: Path) -> None:
    job = nn.Module()
    job.weight = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    for dtype in (torch.float32, torch.int64):
        with pytest.raises(MismatchError, match="model/weight: expected uint8, got "):
            restored(tmp_path, {"weight": torch.ones(2, dtype=dtype)}, job)
    restored(tmp_path, {"weight": torch.ones(2, dtype=torch.bool)}, job)
    assert job.weight.tolist() == [1, 1]


class Resizing(nn.Module):
    """In the likeness of torch's observers: takes what it is given, whatever its size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(size))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.low = torch.empty_like(state[f"{prefix}low"])
        super()._load_from_state_dict(state, prefix, *rest)


def test_what_resizes_while_it_is_loaded_loads_itself(tmp_path: Path) -> None:
    job = nn.Sequential(nn.Linear(2, 2), Resizing(0))
    assert loading_overrides(job) == ["1."]
    restored(tmp_path, nn.Sequential(nn.Linear(2, 2), Resizing(3)).state_dict(), job)
    assert job[1].low.shape == (3,)
    one = nn.Sequential(nn.Linear(2, 2), Resizing(0))
    with pytest.raises(MismatchError, match=r"model/0.weight: expected shape"):
        restored(tmp_path, nn.Sequential(nn.Linear(3, 2), Resizing(3)).state_dict(), one)
    # A loader that was put on one object counts too.
    patched = nn.Linear(1, 1)
    patched._load_from_state_dict = lambda *arguments: None  # type: ignore[method-assign]
    assert loading_overrides(patched) == [""]


def test_torchs_own_observers_load_themselves(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torch.ao.quantization")

    def model() -> nn.Module:
        torch.manual_seed(0)
        found = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.qconfig = quantization.get_default_qat_qconfig("fbgemm")
            return quantization.prepare_qat(found.train())

    first, job = model(), model()
    first(torch.randn(3, 4))
    restored(tmp_path, first.state_dict(), job)
    for name, value in first.state_dict().items():
        assert torch.equal(job.state_dict()[name], value), name


class Wrapping(torch.Tensor):
    """Keeps its data in another tensor."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Wrapping(torch.zeros(2, 3)) if "detach" in str(func) else NotImplemented


class Named(torch.Tensor):
    """Holds plain data."""


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.zeros(1, 3).expand(2, 3), "several elements in one place"),
        (lambda: torch.zeros(4).as_strided((2, 3), (1, 1)), "several elements in one place"),
        (lambda: torch.zeros(10).as_strided((2, 3), (3, 3)), "several elements in one place"),
        (lambda: torch.zeros(2, 3).to_sparse(), "of layout sparse_coo"),
        (lambda: torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.qint8), "quantized"),
        (lambda: Wrapping(torch.zeros(2, 3)), "a Wrapping, which keeps its data in other tensors"),
    ],
)
def test_what_cannot_be_filled_is_found_before_anything_changes(tmp_path: Path, make: Any, why: str) -> None:
    job = nn.Module()
    job.weight = nn.Parameter(torch.zeros(2))
    job.register_buffer("odd", make())
    with pytest.raises(MismatchError, match=f"model/odd: .*{why}"):
        restored(tmp_path, {"weight": torch.ones(2), "odd": torch.ones(2, 3)}, job)
    assert not job.weight.any()
    # What is not restored need not be fillable.
    restored(
        tmp_path, {"weight": torch.ones(2), "odd": torch.ones(2, 3)}, job, ignore_keys=["state/model/odd"]
    )
    assert job.weight.tolist() == [1, 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, 2).t(),
        lambda: torch.zeros(4, 6)[::2, ::2],
        lambda: torch.zeros(9).as_strided((2, 3), (2, 3)),
        lambda: torch.zeros(2, 3).as_subclass(Named),  # type: ignore[type-var]
        lambda: torch.zeros(1, 2, 3)[0],
    ],
)
def test_strided_tensors_and_subclasses_with_plain_data_are_filled(tmp_path: Path, make: Any) -> None:
    job = nn.Module()
    job.register_buffer("odd", make())
    assert unfillable(job.odd) is None
    values = torch.arange(6.0).view(2, 3)
    restored(tmp_path, {"odd": values}, job)
    assert torch.equal(job.odd.as_subclass(torch.Tensor), values)


def test_a_module_whose_own_loading_fails_is_partly_restored(tmp_path: Path) -> None:
    class Failing(nn.Linear):
        def _load_from_state_dict(self, *arguments: Any) -> None:
            raise RuntimeError("no")

    with pytest.raises(PartialRestoreError, match=r"Sequential.load_state_dict failed: no"):
        restored(tmp_path, nn.Sequential(nn.Linear(1, 1)).state_dict(), nn.Sequential(Failing(1, 1)))
