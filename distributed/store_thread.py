"""Here a rank learns that another one died: the one thread of a rank that talks to the store, and watches its peers.

Every `HEARTBEAT_S` the thread sends this rank's heartbeat and calls `StoreThread._watch_peers`. Rank 0 watches every
rank and every rank watches rank 0, so that only rank 0's messages per second grow with the world. A rank learns of a
death in one of five ways:

    it watches the rank that died    `PeerWatch.death` says how it ended; this thread settles a PeerError as the outcome
                                     of the current agreement, which announces it to all ranks
    it is the first rank of its node, or the one that died is
                                     the same: they watch each other's processes, which rank 0 of another node cannot
    that has not come yet            `siblings` finds the processes of ranks on this machine, and the roster tells of
                                     those that made an earlier call
    another rank watched it          that PeerError stands at the current agreement's decision key
    the store is lost                its host died with it: calls break or get no answer (`StoreLostError`, of which
                                     `failures.store_lost` makes the PeerError)

A rank on another machine that sends no heartbeat is not dead because of that: rank 0 asks the ranks of its machine, and
these say whether its process lives, and whether it is stopped (`heartbeat.Witness`). Of rank 0 they say so by
themselves.

The first four leave the error in `StoreThread.announced`, for the main thread to raise in its next agreement,
`Channel.progress` or `Channel.check`; the last is raised where the main thread calls or checks.

The main thread never calls the store itself: a store whose host is stopped or cut off answers no call, and a thread
inside such a call can be neither interrupted nor timed. It queues its work for this thread and waits outside (`call`).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from .errors import PeerError, RankloadError, StalledError, from_record, to_record
from .heartbeat import (
    ASKED_AT_MOST,
    HEARD,
    SILENT_AFTER_S,
    SUSPECT_AFTER_S,
    Enrolled,
    Heartbeat,
    PeerWatch,
    Witness,
    decode_enrolled,
    place,
)
from .key_value import KeyValue
from .liveness import ProcessIdentity, how_ended, is_stopped, is_watchable
from .siblings import Siblings
from .sockets import Sockets, listens, shut_down

T = TypeVar("T")
HEARTBEAT_S = 1.0
"""Seconds between two heartbeats, and between two looks at the peers'."""
SLEPT_S = 4.0
"""A thread that comes this late to its next look was stopped: what the others did meanwhile, it has not seen."""
LISTEN_AGAIN_S = 2.0
AGREED = "agreed"
"""What stands at an agreement's decision key when all agreed; anything else is the record of an error."""


class StoreLostError(Exception):
    """The store can't be reached any more. Internal: the channel raises a PeerError in its place."""


class _Job(Generic[T]):
    """Work for the thread, and what came of it once ``done`` is set."""

    def __init__(self, work: Callable[[KeyValue], T]) -> None:
        self.work = work
        self.done = threading.Event()
        self.answer: T | None = None
        self.error: Exception | None = None

    def run(self, key_value: KeyValue) -> None:
        try:
            self.answer = self.work(key_value)
        except Exception as error:
            self.error = error
        self.done.set()


