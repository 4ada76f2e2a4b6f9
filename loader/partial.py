"""What fails after the first change is told as such, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .errors import PartialRestoreError, RankloadError, TimestampError


@contextmanager
def after_first_change(name: str, changed: Sequence[str] | None = None) -> Iterator[None]:
    """Within the block, every failure is a `PartialRestoreError` of the checkpoint `name`.

    `changed` lists what this rank has changed so far; it may grow while the block runs. None where a failure is
    heard of from other ranks: its message is theirs, and says nothing that is this rank's alone. A
    `TimestampError`, which says by itself that everything was restored, passes.
    """
    try:
        yield
    except TimestampError:
        raise
    except PartialRestoreError as error:
        error.path = error.path or name
        if changed:
            error.details["changed"] = list(dict.fromkeys([*error.changed, *changed]))
        raise
    except Exception as error:
        message = error.message if isinstance(error, RankloadError) else f"{type(error).__name__}: {error}"
        what = ""
        if changed is not None:
            what = f"; changed: {', '.join(changed) or 'nothing on this rank, but others may have begun'}"
        partial = PartialRestoreError(
            f"the restore of {name} failed after it began{what}. {message} "
            "Take the model, optimizer and state as undefined until a load succeeds",
            path=name,
            changed=changed or (),
        )
        if isinstance(error, RankloadError):
            partial.rank, partial.host = error.rank, error.host
        raise partial from error


@contextmanager
def partial_once_begun() -> Iterator[list[str]]:
    """Around a whole session: yields a list, to which the checkpoint's name is added when the first change is near.

    From then on what fails is told as by `after_first_change`, also what this rank hears of another one's end.
    """
    begun: list[str] = []
    try:
        yield begun
    except Exception as error:
        if not begun:
            raise
        with after_first_change(begun[0]):
            raise error
