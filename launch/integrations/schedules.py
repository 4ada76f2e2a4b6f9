"""Lets a schedule that counts several times a step go on where another number of processes steps it.

Accelerate steps a scheduler once for each process: after 4 steps of 2 processes it counts 8. What a count means is in
the job's code alone, so the learning rate that was saved with the count is the witness:

    the job's schedule has it at the count times new / old    it is a schedule of steps: the count is scaled
    the job's schedule has it at the count itself             it is one of samples: the count stays, and each step
                                                              counts as its samples did when the checkpoint was saved
    at neither                                                another schedule: refused

That takes a scheduler whose rates are a function of its count: LambdaLR, as all of transformers' schedules but two
are, those of torch with a closed form (StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR, PolynomialLR,
CosineAnnealingLR), CosineAnnealingWarmRestarts, CyclicLR, and a SequentialLR of these. Others are refused by name:
ReduceLROnPlateau follows a metric, and MultiplicativeLR and ChainedScheduler make each rate from the one before.

OneCycleLR is one whose count cannot be scaled: its peak and its end are one count before a share of ``total_steps``. So
``total_steps`` is the witness: where it is new / old times the saved one, it is of steps, and goes on as it was saved,
with as many counts a step as it had; where it is the saved one, it is of samples.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..loader import OptionError

STEPS = "rankload_counts_a_step"
"""Kept in a scheduler's own state where a step counts otherwise than once for each process."""
_COUNTERS = frozenset(
    {
        "last_epoch",
        "_step_count",
        "_last_lr",
        "_get_lr_called_within_step",
        "_is_initial",
        "T_cur",
        "T_i",
        STEPS,
    }
)
_OF_TORCH = "torch.optim.lr_scheduler"
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
    if name == "OneCycleLR":
        return _one_cycle(scheduler, saved, (before, count, rates), now, saved_batch, batch)
    scaled = count * now // before if count * now % before == 0 else None
    by_steps = scaled is not None and _alike(_rates_at(scheduler, scaled), rates)
    by_samples = _alike(_rates_at(scheduler, count), rates)
    if by_steps and by_samples and scaled is not None:
        by_steps, by_samples = _which(scheduler, saved, (count, before), (scaled, now))
    if by_steps and scaled is not None:
        return Resumed(_state_at(scheduler, scaled, rates), now)
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


def _one_cycle(
    scheduler: Any,
    saved: Mapping[str, Any],
    then: tuple[int, int, list[float]],
    now: int,
    saved_batch: int | None,
    batch: int | None,
) -> Resumed:
    """How a OneCycleLR goes on; `then` is its counts a step, its count and its rates, when it was saved."""
    before, count, rates = then
    total, saved_total = scheduler.total_steps, int(saved["total_steps"])
    kept = {"total_steps": total, "_schedule_phases": scheduler._schedule_phases}
    shape = _shape(kept)
    scheduler.__dict__.update({key: saved[key] for key in kept})
    try:
        found = _rates_at(scheduler, count)
    finally:
        scheduler.__dict__.update(kept)
    if not _alike(found, rates) or not _alike(shape, _shape(saved)):
        raise OptionError(
            f"OneCycleLR had the rate {_shown(rates)} at count {count:,} of {saved_total:,}, and with this job's "
            f"settings it is {_shown(found)} there: make the schedule that the saving job had"
        )
    if total * before == saved_total * now:
        return Resumed(None, before)  # of steps: as it was saved
    if total == saved_total:
        return Resumed(None, _counts_a_step("OneCycleLR", before, now, saved_batch, batch))
    of_steps = saved_total * now / before
    raise OptionError(
        f"OneCycleLR was made for {saved_total:,} counts, {before} a step, and is made for {total:,} here. For as many "
        f"steps as then make it for {of_steps:,g} (steps x {now}), for as many samples for {saved_total:,}"
    )


def _shape(settings: Mapping[str, Any]) -> list[float]:
    """The shares of its total at which a OneCycleLR's phases end."""
    phases, total = settings["_schedule_phases"], settings["total_steps"]
    shifted = (1, 2)[: len(phases) - 1]
    return [float((phase["end_step"] + shift) / total) for phase, shift in zip(phases, shifted, strict=False)]