class StoreThread:
    """A rank's connection to the store, its heartbeat, and its watch over its peers.

    Each public attribute is written by one thread and read by the other, in one atomic step.

    Attributes:
        watches: what this rank knows of each peer that it watches.
        neighbours: processes of this machine that this rank watches without their heartbeats; set by the main thread,
            and added to for those that rank 0 has asked for.
        suspects: ranks that others were asked for, or that this one was.
        index: number of the current agreement; set by the main thread.
        stage: name of the stage that this rank is in; set by the main thread.
        counters: the latest of `Channel.progress`; set by the main thread.
        waiting_for: what this rank waits for outside of the channel; "" if nothing.
        announced: the failure that all ranks raise, once one was settled.
        announced_at: when this rank heard of it, on the monotonic clock.
        lost: why the connection ended, once it did.
        still_s: seconds for which no watched peer, and not this rank either, made progress.
        waited_s: seconds for which this rank has waited, by `wait`, without a step of its own.
    """

    def __init__(
        self,
        open_key_value: Callable[[], KeyValue],
        process: ProcessIdentity,
        rank: int,
        world_size: int,
        stall_timeout_s: float,
    ) -> None:
        self._open_key_value = open_key_value
        self._process = process
        self._rank = rank
        self._stall_timeout_s = stall_timeout_s
        watched = range(world_size) if rank == 0 else range(1)
        self.watches = {peer: PeerWatch(peer) for peer in watched if peer != rank}
        self.neighbours: dict[int, ProcessIdentity] = {}
        self.suspects: set[int] = set()
        self._witnessed = 0
        self._siblings: Siblings | None = Siblings() if world_size > 1 else None
        self._looks = 0
        self._trusts_roster = False
        self.index = 0
        self.stage = ""
        self.counters: dict[str, float] = {}
        self._announced: RankloadError | None = None
        self.announced_at: float | None = None
        self.lost: Exception | None = None
        self.waiting_for = ""
        self.still_s = 0.0
        self.waited_s = 0.0
        self._progress = 0
        self._moved = 0
        self._sequence = 0
        self._closed = False
        self._connected = False
        self._address: tuple[str, int] | None = None
        self._sockets: Sockets = {}
        self._listened = (0.0, False)
        self._last_look = time.monotonic()
        self._last_wait = self._last_look
        self._unanswered = (self._last_look, self._last_look, 0.0)
        self._due = self._last_look
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="rankload-store", daemon=True)

    @property
    def announced(self) -> RankloadError | None:
        return self._announced

    @announced.setter
    def announced(self, error: RankloadError | None) -> None:
        if error is not None and self.announced_at is None:
            self.announced_at = time.monotonic()
        self._announced = error

    def start(self) -> None:
        """Starts the thread, which opens the connection."""
        self._thread.start()

    def move(self) -> None:
        """Counts a step of this rank: the stall clock restarts, here at once and elsewhere with the next heartbeat."""
        self._progress += 1
        self.still_s = self.waited_s = 0.0

    def wait(self) -> None:
        """Counts the time since the call before as one of waiting; called several times a second, in any thread."""
        now = time.monotonic()
        self.waited_s += min(now - self._last_wait, HEARTBEAT_S)
        self._last_wait = now

    def look_now(self) -> None:
        """Has the thread send a heartbeat and look at its peers at once, rather than when the next is due."""
        self._due = time.monotonic()
        self.call_later(lambda key_value: None)

    def call(self, work: Callable[[KeyValue], T], patience_s: float | None = None) -> T:
        """Runs ``work`` on the thread, waits for it and returns its result.

        Raises:
            StoreLostError: the connection broke, or there was no answer for ``patience_s`` (by default
                `SILENT_AFTER_S`).
            StalledError: no answer for ``stall_timeout_s``, while rank 0 is known to live.
            RankloadError: what ``work`` raised, where that is one.
        """
        if self.lost is not None:
            raise StoreLostError(str(self.lost)) from self.lost
        job = _Job(work)
        self._jobs.put(job)
        waited, before = 0.0, time.monotonic()
        while not job.done.wait(0.2):
            now = time.monotonic()
            waited, before = waited + min(now - before, 0.5), now
            if patience_s is None:
                self._judge_silence(waited)
            elif waited > patience_s:
                raise StoreLostError(f"no answer for {waited:.0f} s")
            if not self._thread.is_alive() and not job.done.is_set():
                raise StoreLostError(str(self.lost or "the connection was closed")) from self.lost
        if job.error is not None:
            if isinstance(job.error, RankloadError):
                raise job.error
            raise StoreLostError(str(job.error)) from job.error
        return job.answer  # type: ignore[return-value]

    def call_later(self, work: Callable[[KeyValue], object]) -> None:
        """Has the thread run ``work`` without waiting for it; where it fails, the next `call` raises StoreLostError."""
        self._jobs.put(_Job(work))

    def stop(self, patience_s: float) -> bool:
        """Ends the thread; False where it is in a call that the store does not answer after ``patience_s``, and that
        does not end with its connection."""
        self._jobs.put(None)
        # A store that has not answered so far is not waited for again.
        self._thread.join(patience_s if self.lost is None else 0.1)
        if self._thread.is_alive():
            shut_down(self._sockets)
            self._thread.join(patience_s)
        return not self._thread.is_alive()

    def send_last_heartbeat(self, key_value: KeyValue) -> None:
        """Sends the heartbeat that says that this rank left in good order. Runs on the thread: work for `call`."""
        self._closed = True
        self._send(key_value)

    def unheard(self) -> list[PeerWatch]:
        """The peers that have given up, or were not heard of since this rank woke, if it was stopped."""
        if time.monotonic() - self._last_look > SLEPT_S:
            self._note_sleep()
        # Nobody leaves while this rank is in an agreement, unless it has given up.
        return [watch for watch in self.watches.values() if watch.heard < HEARD or watch.closed]

    def _note_sleep(self) -> None:
        for watch in self.watches.values():
            watch.heard = 0

    def rank_zero_ended(self) -> str | None:
        """How rank 0's process ended; None while it lives or where that can't be seen from this machine."""
        watch = self.watches.get(0)
        return None if watch is None or watch.heartbeat is None else how_ended(watch.heartbeat.process)

    def check_answering(self) -> None:
        """Raises as `call` does where the store has stopped answering: for a rank that works and calls nothing."""
        if self.lost is not None:
            raise StoreLostError(str(self.lost)) from self.lost
        now = time.monotonic()
        look, before, waited = self._unanswered
        waited = waited + min(now - before, HEARTBEAT_S) if look == self._last_look else 0.0
        self._unanswered = (self._last_look, now, waited)
        self._judge_silence(waited)

    def _judge_silence(self, waited: float) -> None:
        """Raises where a store without an answer for ``waited`` seconds counts as lost, or as stalled."""
        if not self._connected:
            # Connecting looks up host names: a slow name server is no sign of a death.
            if waited > max(self._stall_timeout_s, SILENT_AFTER_S):
                self.lost = TimeoutError(f"no connection for {waited:.0f} s")
                raise StalledError(
                    f"the store over which the ranks talk could not be reached for {waited:.0f} s"
                )
            return
        watch = self.watches.get(0)
        near = watch is not None and watch.heartbeat is not None and is_watchable(watch.heartbeat.process)
        if self.rank_zero_ended() is None if near else self._host_lives(waited):
            # Rank 0 lives; stopped or starved is not dead, and gets the stall's patience.
            if waited > max(self._stall_timeout_s, SILENT_AFTER_S / 2):
                self.lost = TimeoutError(f"no answer for {waited:.0f} s")
                raise StalledError(
                    f"the store over which the ranks talk has not answered for {waited:.0f} s; waiting for "
                    f"{watch.describe() if watch else 'its host'}",
                    rank=0,
                )
        elif waited > SILENT_AFTER_S:
            self.lost = TimeoutError(f"no answer for {waited:.0f} s")
            raise StoreLostError(str(self.lost))

    def _host_lives(self, waited: float) -> bool:
        """Whether the store's server on another machine, silent for ``waited`` seconds, still takes connections: its
        process is stopped then, or starved. Asks once in `LISTEN_AGAIN_S`."""
        if waited < SILENT_AFTER_S / 2 or self._address is None:
            return False
        asked, answer = self._listened
        if time.monotonic() - asked > LISTEN_AGAIN_S:
            answer = listens(self._address)
            self._listened = (time.monotonic(), answer)
        return answer

    def _run(self) -> None:
        try:
            # Connecting may hang as any call may, so this thread does it, and alone holds the connection.
            key_value = self._open_key_value()
            self._address, self._sockets = key_value.address, key_value.connection
            self._connected = True
            self._enroll(key_value)
            # What is left of the channel must not keep the store: its server ends with the last reference.
            del self._open_key_value
            while True:
                try:
                    job = self._jobs.get(timeout=max(0.0, self._due - time.monotonic()))
                except queue.Empty:
                    pass
                else:
                    if job is None:
                        return
                    job.run(key_value)
                    if job.error is not None and not isinstance(job.error, RankloadError):
                        raise job.error
                if time.monotonic() >= self._due:
                    if not self._closed:
                        self._send(key_value)
                    self._watch_peers(key_value)
                    self._due = time.monotonic() + HEARTBEAT_S
        except Exception as error:
            self.lost = self.lost or error

    def _enroll(self, key_value: KeyValue) -> None:
        """Leaves on the roster which process this rank is, for later calls that another rank has not come to."""
        roster = key_value.roster
        if roster is None:
            return
        before = roster.peek(str(self._rank))
        # A store that outlives its ranks may tell of other processes.
        self._trusts_roster = before is None or decode_enrolled(before).process == self._process
        roster.put(str(self._rank), Enrolled(self._process, key_value.call).encode())

    def _send(self, key_value: KeyValue) -> None:
        self._sequence += 1
        heartbeat = Heartbeat(
            self._sequence,
            self._process,
            self.stage,
            self._progress,
            self._moved,
            self.counters,
            self._closed,
            self.waiting_for,
            [rank for rank, process in list(self.neighbours.items()) if is_stopped(process)],
            self._asked_for(),
        )
        key_value.put(heartbeat_key(self._rank), heartbeat.encode())

    def _watch_peers(self, key_value: KeyValue) -> None:
        """Reads the current agreement's outcome and the peers' heartbeats; announces the death of a peer."""
        # The index is read once: the decision of an older stage may be removed as soon as this rank has
        # posted for a newer one, and that post is carried by this thread, so not before this look is over.
        index = self.index
        now = time.monotonic()
        looked_for = min(now - self._last_look, 2 * HEARTBEAT_S)
        if now - self._last_look > SLEPT_S:
            self._note_sleep()
        self._last_look = now
        self._notice(key_value.settled(decision_key(index)))
        peers = list(self.watches)
        heartbeats = key_value.peek_all([heartbeat_key(peer) for peer in peers])
        moved = [
            self.watches[peer].observe(raw, looked_for) for peer, raw in zip(peers, heartbeats, strict=True)
        ]
        heard = [
            watch.heartbeat
            for watch in self.watches.values()
            if watch.heartbeat is not None and not watch.is_silent_for(SILENT_AFTER_S)
        ]
        stopped = {peer for heartbeat in heard for peer in heartbeat.stopped}
        for peer, watch in self.watches.items():
            watch.stopped = peer in stopped
        self._bear_witness(key_value)
        self._hear_witnesses(key_value, looked_for)
        if self._rank == 0:
            # Rank 0 alone passes on what it saw: two ranks that did would see each other move for ever.
            self._moved += sum(moved)
        self.still_s = 0.0 if any(moved) else self.still_s + looked_for
        self._looks += 1
        absent = [watch for watch in self.watches.values() if watch.heartbeat is None]
        if absent and self._looks > 1:
            self._expect(key_value, absent)
        deaths = [(watch, watch.death()) for watch in self.watches.values()]
        for watch, death in [*deaths, *self._dead_neighbours(key_value), *self._dead_siblings(key_value)]:
            if death is not None and self.announced is None and not self._closed:
                error = peer_error(watch, death, self.stage)
                self._notice(key_value.settle(decision_key(index), to_record(error)))

    def _asked_for(self) -> dict[int, ProcessIdentity]:
        """On rank 0: silent ranks, whose processes others may see."""
        if self._rank != 0:
            return {}
        suspects = [watch for watch in self.watches.values() if watch.is_suspect][:ASKED_AT_MOST]
        return {watch.rank: watch.heartbeat.process for watch in suspects if watch.heartbeat is not None}

    def _bear_witness(self, key_value: KeyValue) -> None:
        """Says of silent ranks, whose processes this rank sees, that they live: those that rank 0 asks for, and 0."""
        leader = self.watches.get(0)
        if leader is None or leader.heartbeat is None or leader.closed:
            return
        # A rank 0 that is silent itself asks for nobody any more.
        silent = leader.is_silent_for(SUSPECT_AFTER_S)
        asked = {0: leader.heartbeat.process} if silent else leader.heartbeat.silent
        for rank, process in asked.items():
            if rank == self._rank or not is_watchable(process):
                continue
            self.suspects.add(rank)
            if rank != 0:
                self.neighbours[rank] = process
            if how_ended(process) is None:
                self._witnessed += 1
                told = Witness(self._rank, self._witnessed, is_stopped(process))
                key_value.put(witness_key(rank), told.encode())

    def _hear_witnesses(self, key_value: KeyValue, looked_for: float) -> None:
        for peer, watch in self.watches.items():
            if watch.is_suspect:
                self.suspects.add(peer)
                watch.hear(key_value.peek(witness_key(peer)), looked_for)

    def _dead_neighbours(self, key_value: KeyValue) -> Iterator[tuple[PeerWatch, str]]:
        """The neighbours whose processes have ended, unless they had left in good order, each with how it ended."""
        for rank, process in list(self.neighbours.items()):
            ended = how_ended(process)
            if ended is None:
                continue
            del self.neighbours[rank]
            watch = PeerWatch(rank)
            watch.observe(key_value.peek(heartbeat_key(rank)), 0.0)
            # Without a heartbeat all have left, and rank 0 has removed what they left in the store.
            if watch.heartbeat is not None and not watch.closed:
                yield watch, ended

    def _expect(self, key_value: KeyValue, absent: list[PeerWatch]) -> None:
        """Looks up what earlier calls told of ranks that have not come to this one."""
        if key_value.roster is None or not self._trusts_roster:
            return
        for watch in absent:
            if watch.expected is None:
                raw = key_value.roster.peek(str(watch.rank))
                found = None if raw is None else decode_enrolled(raw)
                watch.expected = found if found is not None and found.calls < key_value.call else None

    def _dead_siblings(self, key_value: KeyValue) -> Iterator[tuple[PeerWatch, str]]:
        """Until all have come: the ranks of this machine whose processes have ended before they told that they came."""
        if self.index > 0:
            self._siblings = None
        if self._siblings is None or self._looks < 2:
            return
        for rank, process in self._siblings.ended().items():
            watch = PeerWatch(rank)
            watch.expected = Enrolled(process, 0)
            if key_value.peek(heartbeat_key(rank)) is None:
                yield watch, how_ended(process) or "its process is gone"

    def _notice(self, outcome: str | None) -> None:
        """Keeps the first error that was settled as an outcome, for the main thread to raise."""
        if self.announced is None and outcome not in (None, AGREED):
            self.announced = from_record(str(outcome))


