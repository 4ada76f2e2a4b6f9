"""One round of fetching parts: dealt to the ranks by rank 0, and brought by those that fetch for their nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...distributed.range_server import PeerAddress
from ..byte_ranges import ByteRange
from ..checkpoint import Opening
from ..ranges.base import RangeSource
from ..ranges.direct import DirectReads
from ..ranges.peer import PeerSource
from ..ranges.workers import Stop, run_jobs
from .files import FetchWatch
from .plan import (
    FetchPlan,
    FetchRequest,
    decode_plan,
    decode_request,
    encode_plan,
    encode_request,
    plan_fetch,
)
from .room_check import agree_on_room
from .whole import Tally

WantedRanges = dict[str, list[ByteRange]]
"""Path on this node to the ranges of its file."""


@dataclass
class Parts:
    """What one rank wants of remote files."""

    wanted: WantedRanges = field(default_factory=dict)
    direct: WantedRanges = field(default_factory=dict)
    """Of `wanted`, what can come straight into this rank's tensors."""


@dataclass
class FetchRound:
    """What this rank is to fetch: for its node, and for itself."""

    opening: Opening
    bring: WantedRanges
    """From the store to the node's files."""
    take: list[tuple[int, PeerAddress, WantedRanges]]
    """From other nodes' first ranks."""
    direct: DirectReads
    """What this rank reads from the store as it restores."""

    def __bool__(self) -> bool:
        return bool(self.bring or self.take)

    def room(self) -> dict[str, int]:
        """How many bytes `run` brings into each cache folder."""
        needed: dict[str, int] = {}
        for wanted in (self.bring, *(wanted for _, _, wanted in self.take)):
            for folder, n_bytes in self.opening.remote.missing_by_folder(wanted).items():
                needed[folder] = needed.get(folder, 0) + n_bytes
        return needed

    def run(self) -> int:
        """Brings all but `direct`; the bytes that came from the store. Raises as `read_ranges` does."""
        remote = self.opening.remote
        from_store = remote.missing_bytes(self.bring)
        from_peers = [remote.missing_bytes(wanted) for _, _, wanted in self.take]
        channel = self.opening.session.channel
        tally = Tally(channel.counters().get(channel.rank, {}))
        watch = FetchWatch(channel, tally)
        tally.expect("parts", from_store)
        brought: list[int] = []

        def bring(stop: Stop) -> None:
            report = remote.fetch(self.bring, _both(stop, tally.of("parts", remote.stopping)[0]))
            tally.settle("parts", report.read_bytes, report.read_bytes)
            brought.append(report.read_bytes)

        jobs: list[Callable[[Stop], None]] = [bring] if self.bring else []
        for (rank, address, wanted), n_bytes in zip(self.take, from_peers, strict=True):
            tally.expect(f"from rank {rank}", n_bytes)
            jobs.append(self._taking(rank, address, wanted, tally))
        # At the same time, for nodes take from each other: none may wait with its own until it has the others'.
        run_jobs(jobs, watch.tick, n_threads=len(jobs))
        watch.tick()
        return sum(brought)

    def _taking(
        self, rank: int, address: PeerAddress, wanted: WantedRanges, tally: Tally
    ) -> Callable[[Stop], None]:
        remote, host = self.opening.remote, self.opening.session.channel.host
        sources: list[PeerSource] = []

        def moved() -> None:
            tally.moved += 1

        def open_peer(name: str, size_bytes: int) -> RangeSource:
            sources.append(PeerSource(address, name, size_bytes, own_host=host, rank=rank, moved=moved))
            return sources[-1]

        def take(stop: Stop) -> None:
            name = f"from rank {rank}"
            try:
                report = remote.fetch(wanted, _both(stop, tally.of(name, remote.stopping)[0]), open_peer)
            finally:
                for source in sources:
                    source.close()
            tally.settle(name, report.read_bytes, report.read_bytes)

        return take


def plan_round(opening: Opening, parts: Parts, stage: str) -> FetchRound:
    """What this rank is to do so that all ranks get what they want. Every rank must call.

    Raises, on all ranks alike, `AccessError` where a node has no room for it.
    """
    session, remote = opening.session, opening.remote
    mode = opening.request.options.mode or "node"
    serves = mode == "job" and session.topology.n_nodes > 1 and session.topology.local_rank == 0
    request = FetchRequest(
        session.topology.node_rank, _named(opening, parts.wanted), _named(opening, parts.direct)
    )
    address = remote.serve(session.channel.host).as_record() if serves else None

    def deal(told: Sequence[Any]) -> list[Any]:
        plans = plan_fetch([decode_request(request) for request, _ in told], mode)
        return [[encode_plan(one), [[rank, told[rank][1]] for rank in one.take]] for one in plans]

    dealt, addresses = session.channel.deal(f"{stage}: ranges", [encode_request(request), address], deal)
    plan: FetchPlan = decode_plan(dealt)
    peers = {rank: PeerAddress.from_record(record) for rank, record in addresses}
    fetch_round = FetchRound(
        opening,
        _placed(opening, plan.bring),
        [(rank, peers[rank], _placed(opening, wanted)) for rank, wanted in plan.take.items()],
        DirectReads(
            _placed(opening, plan.direct),
            lambda path: remote.known.open_source(opening.store, path),
            _telling(opening),
            n_neighbours=session.topology.local_world_size,
        ),
    )
    planned = agree_on_room(
        session.channel,
        session.topology.node_rank,
        opening.cache,
        fetch_round.room(),
        stage,
        beside=fetch_round.direct.nbytes,
    )
    if session.topology.rank == 0:
        # Known here at once, while what the others count comes with their beats.
        session.channel.progress(bytes_planned=planned)
    return fetch_round


def _named(opening: Opening, wanted: WantedRanges) -> WantedRanges:
    """By what the whole job calls the files, those that come in parts."""
    return {
        opening.remote.known.name_of(path): ranges
        for path, ranges in wanted.items()
        if path in opening.remote.known
    }


def _placed(opening: Opening, ranges: WantedRanges) -> WantedRanges:
    return {opening.remote.known.path_of(name): pieces for name, pieces in ranges.items()}


def _telling(opening: Opening) -> Callable[[int], None]:
    """Tells the channel of bytes that this rank reads for itself, in its own thread."""
    watches: list[FetchWatch] = []

    def on_bytes(count: int) -> None:
        if not watches:
            channel = opening.session.channel
            watches.append(FetchWatch(channel, Tally(channel.counters().get(channel.rank, {}))))
            watches[0].tally.expect("own parts", 0)
        tally = watches[0].tally
        tally.of("own parts", opening.remote.stopping)[0](count)
        watches[0].tick()

    return on_bytes


def _both(stop: Stop, arrived: Callable[[int], None]) -> Callable[[int], None]:
    def on_bytes(count: int) -> None:
        stop.check()
        arrived(count)

    return on_bytes
