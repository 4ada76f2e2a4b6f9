"""Says what was found of a run's checkpoints: which are whole, and why others are passed over. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..redaction import redact_path


@dataclass(frozen=True)
class FoundCheckpoint:
    """What was found where a run keeps its checkpoints.

    Attributes:
        path: what to pass to `load`.
        step: that the checkpoint itself tells, else its name; None where neither does.
        kind: ``deepspeed``, ``dcp``, ``monolithic`` and so on; None where that was not found out.
        world_size: ranks that saved it; None where it does not say.
        proven: whether all of its files are there and whole; None where it was not examined, because a newer one is
            proven.
        reason: why it is passed over; empty for one that is proven or was not examined.
        pointer: the name of what points at it (``latest``, a link); empty where nothing does.
        missing: the files that are missing or short, where nothing else is wrong with it.
        shown: `path` without secrets, for messages.
    """

    path: str = field(repr=False)  # may have a signature or a password in it
    step: int | None
    kind: str | None = None
    world_size: int | None = None
    proven: bool | None = None
    reason: str = ""
    pointer: str = ""
    missing: tuple[str, ...] = ()
    shown: str = ""

    def __str__(self) -> str:
        state = {True: "proven", False: f"passed over: {self.reason}", None: "not examined"}[self.proven]
        step = "" if self.step is None else f" (step {self.step:,})"
        named = f", named by {self.pointer}" if self.pointer else ""
        return f"{self.shown or redact_path(self.path)}{step}{named}: {state}"