def decision_key(index: int) -> str:
    """The key where the one outcome of agreement ``index`` is settled."""
    return f"{index}/decision"


def heartbeat_key(rank: int) -> str:
    """The key of the latest heartbeat of ``rank``."""
    return f"heartbeat/{rank}"


def witness_key(rank: int) -> str:
    """The key of what was last seen of the process of ``rank``, while that is silent."""
    return f"witness/{rank}"


def peer_error(watch: PeerWatch, death: str, stage: str) -> PeerError:
    """The error that all ranks raise for the death of a peer.

    Args:
        watch: the peer's, which gives its rank, host, pid and, where ``stage`` is empty, its last stage.
        death: how it ended, as `PeerWatch.death` says it.
        stage: where the rank that noticed it is.
    """
    if watch.heartbeat is None:
        process = None if watch.expected is None else watch.expected.process
        who = "" if process is None else f" (host {process.host}, pid {process.pid})"
        return PeerError(
            f"rank {watch.rank}{who} ended before it came to this call: {death}",
            rank=watch.rank,
            host=None if process is None else process.host,
        )
    process = watch.heartbeat.process
    return PeerError(
        f"rank {watch.rank} (host {process.host}, pid {process.pid}) ended "
        f"{place(stage or watch.heartbeat.stage)}: {death}",
        rank=watch.rank,
        host=process.host,
    )
