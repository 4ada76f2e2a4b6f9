"""The one thread of a rank that talks to the store: it carries what the main thread asks for, beats, and
watches.

The main thread never calls the store itself: a store whose host is stopped or cut off answers no call, and a
thread inside such a call can be neither interrupted nor timed. Rank 0 watches every rank and is watched by
all (so that nobody but rank 0 has more than a constant number of messages per second).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .errors import PeerError, RankloadError, StalledError, from_record, to_record
from .heartbeat import SILENT_AFTER_S, Heartbeat, PeerWatch, place
from .key_value import KeyValue
from .liveness import ProcessIdentity, how_ended, is_watchable

T = TypeVar("T")
BEAT_S = 1.0
AGREED = "agreed"
"""What stands at an agreement's decision key when all agreed; anything else is the record of an error."""


class StoreLostError(Exception):
    """The store can't be reached any more (internal; the channel raises a PeerError in its place)."""


class _Job(Generic[T]):
    def __init__(self, work: Callable[[KeyValue], T]) -> None:
        self.work = work
        self.done = threading.Event()
        self.answer: T | None = None
        self.error: Exception | None = None

    def run(self, mailbox: KeyValue) -> None:
        try:
            self.answer = self.work(mailbox)
        except Exception as error:
            self.error = error
        self.done.set()


