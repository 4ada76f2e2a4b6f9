"""Lets a schedule that counts several times a step go on where another number of processes steps it.

Accelerate steps a scheduler once for each process: after 4 steps of 2 processes it counts 8. What a count means is in
the job's code alone, so the learning rate that was saved with the count is the witness:

    the job's schedule has it at the count times new / old    it is a schedule of steps: the count is scaled
    the job's schedule has it at the count itself             it is one of samples: the count stays, and each step
                                                              counts as its samples did when the checkpoint was saved
    at neither                                                another schedule: refused

That takes a scheduler whose rates are a function of its count: LambdaLR, as all of transformers' schedules but two
are, and those of torch with a closed form (StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR, PolynomialLR,
CosineAnnealingLR). Others are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..loader import OptionError

STEPS = "rankload_counts_a_step"
"""Kept in a scheduler's own state where a step counts otherwise than once for each process."""
_COUNTERS = frozenset(
    {"last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", STEPS}
)
_CLOSE = 1e-6
"""How far apart two rates are that come from one schedule, by its closed form and step by step."""
_FARTHEST = 10_000_000
"""Up to how many steps ahead two readings of one count are compared."""


@dataclass(frozen=True)
class Resumed:
    """How a scheduler goes on."""

    state: Mapping[str, Any] | None
    """What its ``load_state_dict`` takes. None: what was saved."""
    counts_a_step: int


def resumed(
    scheduler: Any,
    saved: Mapping[str, Any],
    *,
    before: int,
    now: int,
    saved_batch: int | None,
    batch: int | None,
) -> Resumed:
    """How `scheduler`, as this job has made it, goes on from its `saved` state; it stays as it is.

    Args:
        before, now: processes when it was saved, and in this job.
        saved_batch, batch: samples of one step over all ranks, likewise; None where that is not known.

    Raises:
        OptionError: it cannot go on with the right rates; says why, and what to do.
    """
    before = int(saved.get(STEPS, before))
    if before == now:
        return Resumed(None, now)
    name = type(scheduler).__name__
    if not _is_function_of_count(scheduler):
        raise OptionError(
            f"{name} counts {before} times a step in the checkpoint and {now} times here, and its rate is no function "
            f"of its count alone, so that it cannot be carried over. Go on with {before} processes, or leave it out of "
            "prepare(), step it once a step, and restore it by its own load_state_dict"
        )
    count, rates = int(saved["last_epoch"]), [float(rate) for rate in saved["_last_lr"]]
    scaled = count * now // before if count * now % before == 0 else None
    by_steps = scaled is not None and _alike(_rates_at(scheduler, scaled), rates)
    by_samples = _alike(_rates_at(scheduler, count), rates)
    if by_steps and by_samples and scaled is not None:
        by_steps, by_samples = _which(scheduler, saved, (count, before), (scaled, now))
    if by_steps and scaled is not None:
        own = {key: value for key, value in scheduler.state_dict().items() if key != STEPS}
        return Resumed({**own, "last_epoch": scaled, "_step_count": scaled + 1, "_last_lr": rates}, now)
    if by_samples:
        return Resumed(None, _counts_a_step(name, before, now, saved_batch, batch))
    there = (
        "no whole number"
        if scaled is None
        else f"{scaled}, where it is {_shown(_rates_at(scheduler, scaled))}"
    )
    raise OptionError(
        f"{name} had the rate {_shown(rates)} at count {count:,} ({before} counts a step), and this job's has "
        f"{_shown(_rates_at(scheduler, count))} there; scaled to {now} counts a step the count is {there}. Make the "
        f"schedule that the saving job had, or go on with {before} processes"
    )


def _is_function_of_count(scheduler: Any) -> bool:
    from torch.optim.lr_scheduler import LambdaLR

    own = type(scheduler).get_lr
    if own is LambdaLR.get_lr:
        return True
    return hasattr(scheduler, "_get_closed_form_lr") and own.__module__ == LambdaLR.__module__


def _rates_at(scheduler: Any, count: int) -> list[float]:
    """The rates of `scheduler`, by its own settings, at `count`."""
    if not hasattr(scheduler, "_get_closed_form_lr"):
        return [
            float(base * one(count))
            for base, one in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
    kept, scheduler.last_epoch = scheduler.last_epoch, count
    try:
        return [float(rate) for rate in scheduler._get_closed_form_lr()]
    finally:
        scheduler.last_epoch = kept


def _alike(first: Sequence[float], second: Sequence[float]) -> bool:
    return len(first) == len(second) and all(
        math.isclose(one, other, rel_tol=_CLOSE, abs_tol=1e-15)
        for one, other in zip(first, second, strict=True)
    )


def _which(
    scheduler: Any, saved: Mapping[str, Any], samples: tuple[int, int], steps: tuple[int, int]
) -> tuple[bool, bool]:
    """Whether a count that can be read both ways (each comes with the counts of a step) is of steps, or of samples."""
    ahead = (
        _alike(
            _rates_at(scheduler, samples[0] + number * samples[1]),
            _rates_at(scheduler, steps[0] + number * steps[1]),
        )
        for number in _far_and_near()
    )
    if all(ahead):
        return True, False
    own, then = _settings(scheduler.state_dict()), _settings(saved)
    if not own:
        raise OptionError(
            f"{type(scheduler).__name__} has the saved rate at {samples[0]:,} counts and at {steps[0]:,}, and other "
            f"rates later on: the checkpoint does not tell whether it counts steps or samples. Go on with "
            f"{samples[1]} processes until its rate changes, or from an older checkpoint"
        )
    return own != then, own == then


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    without = _COUNTERS | {"base_lrs", "lr_lambdas", "verbose"}
    return {key: value for key, value in state.items() if key not in without}


def _far_and_near() -> Iterator[int]:
    number = 1
    while number < _FARTHEST:
        yield number
        number += 1 + number // 8


def _counts_a_step(name: str, before: int, now: int, saved_batch: int | None, batch: int | None) -> int:
    """How often a schedule of samples counts at each step of this job."""
    if saved_batch is None or batch is None:
        raise OptionError(
            f"{name} counts samples, {before} counts a step when it was saved; how many samples a step had then is not "
            "in the checkpoint. Pass it: attach(accelerator, saved_batch_size=...), the samples of one optimizer step "
            "over all ranks"
            + (
                ""
                if batch is not None
                else "; and give prepare() the data loader, which tells how many it has here"
            )
        )
    counts = Fraction(before * batch, saved_batch)
    if counts.denominator != 1:
        least = saved_batch // math.gcd(saved_batch, before)
        raise OptionError(
            f"{name} counts samples: {before} counts for the {saved_batch:,} of a step when it was saved, which is no "
            f"whole number of counts for the {batch:,} here. Take a multiple of {least:,} samples a step"
        )
    return int(counts)


def _shown(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:.6g}" for rate in rates)