def _is_function_of_count(scheduler: Any) -> bool:
    from torch.optim import lr_scheduler

    if isinstance(scheduler, lr_scheduler.SequentialLR):
        return all(
            _is_function_of_count(one)
            and not isinstance(one, lr_scheduler.SequentialLR | lr_scheduler.OneCycleLR)
            for one in scheduler._schedulers
        )
    own = getattr(type(scheduler), "get_lr", None)
    if own is lr_scheduler.LambdaLR.get_lr:
        return True
    known = (lr_scheduler.CosineAnnealingWarmRestarts, lr_scheduler.CyclicLR, lr_scheduler.OneCycleLR)
    return getattr(own, "__module__", None) == _OF_TORCH and (
        hasattr(scheduler, "_get_closed_form_lr") or isinstance(scheduler, known)
    )


def _rates_at(scheduler: Any, count: int) -> list[float]:
    """The rates of `scheduler`, by its own settings, at `count`."""
    if hasattr(scheduler, "_schedulers"):
        at = bisect.bisect_right(scheduler._milestones, count)
        return _rates_at(scheduler._schedulers[at], count - _begin(scheduler, at))
    if hasattr(scheduler, "lr_lambdas"):
        return [
            float(base * one(count))
            for base, one in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
    own, groups = scheduler.__dict__, scheduler.optimizer.param_groups
    kept, kept_groups = dict(own), [dict(group) for group in groups]
    own.update({"last_epoch": count, "_get_lr_called_within_step": True, **_cycle(scheduler, count)})
    try:
        closed = getattr(scheduler, "_get_closed_form_lr", scheduler.get_lr)
        return [float(rate) for rate in closed()]
    finally:
        own.clear()
        own.update(kept)
        for group, before in zip(groups, kept_groups, strict=True):
            group.update(before)  # some set the momentum too


def _begin(scheduler: Any, number: int) -> int:
    """The count of a SequentialLR at which its scheduler `number` begins."""
    return int(scheduler._milestones[number - 1]) if number else 0


def _cycle(scheduler: Any, count: int) -> dict[str, int]:
    """Where in which of its cycles a CosineAnnealingWarmRestarts is; nothing of others."""
    if not hasattr(scheduler, "T_mult"):
        return {}
    length = int(scheduler.T_0)
    if scheduler.T_mult == 1:
        return {"T_cur": count % length, "T_i": length}
    while count >= length:
        count -= length
        length *= scheduler.T_mult
    return {"T_cur": count, "T_i": length}


def _state_at(scheduler: Any, count: int, rates: Sequence[float]) -> dict[str, Any]:
    """The state of `scheduler`, by its own settings, at `count`."""
    own = {key: value for key, value in scheduler.state_dict().items() if key != STEPS}
    own |= {"last_epoch": count, "_last_lr": list(rates), **_cycle(scheduler, count)}
    if "_step_count" in own:
        own["_step_count"] = count + 1
    if "_schedulers" in own:
        ends = [*scheduler._milestones, count + 1]
        own["_schedulers"] = [
            state
            if count < _begin(scheduler, number)
            else _state_of(one, scheduler, number, min(count, ends[number] - 1))
            for number, (one, state) in enumerate(zip(scheduler._schedulers, own["_schedulers"], strict=True))
        ]
    return own


def _state_of(one: Any, whole: Any, number: int, count: int) -> dict[str, Any]:
    """The state of `one`, number `number` of a SequentialLR, at `count` of that."""
    count -= _begin(whole, number)
    return _state_at(one, count, _rates_at(one, count))


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
    without = _COUNTERS | {"base_lrs", "lr_lambdas", "verbose", "_schedulers"}
    inner = [_settings(one) for one in state.get("_schedulers", ())]
    own = {key: value for key, value in state.items() if key not in without}
    return {**own, "_schedulers": inner} if any(inner) else own


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