class StoreThread:
    """See the module. Public attributes are written by one thread and read by the other, each at once."""

    def __init__(
        self,
        open_mailbox: Callable[[], KeyValue],
        process: ProcessIdentity,
        rank: int,
        world_size: int,
        stall_timeout_s: float,
    ) -> None:
        self._open_mailbox = open_mailbox
        self._process = process
        self._rank = rank
        self._stall_timeout_s = stall_timeout_s
        watched = range(world_size) if rank == 0 else range(1)
        self.watches = {peer: PeerWatch(peer) for peer in watched if peer != rank}
        self.index = 0
        self.stage = ""
        self.counters: dict[str, float] = {}
        self.announced: RankloadError | None = None
        self.lost: Exception | None = None
        self.still_s = 0.0
        self._progress = 0
        self._moved = 0
        self._sequence = 0
        self._closed = False
        self._connected = False
        self._last_look = time.monotonic()
        self._unanswered = (self._last_look, self._last_look, 0.0)
        self._due = self._last_look
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="rankload-courier", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def move(self) -> None:
        """This rank did something: the stall clock starts anew, here at once and elsewhere with the next
        beat."""
        self._progress += 1
        self.still_s = 0.0

    def beat_now(self) -> None:
        """Beats and looks at once, not only when it is time."""
        self._due = time.monotonic()
        self.call_later(lambda mailbox: None)

    def call(self, work: Callable[[KeyValue], T], patience_s: float | None = None) -> T:
        """Runs ``work`` on the courier's thread and waits for it.

        Raises:
            StoreLostError: the connection broke, or there was no answer for ``patience_s`` (by default
                `SILENT_AFTER_S`).
            StalledError: no answer for ``stall_timeout_s``, while rank 0 is known to live.
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
        """Has the courier's thread run ``work`` without waiting for it; where that fails, the next `call` does."""
        self._jobs.put(_Job(work))

    def stop(self, patience_s: float) -> bool:
        """Ends the thread; False where it sits in a call that the store does not answer."""
        self._jobs.put(None)
        # What has not answered so far is not waited for again.
        self._thread.join(patience_s if self.lost is None else 0.1)
        return not self._thread.is_alive()

    def close_beat(self, mailbox: KeyValue) -> None:
        """The last beat: says that this rank left in good order. (Work for `call`.)"""
        self._closed = True
        self._send(mailbox)

    def rank_zero_ended(self) -> str | None:
        """How rank 0's process ended, where that can be told from here."""
        watch = self.watches.get(0)
        return None if watch is None or watch.beat is None else how_ended(watch.beat.process)

    def check_answering(self) -> None:
        """For a rank that works and asks nothing: raises as `call` does where the store has fallen silent."""
        if self.lost is not None:
            raise StoreLostError(str(self.lost)) from self.lost
        now = time.monotonic()
        look, before, waited = self._unanswered
        waited = waited + min(now - before, BEAT_S) if look == self._last_look else 0.0
        self._unanswered = (self._last_look, now, waited)
        self._judge_silence(waited)

    def _judge_silence(self, waited: float) -> None:
        if not self._connected:
            # Connecting looks up host names: a slow name server is no sign that anybody died.
            if waited > max(self._stall_timeout_s, SILENT_AFTER_S):
                self.lost = TimeoutError(f"no connection for {waited:.0f} s")
                raise StalledError(
                    f"the store over which the ranks talk could not be reached for {waited:.0f} s"
                )
            return
        watch = self.watches.get(0)
        near = watch is not None and watch.beat is not None and is_watchable(watch.beat.process)
        if near and self.rank_zero_ended() is None:
            # Rank 0 lives on this machine; stopped or starved is not dead, and gets the stall's patience.
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

    def _run(self) -> None:
        try:
            # Connecting may hang as any call may, so this thread does it; nobody else holds the connection.
            mailbox = self._open_mailbox()
            self._connected = True
            # What is left of the channel must not keep the store: its server ends with the last reference.
            del self._open_mailbox
            while True:
                try:
                    job = self._jobs.get(timeout=max(0.0, self._due - time.monotonic()))
                except queue.Empty:
                    pass
                else:
                    if job is None:
                        return
                    job.run(mailbox)
                    if job.error is not None and not isinstance(job.error, RankloadError):
                        raise job.error
                if time.monotonic() >= self._due:
                    if not self._closed:
                        self._send(mailbox)
                    self._look(mailbox)
                    self._due = time.monotonic() + BEAT_S
        except Exception as error:
            self.lost = self.lost or error

    def _send(self, mailbox: KeyValue) -> None:
        self._sequence += 1
        beat = Heartbeat(
            self._sequence,
            self._process,
            self.stage,
            self._progress,
            self._moved,
            self.counters,
            self._closed,
        )
        mailbox.put(heartbeat_key(self._rank), beat.encode())

    def _look(self, mailbox: KeyValue) -> None:
        # The index is read once: the decision of an older stage may be removed as soon as this rank has
        # posted for a newer one, and that post is carried by this thread, so not before this look is over.
        index = self.index
        now = time.monotonic()
        looked_for = min(now - self._last_look, 2 * BEAT_S)
        self._last_look = now
        self._notice(mailbox.settled(decision_key(index)))
        peers = list(self.watches)
        beats = mailbox.peek_all([heartbeat_key(peer) for peer in peers])
        moved = [self.watches[peer].observe(raw, looked_for) for peer, raw in zip(peers, beats, strict=True)]
        if self._rank == 0:
            # Rank 0 alone passes on what it saw: two ranks that did would see each other move for ever.
            self._moved += sum(moved)
        self.still_s = 0.0 if any(moved) else self.still_s + looked_for
        for watch in self.watches.values():
            death = watch.death()
            if death is not None and self.announced is None and not self._closed:
                error = peer_error(watch, death, self.stage)
                self._notice(mailbox.settle(decision_key(index), to_record(error)))

    def _notice(self, outcome: str | None) -> None:
        if self.announced is None and outcome not in (None, AGREED):
            self.announced = from_record(str(outcome))


def decision_key(index: int) -> str:
    """Where the one outcome of agreement ``index`` is settled."""
    return f"{index}/decision"


def heartbeat_key(rank: int) -> str:
    """Where ``rank`` leaves its beats."""
    return f"beat/{rank}"


def peer_error(watch: PeerWatch, death: str, stage: str) -> PeerError:
    """The error that the death of a peer becomes, on all ranks; `"""
    if watch.beat is None:
        return PeerError(f"rank {watch.rank} ended: {death}", rank=watch.rank)
    process = watch.beat.process
    return PeerError(
        f"rank {watch.rank} (host {process.host}, pid {process.pid}) ended "
        f"{place(stage or watch.beat.stage)}: {death}",
        rank=watch.rank,
        host=process.host,
    )
