"""Says which rank of a job failed first, and why, from what ranks recorded and how their processes ended. Pure.

A rank that another one's failure ends fails too: its connection breaks, or it is told by rankload (`PeerError`), or the
launcher ends it. So failures are ordered by what they are, then by time:

1. exceptions of the rank's own; fatal signals; processes that ended without a word
2. exceptions that tell of another rank (`RankRecord.follows`); SIGABRT; the watchdog's exit code
3. SIGTERM and SIGINT, by which launchers end ranks

The time of a process that a signal killed is the last at which it was seen alive. It comes before what others notice of
it. Where it is not known how a process ended, its launcher may have ended it: its time is when it was first seen gone.
Not guaranteed: the order of failures within a tenth of a second; anything of nodes that do not see the records' folder.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..distributed.liveness import ProcessIdentity
from ..distributed.watchdog import EXIT_CODE
from ..loader.plurals import counted
from .rank_records import RankRecord

_OWN, _FOLLOWS, _ENDED = 0, 1, 2
_BY_LAUNCHERS = frozenset({signal.SIGTERM, signal.SIGINT})
_GONE = "its process is gone"
"""What a watcher says who came too late to see how a process ended."""
_SHOWN = 3
"""Failures after the first one that are shown."""


@dataclass(frozen=True)
class Death:
    """How a process ended that its watcher saw: when it was seen alive for the last time, first gone, and in words."""

    alive_s: float
    gone_s: float
    how: str


@dataclass(frozen=True)
class Failure:
    """That one rank failed."""

    rank: int
    host: str
    pid: int | None
    """None where another rank tells of it."""
    at_s: float
    """Seconds since the epoch."""
    after_s: float
    """Since its process began."""
    reason: str
    where: str | None
    weight: int
    """Of the module's three kinds, from 0."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a job ended."""

    launcher: str
    exit_code: int
    """The launcher's; 128 and the signal's number where one ended it."""
    stopped_by: str | None
    """The signal that was passed on, and ended the job."""
    ranks: int
    """How many recorded their start, in the last round."""
    failures: tuple[Failure, ...]
    """Of the last round, the first one first; none where the job ended well, or by the signal."""
    restarts: tuple[Failure, ...]
    """What ended each of the rounds before, by the first failure of each."""

    def as_fields(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {
            "launcher": self.launcher,
            "exit_code": self.exit_code,
            "stopped_by": self.stopped_by,
            "ranks": self.ranks,
            "failures": [_fields(one) for one in self.failures],
            "restarts": [_fields(one) for one in self.restarts],
        }

    def lines(self) -> list[str]:
        """The block for people; nothing for a job that ended well at once."""
        said: list[str] = []
        for number, one in enumerate(self.restarts, 1):
            said.append(f"restart {number}: {_headline(one)}")
        if self.failures:
            first, *others = self.failures
            said.append(_headline(first))
            if first.where:
                said.append(f"  at {first.where}")
            said += [f"  after it {_headline(one, short=True)}" for one in others[:_SHOWN]]
            if len(others) > _SHOWN:
                said.append(f"  after it {counted(len(others) - _SHOWN, 'more rank')}")
        elif self.exit_code and not self.stopped_by:
            said.append("no rank recorded a failure" if self.ranks else "no rank of this node was started")
        if self.stopped_by:
            said.append(f"{self.stopped_by} was passed to {self.launcher}")
        if said or self.exit_code:
            said.append(f"{self.launcher} ended with exit code {self.exit_code}")
        return [f"rankload run: {line}" for line in said]


def rounds(records: Iterable[RankRecord]) -> list[list[RankRecord]]:
    """`records` by restart: a process belongs to the n-th round where it is the n-th of its local rank."""
    found: list[list[RankRecord]] = []
    begun: dict[int, int] = {}
    for record in records:
        number = begun[record.local_rank] = begun.get(record.local_rank, -1) + 1
        if number == len(found):
            found.append([])
        found[number].append(record)
    return found


def failures_of(
    records: Sequence[RankRecord], deaths: Mapping[ProcessIdentity, Death], exit_codes: Mapping[int, int]
) -> list[Failure]:
    """The failures of one round, the first one first.

    `exit_codes`, as launchers know them (negative for a signal), are by process id.
    """
    found = [
        failure
        for record in records
        if (failure := _failure(record, deaths.get(record.process), exit_codes.get(record.process.pid)))
    ]
    found.sort(key=lambda one: (one.weight, one.at_s))
    if not found or found[0].weight == _OWN:
        return found
    told = _told_by_others(records, {one.rank for one in found})
    return [told, *found] if told is not None else found


def _failure(record: RankRecord, death: Death | None, exit_code: int | None) -> Failure | None:
    if record.error is not None:
        at_s = record.ended_s or record.began_s
        others = record.met_by is not None and record.met_by != record.rank
        weight = _FOLLOWS if record.follows or others else _OWN
        if record.error.startswith("KeyboardInterrupt"):
            weight = _ENDED
        return _made(record, at_s, record.error, weight)
    at_s = death.alive_s if death is not None else record.began_s
    if exit_code:
        if exit_code < 0:
            return _made(record, at_s, f"killed by {_signal_name(-exit_code)}", _weight_of(-exit_code))
        if record.ended_s is not None:
            return _made(
                record, record.ended_s, f"its script ended well, the process with exit code {exit_code}", _OWN
            )
        if exit_code == EXIT_CODE:
            reason = f"ended with exit code {exit_code}: it waited in a collective for a rank that failed"
            return _made(record, at_s, reason, _FOLLOWS)
        return _made(record, at_s, f"ended with exit code {exit_code}, without an exception", _OWN)
    if record.ended_s is not None or death is None or exit_code == 0 or death.how == "its process has ended":
        return None
    if death.how == _GONE:
        return _made(record, death.gone_s, "its process ended without an exception: killed?", _OWN)
    weight = _OWN
    for number in signal.Signals:
        if death.how == f"killed by {number.name}":
            weight = _weight_of(number)
    if death.how == f"exited with status {EXIT_CODE}":
        weight = _FOLLOWS
    return _made(record, at_s, death.how, weight)


def _weight_of(number: int) -> int:
    if number in _BY_LAUNCHERS:
        return _ENDED
    return _FOLLOWS if number == signal.SIGABRT else _OWN


def _told_by_others(records: Sequence[RankRecord], known: set[int]) -> Failure | None:
    """The failure of a rank that left no record here, by what the first other rank says of it."""
    for one in sorted(records, key=lambda one: one.ended_s or 0):
        if one.met_by is not None and one.met_by not in known:
            at_s = one.ended_s or one.began_s
            reason = f"as rank {one.rank} says: {one.error}"
            host = one.met_on or "unknown"
            return Failure(one.met_by, host, None, at_s, at_s - one.began_s, reason, None, _FOLLOWS)
    return None


def _made(record: RankRecord, at_s: float, reason: str, weight: int) -> Failure:
    return Failure(
        record.rank,
        record.process.host,
        record.process.pid,
        at_s,
        max(at_s - record.began_s, 0.0),
        reason,
        record.where,
        weight,
    )


def _headline(one: Failure, *, short: bool = False) -> str:
    reason = one.reason
    if short:
        reason = reason.partition("\n")[0]
        reason = reason if len(reason) <= 160 else f"{reason[:160]} ..."
        return f"rank {one.rank}: {reason}"
    process = "" if one.pid is None else f", pid {one.pid}"
    reason = reason.replace("\n", "\n    ")
    return f"rank {one.rank} failed first (host {one.host}{process}, after {one.after_s:.1f} s): {reason}"


def _fields(one: Failure) -> dict[str, Any]:
    fields = asdict(one)
    del fields["weight"]
    return fields


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
