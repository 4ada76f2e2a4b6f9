"""Loads under torch's modes: the result is that of a plain load, and the caller's modes stay as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankload.loader import OptionError, RankloadError, State, gather_rng, load, restore_rng
from rankload.loader.retries import Attempts, Outages, TryAgainError
from rankload.loader.torch_modes import callers_device, default_modes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import deterministic


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic_mode() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "none": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
    "default meta": lambda: default_device("meta"),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "deterministic": deterministic_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def modes_now() -> tuple[Any, ...]:
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_device(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        deterministic.fill_uninitialized_memory,
        torch.is_autocast_enabled("cpu"),
    )


def job() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    return model, torch.optim.Adam(model.parameters())


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    chance = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3, generator=chance)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    path = tmp_path_factory.mktemp("saved") / "last.pt"
    torch.manual_seed(0)
    model, optimizer = job()
    train(model, optimizer)
    extra = {"empty": torch.empty(0), "scale": torch.tensor(2.0), "codes": torch.zeros(4, dtype=torch.uint16)}
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": gather_rng(), **extra}, path
    )
    return path, train(model, optimizer)


@pytest.mark.parametrize("mode", MODES)
def test_a_load_is_the_same_under_every_mode(saved: tuple[Path, list[float]], mode: str) -> None:
    path, expected = saved
    model, optimizer = job()
    other = nn.Linear(7, 7)
    with MODES[mode]():
        before = modes_now()
        result = load(path, State(model, optimizer), progress_bar=False)
        restore_rng(result.rng_states)
        assert modes_now() == before
        with pytest.raises(RankloadError):
            load(path, State(other), progress_bar=False)
        assert modes_now() == before
    assert train(model, optimizer) == expected
    assert [result.extra[name].device.type for name in ("empty", "scale", "codes")] == ["cpu"] * 3
    assert result.extra["scale"].item() == 2.0
    assert not result.extra["scale"].is_inference()
    assert result.rng_states is not None
    assert torch.equal(result.rng_states[0]["torch"], torch.get_rng_state())


@pytest.mark.parametrize("mode", MODES)
def test_random_states_are_gathered_and_restored_under_every_mode(mode: str) -> None:
    with MODES[mode]():
        states = gather_rng()
        states[0]["torch"] = states[0]["torch"].tolist()
        random.random(), np.random.rand(), torch.rand(1, device="cpu")
        restore_rng(states)
        first = random.random(), np.random.rand(), torch.rand(1, device="cpu", dtype=torch.float32).tolist()
        restore_rng(states)
    assert (random.random(), np.random.rand(), torch.rand(1).tolist()) == first


def test_weights_that_autocast_kept_are_forgotten(tmp_path: Path) -> None:
    other = nn.Linear(3, 3)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    model, batch = nn.Linear(3, 3), torch.ones(1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(batch)
        load(tmp_path / "other.pt", State(model), progress_bar=False)
        after = model(batch)
        assert torch.equal(after, other(batch))
    assert not torch.equal(after, before)


class Hooked(nn.Linear):
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)


@pytest.mark.parametrize("kind", [nn.Linear, Hooked])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [True, False])
def test_modules_that_were_made_under_inference_mode(
    tmp_path: Path, kind: type[nn.Linear], dtype: torch.dtype, inside: bool
) -> None:
    trained = nn.Linear(3, 3)
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    with torch.inference_mode():
        model = kind(3, 3, dtype=dtype)
    with torch.inference_mode(inside):
        load(tmp_path / "trained.pt", State(model), progress_bar=False)
    assert model.weight.is_inference()
    assert torch.equal(model.weight, trained.weight.to(dtype))
    assert torch.equal(model.bias, trained.bias.to(dtype))


def test_an_inference_buffer_leaves_the_parameters_trainable(tmp_path: Path) -> None:
    model, optimizer = job()
    train(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    expected = train(model, optimizer)
    fresh, own = job()
    with torch.inference_mode():
        fresh.register_buffer("cache", torch.ones(2), persistent=False)
        load(tmp_path / "last.pt", State(fresh, own), progress_bar=False)
    assert train(fresh, own) == expected


@pytest.mark.parametrize("mode", [contextlib.nullcontext, lambda: torch.device("meta")])
def test_meta_tensors_get_memory_on_the_cpu_under_any_default_of_no_memory(
    tmp_path: Path, mode: Callable[[], contextlib.AbstractContextManager[Any]]
) -> None:
    trained = nn.Linear(3, 3)
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with mode():
        load(tmp_path / "trained.pt", State(model), progress_bar=False)
    assert torch.equal(model.weight, trained.weight)


def test_the_callers_default_device_is_remembered_inside() -> None:
    with torch.device("cuda:1"), default_modes():
        assert torch.get_default_device() == torch.device("cpu")
        assert callers_device() == torch.device("cuda:1")
        with default_modes():
            assert callers_device() == torch.device("cuda:1")
    assert callers_device() == torch.device("cpu")


def test_deterministic_mode_fills_no_memory_of_a_load() -> None:
    with deterministic_mode():
        with default_modes():
            torch.empty(3, dtype=torch.float4_e2m1fn_x2)
            assert torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError, match="not implemented"):
            torch.empty(3, dtype=torch.float4_e2m1fn_x2)


def test_a_mode_that_makes_no_real_tensors_is_refused_before_anything_is_read() -> None:
    model = nn.Linear(3, 3)
    with (
        FakeTensorMode(),
        pytest.raises(OptionError, match=r"FakeTensor instead.*load or save outside of it"),
    ):
        load("no-such-file.pt", State(model), progress_bar=False)


def test_a_load_draws_none_of_the_jobs_random_numbers(saved: tuple[Path, list[float]]) -> None:
    before = gather_rng()
    load(saved[0], State(*job()), progress_bar=False)
    Attempts(Outages(60.0), "a").failed(TryAgainError(RankloadError("no answer")), lambda: None)
    # A job of the same kind draws what `job` draws.
    after = gather_rng()
    restore_rng(before)
    job()
    for one, other in zip(after[0].values(), gather_rng()[0].values(), strict=True):
        assert str(one) == str(other)
        assert not isinstance(one, torch.Tensor) or torch.equal(one, other)
