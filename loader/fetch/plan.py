"""Who fetches which bytes of remote files, and where they go: dealt from what all ranks want, by rank 0. Pure.

node     every wanted byte comes to each node once, into the node's file
direct   bytes that one rank of its node wants, and can take as they are, come straight into that rank's memory
auto     the same, where the range is long enough to be worth a request of its own
job      as ``node``, but bytes that several nodes want leave the store once: one node's first rank fetches them,
         the others' take them from it
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..byte_ranges import ByteRange, subtract, union
from ..options import Mode

AUTO_FROM_BYTES = 1 << 20
"""Shorter private ranges come with the node's with ``auto``: a request costs about as much as 256 KiB do."""
TURN_BYTES = 16 << 20
"""Nodes that want the same bytes fetch them for each other in turns of this many."""

Ranges = Mapping[str, Sequence[ByteRange]]
"""By the name that a file has in the whole job."""


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """What one rank wants."""

    node: int
    wanted: Ranges
    direct: Ranges = field(default_factory=dict)
    """Of `wanted`, what it can take into its own memory as it is."""


@dataclass(slots=True)
class FetchPlan:
    """What one rank is to do. All but `straight` is empty on ranks that do not fetch for their node."""

    bring: dict[str, list[ByteRange]] = field(default_factory=dict)
    """From the store into the node's file."""
    take: dict[int, dict[str, list[ByteRange]]] = field(default_factory=dict)
    """From the node's file of another rank, by that rank, into the own node's."""
    direct: dict[str, list[ByteRange]] = field(default_factory=dict)
    """From the store into this rank's memory, as it restores."""


def plan_fetch(requests: Sequence[FetchRequest], mode: Mode) -> list[FetchPlan]:
    """Each rank's errand, by rank. The first rank of each node fetches for it."""
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
            left = subtract(wanted, taken_direct)
            if left:
                bring[file] = list(left)
    if mode == "job" and len(leaders) > 1:
        _share_out(plans, sorted(leaders.values()))
    return plans


def _plan_direct(
    requests: Sequence[FetchRequest], ranks: Sequence[int], plans: Sequence[FetchPlan], least: int
) -> None:
    for rank in ranks:
        for file, direct in requests[rank].direct.items():
            others = [requests[other].wanted.get(file, ()) for other in ranks if other != rank]
            private = [one for one in subtract(direct, union(*others)) if one.length >= least]
            if private:
                plans[rank].direct[file] = private


def _share_out(plans: Sequence[FetchPlan], leaders: Sequence[int]) -> None:
    """Leaves each byte in one leader's `bring`, and puts it into the others' `take`."""
    load = dict.fromkeys(leaders, 0)
    for file in dict.fromkeys(name for rank in leaders for name in plans[rank].bring):
        by_rank = {rank: plans[rank].bring.pop(file, []) for rank in leaders}
        starts = {rank: [one.start for one in ranges] for rank, ranges in by_rank.items()}
        cuts = {edge for ranges in by_rank.values() for one in ranges for edge in one}
        low, high = min(cuts), max(cuts)
        cuts.update(range(low - low % TURN_BYTES + TURN_BYTES, high, TURN_BYTES))
        for start, stop in pairwise(sorted(cuts)):
            wanting = []
            for rank, ranges in by_rank.items():
                at = bisect_right(starts[rank], start) - 1
                if at >= 0 and start < ranges[at].stop:
                    wanting.append(rank)
            if not wanting:
                continue
            giver = min(wanting, key=lambda rank: load[rank])
            load[giver] += stop - start
            for rank in wanting:
                plan = plans[rank]
                taken = plan.bring if rank == giver else plan.take.setdefault(giver, {})
                taken.setdefault(file, []).append(ByteRange(start, stop))
    for rank in leaders:
        for own in (plans[rank].bring, *plans[rank].take.values()):
            for file, pieces in own.items():
                own[file] = list(union(pieces))


def encode_request(request: FetchRequest) -> Any:
    """As JSON types, for the way between ranks."""
    return [request.node, _encode(request.wanted), _encode(request.direct)]


def decode_request(record: Any) -> FetchRequest:
    """What `encode_request` made."""
    node, wanted, direct = record
    return FetchRequest(node, _decode(wanted), _decode(direct))


def encode_plan(plan: FetchPlan) -> Any:
    """As JSON types, for the way between ranks."""
    take = [[rank, _encode(ranges)] for rank, ranges in plan.take.items()]
    return [_encode(plan.bring), take, _encode(plan.direct)]


def decode_plan(record: Any) -> FetchPlan:
    """What `encode_plan` made."""
    bring, take, direct = record
    return FetchPlan(_decode(bring), {rank: _decode(ranges) for rank, ranges in take}, _decode(direct))


def _encode(ranges: Ranges) -> dict[str, list[int]]:
    return {file: [edge for one in union(pieces) for edge in one] for file, pieces in ranges.items()}


def _decode(record: Mapping[str, Sequence[int]]) -> dict[str, list[ByteRange]]:
    return {file: list(map(ByteRange, edges[::2], edges[1::2])) for file, edges in record.items()}
