"""Warns where the batch of one step is another than when a checkpoint was saved. Pure."""

from __future__ import annotations

import warnings


def warn_of_batch(saved: int | None, now: int | None, *, counted_by: str, remedy: str) -> None:
    """Warns where the samples of one step over all ranks differ, with both numbers; not where one is not known.

    Args:
        saved: when the checkpoint was saved.
        now: in this job.
        counted_by: what counts in steps of this batch, for the message: ``Trainer``.
        remedy: what to do about it, as a sentence without its end.
    """
    if saved is None or now is None or saved == now:
        return
    warnings.warn(
        f"a step was {saved:,} samples when the checkpoint was saved, and is {now:,} here: {counted_by} counts in "
        f"steps, so that samples are {'repeated' if now < saved else 'left out'}, and schedules go on at another pace. "
        f"{remedy}",
        stacklevel=3,
    )
