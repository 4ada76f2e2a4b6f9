"""Plans and runs one round of fetching parts: all ranks state what they want, rank 0 plans, nodes' leaders fetch.

`plan_round` is the agreement, in which `plan.plan_fetch` decides; the `FetchRound` that it returns is this rank's share
of the work. `fetch_now` does both, and waits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...distributed.printable import package_logger
from ...distributed.range_server import PeerAddress
from ..byte_ranges import RECORD_GAP_BYTES, ByteRange, with_gaps
from ..cache.folder import folder_of
from ..cache.holes import Landed
from ..context import LoadContext
from ..plurals import counted
from ..ranges.base import RangeSource
from ..ranges.direct import DirectReads
from ..ranges.peer import PeerSource, PeerUnreachableError
from ..wire import decode, encode
from ..workers import Stop, run_jobs
from .plan import FetchPlan, FetchRequest, plan_fetch
from .remote_file import SharedFile
from .remote_files import RemoteFiles
from .space_check import agree_on_room
from .tally import FetchWatch, Tally

_logger = package_logger()

WantedRanges = dict[str, list[ByteRange]]
"""Ranges of files, by the files' paths on this node."""


@dataclass
class Parts:
    """The ranges of remote files that one rank wants."""

    wanted: WantedRanges = field(default_factory=dict)
    direct: WantedRanges = field(default_factory=dict)
    """The part of `wanted` that can be fetched directly into this rank's tensors."""


def _parts_of(wanted: WantedRanges) -> str:
    """What is fetched, for messages."""
    names = [os.path.basename(path) for path in wanted]
    others = f" and {counted(len(names) - 1, 'other file')}" if len(names) > 1 else ""
    return f"parts of {names[0]}{others}" if names else "parts"


@dataclass
class FetchRound:
    """What this rank is to fetch in one round. False where `run` has nothing to do: on all ranks that do not lead."""

    context: LoadContext
    remote: RemoteFiles
    bring: WantedRanges
    """From the store into the node's files."""
    take: list[tuple[int, PeerAddress, WantedRanges]]
    """From other nodes' files, by the rank that leads the node."""
    direct: DirectReads
    """From the store into this rank's tensors, while it restores; not by `run`."""
    along_bytes: dict[str, int] = field(default_factory=dict)
    """How many bytes all ranks of this node bring into its files along with that, by path; where this one leads."""
    again: int = 0
    """How many bytes came from the store that another node has too, because it could not be reached."""

    def __bool__(self) -> bool:
        return bool(self.bring or self.take)

    def room(self) -> dict[str, int]:
        """How many bytes this node's ranks bring into each cache folder, where this one leads them."""
        needed: dict[str, int] = {}
        for path, n_bytes in self.along_bytes.items():
            folder = folder_of(path) or os.path.dirname(path)
            needed[folder] = needed.get(folder, 0) + n_bytes
        for wanted in (self.bring, *(wanted for _, _, wanted in self.take)):
            for folder, n_bytes in self.remote.missing_by_folder(wanted).items():
                needed[folder] = needed.get(folder, 0) + n_bytes
        return needed

    def run(self) -> int:
        """Fetches `bring` and `take`, and returns how many bytes came from the store.

        Raises as `read_ranges` does, and `StalledError` where nothing arrives.
        """
        remote = self.remote
        from_store = remote.missing_bytes(self.bring)
        from_peers = [remote.missing_bytes(wanted) for _, _, wanted in self.take]
        channel = self.context.session.channel
        tally = Tally(channel.counters().get(channel.rank, {}))
        watch = FetchWatch(channel, tally)
        parts = _parts_of(self.bring)
        if self.bring:
            tally.expect(parts, from_store)
        brought: list[int] = []

        def bring(stop: Stop) -> None:
            report = remote.fetch(self.bring, _stoppable(stop, tally.of(parts, remote.stopping).arrived))
            tally.settle(parts, report.read_bytes, report.read_bytes)
            brought.append(report.read_bytes)

        jobs: list[Callable[[Stop], None]] = [bring] if self.bring else []
        for (rank, address, wanted), n_bytes in zip(self.take, from_peers, strict=True):
            tally.expect(f"from rank {rank}", n_bytes)
            jobs.append(self._taking(rank, address, wanted, tally))
        # All at once: nodes take from each other, and would wait for ever if each first waited for the others' bytes.
        run_jobs(jobs, watch.tick, n_threads=len(jobs))
        watch.tick()
        return sum(brought) + self.again

    def _taking(
        self, rank: int, address: PeerAddress, wanted: WantedRanges, tally: Tally
    ) -> Callable[[Stop], None]:
        """A job that fetches `wanted` from the node of `rank`."""
        remote = self.remote
        sources: list[PeerSource] = []

        def moved() -> None:
            tally.moved += 1

        def open_peer(name: str, size_bytes: int) -> RangeSource:
            sources.append(
                PeerSource(
                    address,
                    name,
                    size_bytes,
                    rank=rank,
                    moved=moved,
                    outages=self.context.store.outages,
                )
            )
            return sources[-1]

        def take(stop: Stop) -> None:
            name = f"from rank {rank}"
            arrived = _stoppable(stop, tally.of(name, remote.stopping).arrived)
            try:
                report = remote.fetch(wanted, arrived, open_peer)
            except PeerUnreachableError as error:
                _logger.warning(
                    "%s. What its node fetched is fetched from the store once more; set the option interface, or "
                    "RANKLOAD_INTERFACE, to a network that joins the nodes, such as 10.0.0.0/16",
                    error.message,
                )
                report = remote.fetch(wanted, arrived)
                self.again += report.read_bytes
            finally:
                for source in sources:
                    source.close()
            tally.settle(name, report.read_bytes, report.read_bytes)

        return take


