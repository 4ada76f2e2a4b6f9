"""Decides which rank fetches which bytes of remote files, and where they go. Pure; rank 0 runs it for all ranks.

`plan_fetch` makes each rank's `FetchPlan` from all ranks' `FetchRequest`s, by the mode (``LoadOptions.mode``):

node     the leader of each node, its lowest rank, fetches what any of its ranks wants, once, into the node's file
direct   what one rank of a node alone wants, and can take unchanged, is fetched by that rank into its own memory; all
         else as ``node``
auto     as ``direct``, but only where at least `AUTO_FROM_BYTES` lie together, and that takes no more requests than
         ``node``; a rank that is to fill its node's cache wants none
job      as ``node``, but what several nodes want leaves the store once: one of their leaders fetches it, and the other
         leaders take it from that one
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..byte_ranges import (
    MAX_GAP_BYTES,
    RECORD_GAP_BYTES,
    ByteRange,
    coalesce,
    overlap,
    subtract,
    total_bytes,
    union,
    with_gaps,
)
from ..materialize.storages import READY_BYTES
from ..options import Mode

AUTO_FROM_BYTES = 1 << 20
"""With ``auto``, shorter ranges go into the node's file: a request costs about as much time as 256 KiB."""
AUTO_BESIDE_BYTES = 8 << 20
"""The same for ranges beside others that the node wants: there each is a request more than the node's leader needs."""
AUTO_LEFT = 4
"""With ``auto``, how many ranges of a file, shorter than `AUTO_BESIDE_BYTES`, direct ones may leave to the leader."""
ALONG_BYTES = 1 << 20
"""The longest range that comes along with direct ones around it, rather than by a request of the leader's."""
TURN_BYTES = 16 << 20
"""With ``job``, bytes that several nodes want are cut at multiples of this, so that their leaders share the work."""

Ranges = Mapping[str, Sequence[ByteRange]]
"""Ranges by file; each file under the name that is the same on all ranks."""


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """The bytes that one rank wants."""

    node: int
    wanted: Ranges
    direct: Ranges = field(default_factory=dict)
    """The part of `wanted` that goes into this rank's memory unchanged, so that it may be fetched directly."""


@dataclass(slots=True)
class FetchPlan:
    """The bytes that one rank fetches. `bring` and `take` are empty on all ranks but the leaders of nodes."""

    bring: dict[str, list[ByteRange]] = field(default_factory=dict)
    """From the store into the node's file."""
    take: dict[int, dict[str, list[ByteRange]]] = field(default_factory=dict)
    """From another node's file into this node's, by the rank that leads the other node."""
    direct: dict[str, list[ByteRange]] = field(default_factory=dict)
    """From the store into this rank's memory, while it restores."""
    along: dict[str, list[ByteRange]] = field(default_factory=dict)
    """By the same requests as `direct`, into the node's file: short ranges beside those that this rank alone wants."""
    along_bytes: dict[str, int] = field(default_factory=dict)
    """On a node's leader: how many bytes its ranks bring `along` into each file."""

    def takes_itself(self, file: str) -> list[ByteRange]:
        """What of `file` this rank fetches itself, directly or along with that."""
        return [*self.direct.get(file, ()), *self.along.get(file, ())]


def plan_fetch(requests: Sequence[FetchRequest], mode: Mode) -> list[FetchPlan]:
    """Each rank's plan, by rank, from the `requests` by rank.

    Every byte that a rank wants is in its own `direct` or `along`, or else once in the `bring` or `take` of its node's
    leader.
    """
    plans = [FetchPlan() for _ in requests]
    leaders: dict[int, int] = {}
    members: dict[int, list[int]] = {}
    for rank, request in enumerate(requests):
        leaders.setdefault(request.node, rank)
        members.setdefault(request.node, []).append(rank)
    for node, ranks in members.items():
        if mode in ("direct", "auto"):
            _plan_direct(requests, ranks, plans, auto=mode == "auto")
        lead = plans[leaders[node]]
        for file in dict.fromkeys(name for rank in ranks for name in requests[rank].wanted):
            wanted = union(*(requests[rank].wanted.get(file, ()) for rank in ranks))
            taken = [one for rank in ranks for one in plans[rank].takes_itself(file)]
            left = _left(wanted, taken)
            if mode == "auto" and _cuts_short(left, taken):
                for rank in ranks:
                    plans[rank].direct.pop(file, None)
                    plans[rank].along.pop(file, None)
                left = _left(wanted, ())
            along = [one for rank in ranks for one in plans[rank].along.get(file, ())]
            if along:
                lead.along_bytes[file] = total_bytes(along)
            if left:
                lead.bring[file] = list(left)
    if mode == "job" and len(leaders) > 1:
        _share_out(plans, sorted(leaders.values()))
    return plans


