"""The root of the error tree, the errors of coordination itself, and how an error travels between ranks.

    RankloadError
    ├── TopologyError       the launcher's variables are missing or contradict each other
    ├── PeerError           another rank died, was interrupted, or failed outside rankload
    ├── StalledError        nothing moved for ``stall_timeout_s``
    └── ...                 checkpoint errors: see ``rankload.loader.errors``

An error that one rank meets is raised on every rank, with the same type and message; `to_record` and
`from_record` carry it between them as JSON. No error is ever pickled.
"""

from __future__ import annotations

import json
import socket
from typing import Any

from .printable import Lines, printable


class RankloadError(Exception):
    """Base of everything that rankload raises on purpose.

    Attributes:
        rank: global rank that met the error first; None while it is not known.
        host: host name of that rank; None while it is not known.
        path: the file, URI or folder concerned; None where there is none.
        details: what an error says beyond its message, as JSON types; empty for most.
    """

    def __init__(
        self, message: str, *, rank: int | None = None, host: str | None = None, path: str | None = None
    ) -> None:
        self.message = message
        super().__init__(self.message)
        self.rank = rank
        self.host = host
        self.path = path
        self.details: dict[str, Any] = {}

    @property
    def message(self) -> str:
        """What went wrong, without the rank that met it; it is made `printable` when it is set."""
        return self._message

    @message.setter
    def message(self, text: str) -> None:
        self._message = printable(text)

    def __str__(self) -> str:
        where = [] if self.rank is None else [f"rank {self.rank}"]
        if self.host is not None:
            where.append(f"host {printable(self.host)}")
        return f"{self.message} [met by {', '.join(where)}]" if where else self.message

    def located(self, rank: int, host: str | None = None) -> RankloadError:
        """Fills in which rank met the error, where that is not set yet; returns the same error."""
        if self.rank is None:
            self.rank = rank
            self.host = host if host is not None else socket.gethostname()
        return self


class TopologyError(RankloadError):
    """Rank, world size or node cannot be determined, or two sources contradict each other."""


class PeerError(RankloadError):
    """Another rank died, was interrupted, or raised something that is not rankload's."""


class StalledError(RankloadError):
    """Nothing that this rank waits for made progress for ``stall_timeout_s``."""


def to_record(error: RankloadError) -> str:
    """`error` as JSON: its type's name, message, rank, host, path and details."""
    return json.dumps(
        {
            "type": type(error).__name__,
            "message": error.message,
            "rank": error.rank,
            "host": error.host,
            "path": error.path,
            "details": error.details,
        }
    )


def from_record(record: str) -> RankloadError:
    """The error that `to_record` wrote, of the same type where this process knows it."""
    fields = json.loads(record)
    kind = _known_types().get(fields["type"], RankloadError)
    error = kind(Lines.of(fields["message"]), rank=fields["rank"], host=fields["host"], path=fields["path"])
    error.details.update(fields["details"])
    return error


def _known_types() -> dict[str, type[RankloadError]]:
    known: dict[str, type[RankloadError]] = {}
    pending: list[type[RankloadError]] = [RankloadError]
    while pending:
        kind = pending.pop()
        known[kind.__name__] = kind
        pending.extend(kind.__subclasses__())
    return known