def plan_round(context: LoadContext, remote: RemoteFiles, parts: Parts, stage: str) -> FetchRound:
    """This rank's share of fetching what all ranks want. Every rank must call, whatever it wants.

    Raises, on all ranks alike, `AccessError` where a node has no room for its files.
    """
    session, mode = context.session, context.options.mode
    serves = mode == "job" and session.topology.n_nodes > 1 and session.topology.local_rank == 0
    # What is fetched directly goes into memory that has no place for what lies between two records.
    gap = 0 if context.direct else RECORD_GAP_BYTES
    wanted, direct = parts.wanted, parts.direct
    if context.direct:
        # What is on the node already, from a prefetch or an earlier load, is not fetched past it.
        wanted, direct = _missing(remote, wanted), _missing(remote, direct)
    request = FetchRequest(
        session.topology.node_rank, _by_name(remote, wanted, gap), _by_name(remote, direct)
    )
    address = remote.serve(session.channel.host, context.options.interface).as_record() if serves else None

    def deal(records: Sequence[Any]) -> list[Any]:
        plans = plan_fetch([decode(FetchRequest, asked) for asked, _ in records], mode)
        return [[encode(one), [[rank, records[rank][1]] for rank in one.take]] for one in plans]

    record, addresses = session.channel.deal(f"{stage}: ranges", [encode(request), address], deal)
    plan = decode(FetchPlan, record)
    peers = {rank: PeerAddress.from_record(peer) for rank, peer in addresses}
    fetch_round = FetchRound(
        context,
        remote,
        _by_path(remote, plan.bring),
        [(rank, peers[rank], _by_path(remote, wanted)) for rank, wanted in plan.take.items()],
        DirectReads(
            _by_path(remote, plan.direct),
            lambda path: remote.known.open_source(context.store, path),
            count_own(context, remote),
            n_neighbours=session.topology.local_world_size,
            along={path: Landed(path).missing(spans) for path, spans in _by_path(remote, plan.along).items()},
            open_file=SharedFile,
        ),
        {remote.known.path_of(name): n_bytes for name, n_bytes in plan.along_bytes.items()},
    )
    planned = agree_on_room(
        session.channel,
        session.topology.node_rank,
        context.cache,
        fetch_round.room(),
        stage,
        direct_bytes=fetch_round.direct.nbytes,
    )
    if session.topology.rank == 0:
        # Rank 0 knows it now, while the other ranks' counts arrive with their heartbeats.
        session.channel.progress(bytes_planned=planned)
    return fetch_round


def fetch_now(
    context: LoadContext, remote: RemoteFiles, wanted: Mapping[str, Sequence[ByteRange]], stage: str
) -> None:
    """Fetches the ranges that all ranks want, by path, and waits for them. Every rank must call, whatever it wants.

    Raises, on all ranks alike, as `plan_round` and `FetchRound.run` do. Does nothing for a local store.
    """
    if context.store.is_local:
        return
    parts = Parts({path: list(ranges) for path, ranges in wanted.items()})
    fetch_round = plan_round(context, remote, parts, stage)
    with context.stages.stage(stage) as timing:
        if fetch_round:
            timing.bytes += fetch_round.run()


def _by_name(remote: RemoteFiles, wanted: WantedRanges, max_gap: int = 0) -> WantedRanges:
    """The ranges of files that come in parts, each byte once, by names that are the same on all ranks.

    Gaps of up to `max_gap` bytes are among them.
    """
    return {
        remote.known.name_of(path): list(with_gaps(ranges, max_gap))
        for path, ranges in wanted.items()
        if path in remote.known
    }


def _missing(remote: RemoteFiles, wanted: WantedRanges) -> WantedRanges:
    """What of files that come in parts is not on this node yet."""
    return {
        path: list(Landed(path).missing(ranges)) for path, ranges in wanted.items() if path in remote.known
    }


def _by_path(remote: RemoteFiles, wanted: WantedRanges) -> WantedRanges:
    """The reverse of `_by_name`."""
    return {remote.known.path_of(name): ranges for name, ranges in wanted.items()}


def count_own(context: LoadContext, remote: RemoteFiles) -> Callable[[int], None]:
    """What is to be called as bytes arrive that this rank reads for itself: counts them, and reports them to the
    channel. It raises another rank's failure, or `StalledError`."""
    watches: list[FetchWatch] = []

    def on_bytes(count: int) -> None:
        if not watches:
            channel = context.session.channel
            watches.append(FetchWatch(channel, Tally(channel.counters().get(channel.rank, {}))))
            watches[0].tally.expect("own parts", 0)
        tally = watches[0].tally
        tally.of("own parts", remote.stopping).arrived(count)
        watches[0].tick()

    return on_bytes


def _stoppable(stop: Stop, arrived: Callable[[int], None]) -> Callable[[int], None]:
    """`arrived`, which raises once `stop` is set."""

    def on_bytes(count: int) -> None:
        stop.check()
        arrived(count)

    return on_bytes