def _plan_direct(
    requests: Sequence[FetchRequest], ranks: Sequence[int], plans: Sequence[FetchPlan], *, auto: bool
) -> None:
    """Sets the `direct` of a node's `ranks`, what no other of them wants, and the `along` that one request reads too.

    With ``auto`` only where enough bytes are together (`AUTO_FROM_BYTES`, `AUTO_BESIDE_BYTES`); and where other ranks
    may have changed something by then, not for a rank that is to have all of its bytes before (`READY_BYTES`).
    """
    for rank in ranks:
        own = requests[rank]
        if auto and len(requests) > 1 and sum(map(total_bytes, own.wanted.values())) <= READY_BYTES:
            continue
        for file, ranges in own.direct.items():
            others = union(*(requests[other].wanted.get(file, ()) for other in ranks if other != rank))
            direct = subtract(ranges, others)
            private = subtract(own.wanted.get(file, ()), others)
            short = [one for one in subtract(private, direct) if one.length <= ALONG_BYTES]
            together = _holding(coalesce([*direct, *short]), direct)
            if auto:
                beside = union(others, subtract(private, [*direct, *short]))
                together = [
                    one
                    for one in together
                    if one.length >= (AUTO_BESIDE_BYTES if _is_near(one, beside) else AUTO_FROM_BYTES)
                ]
            chosen, along = overlap(direct, together), overlap(short, together)
            if chosen:
                plans[rank].direct[file] = list(chosen)
            if along:
                plans[rank].along[file] = list(along)


def _left(wanted: Sequence[ByteRange], taken: Sequence[ByteRange]) -> tuple[ByteRange, ...]:
    """What the leader fetches of `wanted`, of which ranks fetch `taken` themselves; with what belongs to records."""
    left = with_gaps(subtract(wanted, taken), RECORD_GAP_BYTES)
    return subtract(left, taken) if taken else left


def _cuts_short(left: Sequence[ByteRange], taken: Sequence[ByteRange]) -> bool:
    """Whether `taken` leaves the leader more than `AUTO_LEFT` ranges that are requests for few bytes because of it."""
    if not taken:
        return False
    beside = union(taken)
    apart = subtract(with_gaps(left, MAX_GAP_BYTES), beside)
    return sum(one.length < AUTO_BESIDE_BYTES and _is_near(one, beside) for one in apart) > AUTO_LEFT


def _holding(ranges: Sequence[ByteRange], parts: Sequence[ByteRange]) -> list[ByteRange]:
    """Those of `ranges` that hold some of `parts`; both are in order."""
    starts = [one.start for one in parts]
    return [one for one in ranges if bisect_left(starts, one.start) < bisect_left(starts, one.stop)]


def _is_near(one: ByteRange, others: Sequence[ByteRange]) -> bool:
    """Whether one of `others`, which are in order, is so close that one request might read both."""
    at = bisect_right(others, one.start - MAX_GAP_BYTES, key=lambda other: other.stop)
    return at < len(others) and others[at].start < one.stop + MAX_GAP_BYTES


def _share_out(plans: Sequence[FetchPlan], leaders: Sequence[int]) -> None:
    """Leaves each byte in the `bring` of the leader with the least to fetch, and moves it to `take` in the others."""
    load = dict.fromkeys(leaders, 0)
    for file in dict.fromkeys(name for rank in leaders for name in plans[rank].bring):
        by_rank = {rank: plans[rank].bring.pop(file, []) for rank in leaders}
        starts = {rank: [one.start for one in ranges] for rank, ranges in by_rank.items()}
        cuts = {edge for ranges in by_rank.values() for one in ranges for edge in one}
        low, high = min(cuts), max(cuts)
        cuts.update(range(low - low % TURN_BYTES + TURN_BYTES, high, TURN_BYTES))
        turns: dict[tuple[int, ...], tuple[int, int, int]] = {}
        for start, stop in pairwise(sorted(cuts)):
            wanting = []
            for rank, ranges in by_rank.items():
                at = bisect_right(starts[rank], start) - 1
                if at >= 0 and start < ranges[at].stop:
                    wanting.append(rank)
            if not wanting:
                continue
            # What the same nodes want close by is brought by the same one, so that it is one request.
            turn, ended, bringer = turns.get(tuple(wanting), (-1, 0, 0))
            if turn != start // TURN_BYTES or start - ended > MAX_GAP_BYTES:
                bringer = min(wanting, key=lambda rank: load[rank])
            turns[tuple(wanting)] = (start // TURN_BYTES, stop, bringer)
            load[bringer] += stop - start
            for rank in wanting:
                plan = plans[rank]
                into = plan.bring if rank == bringer else plan.take.setdefault(bringer, {})
                into.setdefault(file, []).append(ByteRange(start, stop))
    for rank in leaders:
        for own in (plans[rank].bring, *plans[rank].take.values()):
            for file, ranges in own.items():
                own[file] = list(union(ranges))
