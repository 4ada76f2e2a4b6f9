"""Jobs of the real Composer that save after batch 4, and others that resume by rankload's callback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import absent_packages  # noqa: F401 - before Composer, which imports what it stands in for
import torch
from composer.core import Callback
from composer.utils import dist
from composer_job import RANK, WORLD_SIZE, Losses, optimizer_tensors, trainer, weights
from framework_lines import run_lines
from torch.utils.data import DataLoader, TensorDataset

BATCH = 6
"""Samples of a step over all ranks, which one, two and three can share."""


class Data(TensorDataset):
    """One epoch of 8 steps, the same on every rank."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(torch.randn(8 * BATCH, 3, 8, 8), torch.randint(0, 2, (8 * BATCH,)))


class Drawn(Callback):
    """What the job draws from torch's generator at each batch, on each rank."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def after_train_batch(self, state: Any, logger: Any) -> None:
        self.seen.append(float(torch.rand(())))


def job(folder: str, callbacks: list[Any], **options: Any) -> Any:
    # Composer deals batches of as many samples over all ranks in the same way, at any number of ranks.
    data = Data()
    loader = DataLoader(data, batch_size=BATCH // WORLD_SIZE, sampler=dist.get_sampler(data, shuffle=True))
    return trainer(
        train_loader=loader, callbacks=callbacks, max_duration="8ba", seed=options.pop("weights"), **options
    )


def save(folder: str) -> None:
    """Leaves ``ep0-ba4-rank0.pt``, and what the job held then and did afterwards."""
    held: dict[str, Any] = {}

    class Hold(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            if int(state.timestamp.batch) == 4:
                held.update(weights=weights(state), moments=optimizer_tensors(state))

    losses, drawn = Losses(), Drawn()
    job(
        folder,
        [losses, drawn, Hold()],
        weights=7,
        save_folder=folder,
        save_interval="4ba",
        run_name="saved",
    ).fit()
    told = {"losses": over_ranks(losses.seen), "drawn": drawn.seen}
    Path(folder, f"numbers-{RANK}.json").write_text(json.dumps(told))
    if RANK == 0:
        torch.save(held, f"{folder}/held.pt")


def over_ranks(values: list[float]) -> list[float]:
    if WORLD_SIZE == 1:
        return values
    mean = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(mean)
    return [float(one) / WORLD_SIZE for one in mean]


def resume(folder: str, path: str) -> None:
    held = torch.load(f"{folder}/held.pt", weights_only=True)
    found: dict[str, Any] = {}

    class Watch(Callback):
        def after_load(self, state: Any, logger: Any) -> None:
            found.update(weights=weights(state), moments=optimizer_tensors(state))

    losses, drawn = Losses(), Drawn()
    names: dict[str, Any] = {"path": path}
    names["Trainer"] = lambda callbacks: job(
        folder, [*callbacks, Watch(), losses, drawn], weights=9, run_name="resumed"
    )
    running = run_lines("composer", names)["trainer"]
    assert losses.count == 4, losses.count  # the callback's own state
    assert running.state.run_name == "resumed"
    running.fit()
    for part, tensors in held.items():
        assert set(found[part]) == set(tensors)
        for name, value in tensors.items():
            assert torch.equal(found[part][name], value), name
    same = WORLD_SIZE == 2
    expected = json.loads(Path(folder, f"numbers-{min(RANK, 1)}.json").read_text())
    assert int(running.state.timestamp.batch) == 8
    apart = [abs(a - b) for a, b in zip(over_ranks(losses.seen), expected["losses"][4:], strict=True)]
    assert max(apart) <= (0.0 if same else 1e-5), apart
    if same or RANK == 0:
        assert drawn.seen == expected["drawn"][4:], (drawn.seen, expected["drawn"])
    print(os.environ.get("RANK"), drawn.seen)
