"""Decides which rank fetches which bytes of remote files, and where they go. Pure; rank 0 runs it for all ranks.

`plan_fetch` makes each rank's `FetchPlan` from all ranks' `FetchRequest`s, by the mode (``LoadOptions.mode``):

node     the leader of each node, its lowest rank, fetches what any of its ranks wants, once, into the node's file
direct   what one rank of a node alone wants, and can take unchanged, is fetched by that rank into its own memory; all
         else as ``node``
auto     as ``direct``, but only where at least `AUTO_FROM_BYTES` lie together; a rank that is to fill its node's cache
         wants none
job      as ``node``, but what several nodes want leaves the store once: one of their leaders fetches it, and the other
         leaders take it from that one
"""

from __future__ import annotations

from bisect import bisect_right
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
    union,
    with_gaps,
)
from ..options import Mode

AUTO_FROM_BYTES = 1 << 20
"""With ``auto``, shorter ranges go into the node's file: a request costs about as much time as 256 KiB."""
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


def plan_fetch(requests: Sequence[FetchRequest], mode: Mode) -> list[FetchPlan]:
    """Each rank's plan, by rank, from the `requests` by rank.

    Every byte that a rank wants is in its own `direct`, or else once in the `bring` or `take` of its node's leader.
    """
    plans = [FetchPlan() for _ in requests]
    leaders: dict[int, int] = {}
    members: dict[int, list[int]] = {}
    for rank, request in enumerate(requests):
        leaders.setdefault(request.node, rank)
        members.setdefault(request.node, []).append(rank)
    for node, ranks in members.items():
        if mode in ("direct", "auto"):
            _plan_direct(requests, ranks, plans, AUTO_FROM_BYTES if mode == "auto" else 1)
        bring = plans[leaders[node]].bring
        for file in dict.fromkeys(name for rank in ranks for name in requests[rank].wanted):
            wanted = union(*(requests[rank].wanted.get(file, ()) for rank in ranks))
            taken_direct = union(*(plans[rank].direct.get(file, ()) for rank in ranks))
            left = with_gaps(subtract(wanted, taken_direct), RECORD_GAP_BYTES)
            if taken_direct:
                left = subtract(left, taken_direct)
            if left:
                bring[file] = list(left)
    if mode == "job" and len(leaders) > 1:
        _share_out(plans, sorted(leaders.values()))
    return plans


def _plan_direct(
    requests: Sequence[FetchRequest], ranks: Sequence[int], plans: Sequence[FetchPlan], least: int
) -> None:
    """Sets the `direct` of a node's `ranks`: what no other of them wants, where at least `least` bytes are together.

    Together are ranges that one request reads (`coalesce`).
    """
    for rank in ranks:
        for file, direct in requests[rank].direct.items():
            others = [requests[other].wanted.get(file, ()) for other in ranks if other != rank]
            private = subtract(direct, union(*others))
            together = [one for one in coalesce(private) if one.length >= least]
            chosen = overlap(private, together)
            if chosen:
                plans[rank].direct[file] = list(chosen)


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
