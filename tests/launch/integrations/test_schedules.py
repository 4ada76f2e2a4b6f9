"""Schedules that count several times a step, at another number of processes: their rates go on as they would have."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rankload.integrations.schedules import STEPS, resumed
from torch.optim import lr_scheduler

from rankload import OptionError

Make = Callable[[torch.optim.Optimizer, int], Any]
"""A scheduler for so many processes."""


def optimizer() -> torch.optim.Optimizer:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [weights[0]], "lr": 0.5}, {"params": [weights[1]], "lr": 0.25}]
    return torch.optim.SGD(groups)


def rates_of(scheduler: Any, counts: int, steps: int) -> list[list[float]]:
    """Those of each of the next steps, which count so many times."""
    found = []
    for _ in range(steps):
        for _ in range(counts):
            scheduler.optimizer.step()
            scheduler.step()
        found.append(scheduler.get_last_lr())
    return found


def go_on(make: Make, before: int, now: int, steps: int, **batches: int | None) -> tuple[Any, int]:
    """A scheduler of `now` processes that goes on after `steps` of one of `before`, and its counts of a step."""
    old = make(optimizer(), before)
    rates_of(old, before, steps)
    saved, rates = old.state_dict(), old.get_last_lr()
    new = make(optimizer(), now)
    untouched = new.state_dict()
    plan = resumed(
        new,
        saved,
        before=before,
        now=now,
        saved_batch=batches.get("saved_batch"),
        batch=batches.get("batch"),
    )
    assert new.state_dict() == untouched
    new.load_state_dict(saved if plan.state is None else dict(plan.state))
    for group, rate in zip(new.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    assert new.get_last_lr() == rates
    return new, plan.counts_a_step


def by_steps(total: int) -> dict[str, Make]:
    """Schedules that are made for so many counts a step."""
    return {
        "LambdaLR": lambda one, n: lr_scheduler.LambdaLR(
            one, lambda count: max(0.0, 1 - count / (total * n))
        ),
        "StepLR": lambda one, n: lr_scheduler.StepLR(one, 7 * n, gamma=0.5),
        "MultiStepLR": lambda one, n: lr_scheduler.MultiStepLR(one, [3 * n, 11 * n], gamma=0.3),
        "CosineAnnealingLR": lambda one, n: lr_scheduler.CosineAnnealingLR(one, total * n),
        "LinearLR": lambda one, n: lr_scheduler.LinearLR(one, 0.1, total_iters=total * n),
        "ConstantLR": lambda one, n: lr_scheduler.ConstantLR(one, 0.5, total_iters=6 * n),
        "PolynomialLR": lambda one, n: lr_scheduler.PolynomialLR(one, total * n, power=2),
        "ExponentialLR": lambda one, n: lr_scheduler.ExponentialLR(one, 0.9 ** (1 / n)),
        "CosineAnnealingWarmRestarts": lambda one, n: lr_scheduler.CosineAnnealingWarmRestarts(one, 5 * n, 2),
        "CosineAnnealingWarmRestarts, alike": lambda one, n: lr_scheduler.CosineAnnealingWarmRestarts(
            one, 4 * n
        ),
        "CyclicLR": lambda one, n: lr_scheduler.CyclicLR(one, 0.1, 0.9, 3 * n, 4 * n, mode="triangular2"),
        "SequentialLR": lambda one, n: sequence(
            one,
            n,
            [(4, lr_scheduler.LinearLR, 0.1, 1.0, 4 * n), (15, lr_scheduler.CosineAnnealingLR, 15 * n)],
        ),
        "SequentialLR of three": lambda one, n: sequence(
            one,
            n,
            [
                (3, lr_scheduler.LambdaLR, lambda count: (1 + count) / (1 + 3 * n)),
                (6, lr_scheduler.CosineAnnealingWarmRestarts, 2 * n),
                (11, lr_scheduler.ExponentialLR, 0.9 ** (1 / n)),
            ],
        ),
    }


def sequence(one: torch.optim.Optimizer, n: int, parts: list[tuple[Any, ...]]) -> Any:
    """A SequentialLR of `parts`: the steps that each lasts, its class and its arguments."""
    made = [kind(one, *settings) for _, kind, *settings in parts]
    ends = [n * sum(part[0] for part in parts[: number + 1]) for number in range(len(parts) - 1)]
    return lr_scheduler.SequentialLR(one, made, ends)


@pytest.mark.parametrize("name", sorted(by_steps(20)))
@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (4, 6), (3, 3)])
def test_a_schedule_of_steps_goes_on(name: str, before: int, now: int) -> None:
    make, done = by_steps(20)[name], random.Random(f"{name}{before}{now}").randint(1, 14)
    new, counts = go_on(make, before, now, done)
    assert counts == now
    old = make(optimizer(), before)
    expected = rates_of(old, before, 19)[done:]
    for found, wanted in zip(rates_of(new, now, 19 - done), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    for found, wanted in zip(new.optimizer.param_groups, old.optimizer.param_groups, strict=True):
        assert found["momentum"] == pytest.approx(wanted["momentum"])


def one_cycle(total: int, three: bool = False, peak: float = 1.0, start: float = 0.3) -> Make:
    """One of `total` counts for each that a step has."""
    return lambda one, n: lr_scheduler.OneCycleLR(
        one, peak, total * n, pct_start=start, three_phase=three, anneal_strategy="linear" if three else "cos"
    )


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 3), (4, 6), (2, 2)])
@pytest.mark.parametrize("done", [1, 5, 13, 19])
def test_one_cycle_of_steps_goes_on_as_it_was_saved(three: bool, before: int, now: int, done: int) -> None:
    make = one_cycle(20, three)
    new, counts = go_on(make, before, now, done)
    assert counts == before
    old = make(optimizer(), before)
    expected = rates_of(old, before, 20)[done:]
    assert rates_of(new, counts, 20 - done) == expected
    assert new.optimizer.param_groups[0]["momentum"] == old.optimizer.param_groups[0]["momentum"]


def test_one_cycle_of_samples_counts_as_its_samples_did() -> None:
    def make(one: torch.optim.Optimizer, _: int) -> Any:
        return one_cycle(60)(one, 1)

    new, counts = go_on(make, 2, 3, 10, saved_batch=24, batch=48)
    assert counts == 4
    assert rates_of(new, counts, 10) == rates_of(make(optimizer(), 1), 2, 30)[11::2]


@pytest.mark.parametrize(
    ("then", "here", "match"),
    [
        (
            one_cycle(20),
            one_cycle(21),
            r"made for 40 counts, 2 a step, and is made for 21 here.* for 20 .* for 40",
        ),
        (one_cycle(20), one_cycle(20, peak=0.9), "the schedule that the saving job had"),
        (one_cycle(20), one_cycle(20, start=0.5), "the schedule that the saving job had"),
        (one_cycle(20), one_cycle(20, three=True), "the schedule that the saving job had"),
    ],
)
def test_another_one_cycle_is_refused(then: Make, here: Make, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        go_on(lambda one, n: (then if n == 2 else here)(one, n), 2, 1, 4)


def test_one_cycle_that_was_carried_over_goes_on_at_a_third_size() -> None:
    make = one_cycle(20)
    second, counts = go_on(make, 2, 1, 4)
    setattr(second, STEPS, counts)
    rates_of(second, counts, 4)
    third = make(optimizer(), 3)
    plan = resumed(third, second.state_dict(), before=1, now=3, saved_batch=None, batch=None)
    assert (plan.state, plan.counts_a_step) == (None, 2)


OF_SAMPLES: dict[str, Make] = {
    "LambdaLR": lambda one, _: lr_scheduler.LambdaLR(one, lambda count: 1 / (1 + count)),
    "StepLR": lambda one, _: lr_scheduler.StepLR(one, 9, gamma=0.5),
    "CosineAnnealingLR": lambda one, _: lr_scheduler.CosineAnnealingLR(one, 200),
}


@pytest.mark.parametrize("name", sorted(OF_SAMPLES))
@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 3), (4, 6)])
@pytest.mark.parametrize(("batch", "factor"), [(24, 1), (48, 2)])
def test_a_schedule_of_samples_counts_as_its_samples_did(
    name: str, before: int, now: int, batch: int, factor: int
) -> None:
    new, counts = go_on(OF_SAMPLES[name], before, now, 10, saved_batch=24, batch=batch)
    assert counts == before * factor
    expected = rates_of(OF_SAMPLES[name](optimizer(), 1), before, 26)[10:]
    found = rates_of(new, counts, 16 // factor)
    for each, wanted in zip(found, expected[factor - 1 :: factor], strict=True):
        assert each == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_counts_that_were_kept_go_on_at_a_third_size() -> None:
    """A schedule of samples saved by two, resumed by one, saved again, and resumed by three."""
    make = OF_SAMPLES["LambdaLR"]
    second, counts = go_on(make, 2, 1, 4, saved_batch=6, batch=6)
    setattr(second, STEPS, counts)
    rates_of(second, counts, 4)
    third = make(optimizer(), 3)
    plan = resumed(third, second.state_dict(), before=1, now=3, saved_batch=6, batch=6)
    assert (plan.state, plan.counts_a_step) == (None, 2)


REFUSED: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    "MultiplicativeLR": lambda one: lr_scheduler.MultiplicativeLR(one, lambda _: 0.5),
    "SequentialLR": lambda one: lr_scheduler.SequentialLR(
        one, [lr_scheduler.ConstantLR(one), lr_scheduler.MultiplicativeLR(one, lambda _: 0.5)], [3]
    ),
    "ChainedScheduler": lambda one: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(one)]),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_a_state_of_its_own_is_refused_by_name(name: str) -> None:
    scheduler = REFUSED[name](optimizer())
    with pytest.raises(OptionError, match=f"{name} counts 2 times a step"):
        resumed(scheduler, scheduler.state_dict(), before=2, now=1, saved_batch=4, batch=4)
    same = resumed(scheduler, scheduler.state_dict(), before=2, now=2, saved_batch=None, batch=None)
    assert (same.state, same.counts_a_step) == (None, 2)


def test_another_schedule_is_refused_with_both_rates() -> None:
    with pytest.raises(OptionError, match=r"had the rate .* at count 8 .* this job's has"):
        go_on(lambda one, n: lr_scheduler.LambdaLR(one, lambda count: math.exp(-count * n * n)), 2, 1, 4)


def test_a_schedule_of_samples_needs_their_number() -> None:
    make = OF_SAMPLES["LambdaLR"]
    with pytest.raises(OptionError, match="saved_batch_size="):
        go_on(make, 2, 1, 4, saved_batch=None, batch=6)
    with pytest.raises(OptionError, match="Take a multiple of 3 samples a step"):
        go_on(make, 2, 1, 4, saved_batch=6, batch=4)


def test_a_rate_that_two_readings_have_is_refused_where_they_part_later() -> None:
    """Constant up to count 100, whatever there was before."""
    with pytest.raises(OptionError, match="does not tell whether it counts steps or samples"):
        go_on(lambda one, _: lr_scheduler.LambdaLR(one, lambda count: float(count < 100)), 2, 1, 4)
    new, counts = go_on(lambda one, _: lr_scheduler.LambdaLR(one, lambda _: 1.0), 2, 1, 4)
    assert (counts, new.last_epoch) == (1, 4)
