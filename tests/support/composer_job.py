"""Jobs of the real Composer, and what the tests read off them."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import absent_packages  # noqa: F401 - before Composer, which imports what it stands in for
import torch
from composer import Trainer, algorithms
from composer.core import Callback
from composer.models import ComposerClassifier
from composer.utils import checkpoint, dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
if WORLD_SIZE > 1:
    dist.initialize_dist("cpu")


class Images(TensorDataset):
    """32 labelled pictures of noise, the same on every rank."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(torch.randn(32, 3, 8, 8), torch.randint(0, 2, (32,)))


class ResumableImages(Images):
    """Remembers what it was resumed with."""

    resumed: Any = None

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        return {"samples": num_samples, "from_beginning": from_beginning}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resumed = state


class Losses(Callback):
    """Keeps every batch's loss, and saves how many there were."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.count = 0

    def batch_end(self, state: Any, logger: Any) -> None:
        self.seen.append(float(state.loss))
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def squeeze_and_smooth() -> list[Any]:
    """The algorithms that the monolithic checkpoints were trained with."""
    return [algorithms.SqueezeExcite(latent_channels=4, min_channels=8), algorithms.LabelSmoothing(0.1)]


def trainer(
    given: Sequence[Any] = (), *, data: Any = None, train_loader: Any = None, seed: int = 7, **options: Any
) -> Trainer:
    """A job like the one that wrote the monolithic checkpoints, with other weights."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    model = ComposerClassifier(net, num_classes=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data = data if data is not None else Images()
    return Trainer(
        model=model,
        train_dataloader=train_loader
        or DataLoader(data, batch_size=4, sampler=dist.get_sampler(data, shuffle=True)),
        eval_dataloader=DataLoader(Images(), batch_size=4, sampler=dist.get_sampler(Images())),
        optimizers=optimizer,
        schedulers=torch.optim.lr_scheduler.StepLR(optimizer, 1),
        max_duration=options.pop("max_duration", "2ep"),
        algorithms=list(given),
        device="cpu",
        precision="fp32",
        seed=17,
        progress_bar=False,
        **options,
    )


@contextlib.contextmanager
def started_with(loader: Any) -> Iterator[None]:
    """Jobs made in here load through `loader`: a Trainer does so before it wraps the model."""
    theirs = checkpoint.load_checkpoint
    checkpoint.load_checkpoint = loader
    try:
        yield
    finally:
        checkpoint.load_checkpoint = theirs


def read(path: str) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def weights(state: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in state.get_model_state_dict().items()}


def optimizer_tensors(state: Any) -> dict[str, torch.Tensor]:
    (saved,) = state.get_optim_state_dict().values()
    return {
        f"{name}/{key}": value.detach().clone()
        for name, entries in saved["state"].items()
        for key, value in entries.items()
    }


def file_optimizer_tensors(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value
        for name, entries in saved["optimizers"]["Adam"]["state"].items()
        for key, value in entries.items()
    }


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def algorithm_names(state: Any) -> list[str]:
    return [type(algorithm).__name__ for algorithm in state.algorithms]


def recorded(work: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What `work` returns, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = work()
    return result, [str(one.message) for one in caught]
