"""Defines every error that a load or a save can raise.

RankloadError                  rank, host, path
├── TemplateError              the path template names a variable that does not exist
├── NotFoundError              a file, object, tag or folder is not there
├── AccessError                it is there, but cannot be read, or this node cannot keep it; it may not be written
├── CorruptError               truncated, or its bytes do not match its checksums or its own index
├── UnsafeError                the file asks for code to be run, or an archive for a path outside its folder
├── FormatError                readable, but of a kind or layout that is not known, or not supported
├── LayoutError                saved under a parallel layout that this job cannot take
├── MismatchError              names, shapes or dtypes differ from the model's or the optimizer's
│   └── MissingFrozenError     all that is missing are parameters that this job does not train
├── OptionError                an argument or option is unknown, or differs between ranks (also a ValueError)
├── PartialRestoreError        failed after the first change; ``changed`` lists what was changed
│   └── AlgorithmError         an algorithm that the checkpoint needs failed to apply (also a ValueError)
├── InternalError              a mistake in rankload itself
├── TimestampError             the ranks' timestamps differ after the restore (also a RuntimeError)
├── PeerError, StalledError    see ``rankload.distributed.errors``
└── TopologyError
"""

from __future__ import annotations

from collections.abc import Sequence

from ..distributed.errors import PeerError, RankloadError, StalledError, TopologyError

__all__ = [
    "AccessError",
    "AlgorithmError",
    "CorruptError",
    "FormatError",
    "InternalError",
    "LayoutError",
    "MismatchError",
    "MissingFrozenError",
    "NotFoundError",
    "OptionError",
    "PartialRestoreError",
    "PeerError",
    "RankloadError",
    "StalledError",
    "TemplateError",
    "TimestampError",
    "TopologyError",
    "UnsafeError",
]


class TemplateError(RankloadError):
    """The path template names an unknown variable, or is malformed."""


class NotFoundError(RankloadError):
    """A file, object, tag or folder that the load needs is not there."""


class AccessError(RankloadError):
    """The object is there (or may be), but the store refuses or fails to return it, or there is no room for it here.

    In a save: the store or this user's permissions refuse what is written, or there is no room for it.
    """


class CorruptError(RankloadError):
    """Truncated, or the bytes do not match their checksum or the file's own index."""


def fetched_twice(error: CorruptError) -> CorruptError:
    """`error`, for what was fetched a second time and is still damaged: says so in its message."""
    if "fetched_twice" not in error.details:
        error.details["fetched_twice"] = True
        error.message = (
            f"{error.message.rstrip('. ')}. It was fetched twice, so that the stored file itself is damaged: take "
            "another copy of it, or another checkpoint."
        )
    return error


UNPROVED = "unproved"
"""Among an error's ``details``: it may come of an index that no checksum proves, which another load fetches again."""


class UnsafeError(RankloadError):
    """Reading on would run code, write outside a folder, or exceed a bound of memory or work (``docs/safety.md``)."""


class FormatError(RankloadError):
    """A kind or layout of checkpoint that is not known, or known and not supported."""


class LayoutError(RankloadError):
    """Saved under a parallel layout, or with optimizer state, that this job cannot take."""


class MismatchError(RankloadError):
    """Names, shapes or dtypes in the checkpoint differ from the model's or the optimizer's."""


class MissingFrozenError(MismatchError):
    """The checkpoint has all but frozen parameters (``requires_grad=False``): it was saved without them."""


class OptionError(RankloadError, ValueError):
    """An argument or option is unknown, malformed, or differs between ranks."""


class PartialRestoreError(RankloadError):
    """The restore failed after the first change of some rank; every rank raises it then.

    ``changed`` lists what had been changed on any rank, ``changed_by_rank`` on which: those parts of the model,
    optimizer and state must be taken as undefined until a load succeeds.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        host: str | None = None,
        path: str | None = None,
        changed: Sequence[str] = (),
    ) -> None:
        super().__init__(message, rank=rank, host=host, path=path)
        self.details["changed"] = list(changed)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the parts that were changed before the failure, on any rank."""
        return tuple(self.details.get("changed", ()))

    @property
    def changed_by_rank(self) -> dict[int, tuple[str, ...]]:
        """The same of each rank; one that did not tell, because it was killed or stopped, is not in it."""
        by_rank = self.details.get("changed_by_rank", {})
        return {int(rank): tuple(parts) for rank, parts in by_rank.items()}


class AlgorithmError(PartialRestoreError, ValueError):
    """An algorithm that the checkpoint needs could not be applied to the model."""


class InternalError(RankloadError):
    """A mistake in rankload itself: a plan that does not hold. Please report it."""


class TimestampError(RankloadError, RuntimeError):
    """The ranks hold different timestamps after the restore: they loaded different checkpoints."""
