"""Warns where the batch of one step is another than when a checkpoint was saved. Pure."""

from __future__ import annotations

from ..distributed.printable import warn


def warn_of_batch(
    saved: int | None, now: int | None, *, counted_by: str, remedy: str, unit: str = "samples"
) -> None:
    """Warns where the samples of one step over all ranks differ, with both numbers; not where one is not known.

    Args:
        saved: when the checkpoint was saved.
        now: in this job.
        counted_by: what counts in steps of this batch, for the message: ``Trainer``.
        remedy: what to do about it, as a sentence without its end.
        unit: what was counted.
    """
    if saved is None or now is None or saved == now:
        return
    warn(
        f"a step was {saved:,} {unit} when the checkpoint was saved, and is {now:,} here: {counted_by} counts in "
        f"steps, so that samples are {'repeated' if now < saved else 'left out'}, and schedules go on at another pace. "
        f"{remedy}",
        stacklevel=3,
    )


def warn_of_unknown_batch(saved: int | None, now: int, *, counted_by: str, remedy: str) -> None:
    """Warns where the batch of the saving job is not known, and another number of ranks makes another one likely.

    Args:
        saved: ranks that saved the checkpoint; None where it does not tell them either.
        now: ranks of this job.
        counted_by, remedy: as `warn_of_batch` takes them.
    """
    if saved is None or saved == now:
        return
    warn(
        f"the checkpoint was saved by {saved:,} ranks, and here are {now:,}; it does not tell how many samples a step "
        f"was: {counted_by} counts in steps, so that with another number samples are repeated or left out, and "
        f"schedules go on at another pace. {remedy}",
        stacklevel=3,
    )
