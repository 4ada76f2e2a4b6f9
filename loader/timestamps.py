"""Whether every rank restored the same moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..distributed.channel import Channel
from .errors import TimestampError


def agree_on_timestamp(state: Any, channel: Channel) -> None:
    """Raises `TimestampError` on every rank unless all restored the same batch. Every rank must call."""

    def compare(batches: list[Any]) -> None:
        known = [batch for batch in batches if batch is not None]
        if known and (min(known) != max(known) or len(known) != len(batches)):
            told = ", ".join(f"rank {rank}: {batch}" for rank, batch in list(enumerate(batches))[:16])
            raise TimestampError(
                f"timestamp.batch differs between ranks after the restore ({told}): they did not load the same "
                "checkpoint"
            )

    channel.decide("timestamp", batch_of(state), compare)


def batch_of(state: Any) -> int | None:
    """A state's batch count: Composer's ``timestamp.batch.value``, or a plain dict's ``batch``."""
    timestamp = getattr(state, "timestamp", None)
    batch = timestamp.get("batch") if isinstance(timestamp, Mapping) else getattr(timestamp, "batch", None)
    batch = getattr(batch, "value", batch)
    return int(batch) if isinstance(batch, int) else None
