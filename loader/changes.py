"""Raises a failure of a load after the first change of any rank as a `PartialRestoreError`, on all ranks.

`partial_once_changed` goes around the whole session of a load, because a rank learns only as it leaves whether another
one had begun (`distributed.changes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..distributed.channel import Channel
from ..distributed.printable import Lines, printable
from .errors import UNPROVED, CorruptError, PartialRestoreError, RankloadError, TimestampError
from .plurals import ranks_text


class Restoring:
    """The load that `partial_once_changed` goes around."""

    def __init__(self) -> None:
        self.name = ""
        self.channel: Channel | None = None

    def begins(self, channel: Channel, name: str) -> None:
        """Says that the checkpoint `name` is restored from now on. Every rank calls it, after the same agreement."""
        channel.changes.expect()
        self.channel, self.name = channel, name


@contextmanager
def partial_once_changed() -> Iterator[Restoring]:
    """Around a whole session: raises every failure as a `PartialRestoreError` once any rank had changed anything.

    All ranks raise one then, or none does. A `TimestampError` passes as it is: it means that everything was restored.
    """
    restoring = Restoring()
    try:
        yield restoring
    except TimestampError:
        raise
    except Exception as error:
        channel = restoring.channel
        if channel is None or not channel.changes.begun:
            raise
        partial = partial_restore(error, restoring.name, channel.changes.by_rank, channel.world_size)
        if partial is error:
            raise
        raise partial from error


def partial_restore(
    error: Exception, name: str, by_rank: Mapping[int, Sequence[str]], world_size: int
) -> PartialRestoreError:
    """The `PartialRestoreError` for the failure `error` of a load of `name`, once some rank had begun its changes.

    `by_rank` says what each of `world_size` ranks had changed; of a rank that is not in it, that is not known. The same
    on every rank. An `error` of that type stays what it is, and is told what was changed.
    """
    if isinstance(error, PartialRestoreError):
        partial = error
        partial.path = error.path or name
    else:
        message = printable(f"{type(error).__name__}: {error}")
        if isinstance(error, RankloadError):
            message = error.message
        earlier = ""
        if isinstance(error, CorruptError):
            earlier = '. LoadOptions(verify="before") finds such damage before the first change'
        partial = PartialRestoreError(
            Lines.of(
                f"the restore of {printable(name)} failed after it began; changed: "
                f"{printable(_changes(by_rank, world_size))}. {message.rstrip('.')}. Take the model, optimizer and "
                f"state as undefined until a load succeeds{earlier}"
            ),
            path=name,
        )
        partial.details["cause"] = type(error).__name__
        if isinstance(error, RankloadError):
            if error.details.get(UNPROVED):
                partial.details[UNPROVED] = True
            partial.rank, partial.host = error.rank, error.host
    partial.details["changed"] = list(
        dict.fromkeys(part for parts in (partial.changed, *by_rank.values()) for part in parts)
    )
    partial.details["changed_by_rank"] = {str(rank): list(parts) for rank, parts in by_rank.items()}
    return partial


def _changes(by_rank: Mapping[int, Sequence[str]], world_size: int) -> str:
    """What was changed, for a message: by rank where that differs."""
    ranks_of: dict[str, list[int]] = {}
    for rank, parts in by_rank.items():
        ranks_of.setdefault(", ".join(parts) or "nothing", []).append(rank)
    unknown = [rank for rank in range(world_size) if rank not in by_rank]
    if unknown:
        ranks_of["not known"] = unknown
    if len(ranks_of) == 1:
        return next(iter(ranks_of))
    return "; ".join(f"{parts} ({ranks_text(ranks)})" for parts, ranks in ranks_of.items())
