"""Agreement between the ranks of a job: all go on, or all raise the same error.

How one agreement works (`agreement`): each rank posts its part; rank 0 sees that all have posted, combines the parts,
and settles the outcome at one key, in one atomic step. A rank that fails settles its error at that same key, and so
does a rank that notices the death of another (`store_thread`). Whichever comes first is the outcome for all, so no rank
can succeed where another failed. Agreements are numbered in program order: all ranks must go through the same ones, in
the same order. A failure ends the channel.

The channel rests on torch's key-value store, never on collectives: a collective blocks in native code until
every rank takes part or the group's time-out kills the job, whichever rank is at fault. Here every wait is a
short sleep in the calling thread, and no rank gives up while any rank makes progress.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Protocol

from .agreement import Agreement, Combine, join_bytes, join_json, split_bytes
from .changes import Changes
from .errors import RankloadError, StalledError, TopologyError, from_record, to_record
from .failures import as_rankload_error, bounded, store_lost
from .heartbeat import described, place
from .key_value import KeyValue, key_value_opener
from .liveness import ProcessIdentity, is_watchable, this_process
from .store_thread import (
    AGREED,
    HEARTBEAT_S,
    StoreLostError,
    StoreThread,
    decision_key,
    heartbeat_key,
    witness_key,
)

LINGER_S = 10.0
"""How long rank 0 waits at the end for the others to leave: it may host the store."""
LINGER_AFTER_FAILURE_S = 1.0
"""The same after a failure; also how long announcing an error and leaving wait for an answer of the store."""


_innermost: ContextVar[Channel | None] = ContextVar("rankload_channel", default=None)
"""The channel whose block this thread is in."""


class Placed(Protocol):
    """What a channel needs to know of a topology."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...


@contextmanager
def open_channel(topology: Placed, *, stall_timeout_s: float = 120.0, store: Any = None) -> Iterator[Channel]:
    """The channel of one load, over ``store`` or, by default, the default process group's store.

    Every rank of the world must call, as often as every other: the n-th call opens the same channel on all ranks.
    Alone (world size 1) no group is needed. What is raised inside the block, in a stage or between stages, ends it
    for all; the block should end with a stage, so that no rank leaves while another still works. No thread is
    left behind, unless the store's host is stopped, and torch cannot give this rank a connection of its own: then it
    ends with that host.

    Inside the block of another one, what moves in this one moves there too, and a failure there ends this one: its
    other ranks wait meanwhile.

    Args:
        topology: rank and world size; need not be confirmed.
        stall_timeout_s: seconds without progress anywhere after which the ranks that wait raise StalledError.
        store: a ``torch.distributed.Store`` to use instead.

    Raises:
        TopologyError: there is no process group, it has another size or no store, or two processes claim one rank.
        PeerError: another rank died or was interrupted.
        StalledError: nothing moved for ``stall_timeout_s``.
    """
    channel = Channel(
        key_value_opener(topology.world_size, store),
        topology.rank,
        topology.world_size,
        stall_timeout_s,
        within=_innermost.get(),
    )
    entered = _innermost.set(channel)
    try:
        channel.claim_rank()
        yield channel
    except BaseException as error:
        outcome = channel.close(error)
        if outcome is None or outcome is error:
            raise
        raise outcome from _cause_of(outcome, error)
    else:
        channel.close()
    finally:
        _innermost.reset(entered)


class Channel:
    """One rank's end of the channel; see `open_channel`. Used by one thread, unless a method says otherwise."""

    def __init__(
        self,
        open_key_value: Callable[[], KeyValue],
        rank: int,
        world_size: int,
        stall_timeout_s: float,
        *,
        within: Channel | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.stall_timeout_s = stall_timeout_s
        self._process = this_process()
        self.host = self._process.host
        self._store_thread = StoreThread(open_key_value, self._process, rank, world_size, stall_timeout_s)
        self._agreement = Agreement(self._store_thread, rank, world_size, stall_timeout_s)
        self.changes = Changes(self._store_thread, rank, world_size)
        self._failure: BaseException | None = None
        self.absent = 0
        """On rank 0, once it has left: the ranks that have not, and will not. Nobody need wait for them."""
        self._within = within
        self._store_thread.start()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A block that all ranks run; they leave it together, or all raise the same error.

        What the block raises on one rank is raised on all: a RankloadError with its type and message, any
        other exception as a RankloadError that names it (with the original as ``__cause__`` on the rank that
        had it). KeyboardInterrupt and SystemExit go on as they are on their own rank, and are a PeerError on
        the others. A block that works for long calls `progress`: nothing else counts as progress. Every rank
        must enter.
        """
        with self._announcing(name):
            yield
            self._agreement.reach(f"stage '{name}'", b"", None)

    def announced(self, name: str) -> AbstractContextManager[None]:
        """A block whose failure is every rank's, without a wait for the others at its end.

        What it raises on one rank is raised on all, as in `stage`: on the others by their next agreement. So a block
        needs no more where nothing of another rank is needed, and nothing that the user owns is changed, before that
        agreement. Every rank must enter.
        """
        return self._announcing(name)

    def gather(self, name: str, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank, on every rank. Values are what JSON can hold. Every rank must call."""
        return list(json.loads(self._combined(f"gather '{name}'", name, _encode(value), join_json)))

    def gather_bytes(self, name: str, payload: bytes) -> list[bytes]:
        """Every rank's ``payload``, by rank, on every rank. Every rank must call."""
        return split_bytes(self._combined(f"gather_bytes '{name}'", name, lambda: payload, join_bytes))

    def decide(self, name: str, value: Any, decider: Callable[[list[Any]], Any]) -> Any:
        """Runs ``decider`` on rank 0 over every rank's ``value``, by rank; every rank gets what it returns (JSON), or
        raises what it raises. Every rank must call."""

        def combine(parts: Sequence[bytes]) -> bytes:
            return json.dumps(decider([json.loads(part) for part in parts])).encode()

        return json.loads(self._combined(f"decide '{name}'", name, _encode(value), combine))

    def deal(self, name: str, value: Any, dealer: Callable[[list[Any]], list[Any]]) -> Any:
        """As `decide`, but ``dealer`` returns a list with one value for each rank, and each rank gets its own. Every
        rank must call."""

        def combine(parts: Sequence[bytes]) -> list[bytes]:
            dealt = dealer([json.loads(part) for part in parts])
            if len(dealt) != self.world_size:
                raise ValueError(f"{name}: dealt {len(dealt)} values to {self.world_size} ranks")
            return [json.dumps(one).encode() for one in dealt]

        return json.loads(self._combined(f"deal '{name}'", name, _encode(value), combine))

    def progress(self, **counters: float) -> None:
        """Counts a step of progress of this rank, and keeps ``counters`` as its latest; the next heartbeat sends them.

        Sends nothing itself: call it often. Any rank may, at any time, in any thread.

        Raises:
            RankloadError: the failure of another rank, about a second after it was announced.
        """
        store_thread = self._store_thread
        if counters:
            store_thread.counters = {**store_thread.counters, **counters}
        self.moved()
        self._check()

    def check(self) -> None:
        """Raises the failure of another rank, as `progress` does, but counts no progress: for a rank that waits.

        A wait is to call it several times a second. Raises `StalledError` too, where nothing has moved anywhere for
        ``stall_timeout_s``, and this rank has waited for as long.
        """
        self._store_thread.wait()
        self._check()
        stalled = self._stalled()
        if stalled is not None:
            raise stalled

    def heard(self, n_bytes: int, waiting_for: str) -> None:
        """For a wait outside of the channel: counts progress where something came, and else waits, as `check` does.

        A wait is to call it several times a second, with 0; any thread may. `waiting_for` says what for, without
        secrets: it is in the messages of all ranks. Raises as `check` does.
        """
        if n_bytes:
            self._store_thread.waiting_for = ""
            self.moved()
        else:
            self._store_thread.waiting_for = waiting_for
            self._store_thread.wait()
        failure = self.failure() or self._stalled()
        if failure is not None:
            raise failure

    def moved(self) -> None:
        """Counts a step of progress of this rank, and raises nothing. Any thread may call it."""
        self._store_thread.move()
        if self._within is not None:
            self._within.moved()

    @property
    def store_is_lost(self) -> bool:
        """Whether the store has stopped answering this rank."""
        return self._store_thread.lost is not None

    @property
    def waiting_for(self) -> str:
        """What this rank waits for, as `heard` was told last; "" if it came."""
        return self._store_thread.waiting_for

    def failure(self) -> RankloadError | None:
        """The failure of another rank, once it is known here, or of the store. Any thread may call it."""
        if self._store_thread.announced is not None:
            return self._store_thread.announced
        try:
            self._store_thread.check_answering()
        except StoreLostError as error:
            return store_lost(self._store_thread, error, self.rank, self._process)
        except StalledError as error:
            return error
        return None if self._within is None else self._within.failure()

    def announce_standstill(self, where: str) -> RankloadError | None:
        """For another thread, while the channel's own is in native code: announces that the ranks stand still, if so.

        They do where a rank that this one watches lives and has sent nothing for ``stall_timeout_s``, or no rank has
        moved for as long. Returns the error that was settled; None while none is. `where` is for messages.
        """
        error = self._standstill(where)
        return None if error is None else self._first_cause(error, self._store_thread.stage)

    def counters(self) -> dict[int, dict[str, float]]:
        """The latest counters of `progress` by rank, about a second old: of all ranks on rank 0, elsewhere of this rank
        and rank 0."""
        known = {self.rank: dict(self._store_thread.counters)}
        for peer, watch in self._store_thread.watches.items():
            if watch.heartbeat is not None:
                known[peer] = dict(watch.heartbeat.counters)
        return dict(sorted(known.items()))

    def claim_rank(self) -> None:
        """Claims this rank for this process. Every rank calls it once, before anything else.

        Raises `TopologyError`, on all ranks, where another process has claimed the same rank.
        """
        mine = json.dumps(self._process.as_dict())
        with self._announcing(""):
            held = self._store_thread.call(lambda key_value: key_value.settle(claim_key(self.rank), mine))
            if held != mine:
                other = json.loads(held)
                raise TopologyError(
                    f"two processes say that they are rank {self.rank}: pid {other['pid']} on host "
                    f"{other['host']} and pid {self._process.pid} on host {self.host}; check RANK, or the "
                    "launcher's own variable"
                )

    def watch_neighbours(self, ranks: Sequence[int]) -> None:
        """Watches processes of this machine, where this rank is one of its `ranks`, so that a death among them is known
        on all machines within about two seconds: rank 0 sees only the silence of those elsewhere.

        The first of `ranks` watches the others, and they watch the first. All must have claimed their ranks.
        """
        watched = [
            one for one in (ranks[1:] if self.rank == ranks[0] else ranks[:1]) if one not in (0, self.rank)
        ]
        if self.rank == 0 or not watched:
            return
        claims = self._store_thread.call(
            lambda key_value: [key_value.settled(claim_key(one)) for one in watched]
        )
        found = {
            one: ProcessIdentity(**json.loads(told))
            for one, told in zip(watched, claims, strict=True)
            if told
        }
        self._store_thread.neighbours = {
            one: process for one, process in found.items() if is_watchable(process)
        }

    def close(self, error: BaseException | None = None) -> BaseException | None:
        """Leaves the channel and announces ``error`` to the others; returns what to raise in its place.

        After a failure ``changes`` tells whether it came before the first change of any rank, the same on all.
        Rank 0 waits until all have left, `LINGER_S` at most: it may host the store, and others may still have to read
        there what was decided.
        """
        store_thread = self._store_thread
        outcome = None if error is None else self._end(error, store_thread.stage)
        failed = self._failure is not None
        if failed:
            self.changes.conclude(waits=error is None or isinstance(error, Exception))
        try:
            # A store that is lost has failed the channel already; leaving needs no answer.
            with suppress(StoreLostError, RankloadError):
                store_thread.call(self._leave, LINGER_AFTER_FAILURE_S)
                if self.rank == 0:
                    self._linger(LINGER_AFTER_FAILURE_S if failed else LINGER_S)
        finally:
            store_thread.stop(LINGER_AFTER_FAILURE_S)
            self._failure = self._failure or RuntimeError("this channel is closed")
        return outcome

    def _check(self) -> None:
        self._raise_if_over()
        try:
            self._store_thread.check_answering()
        except (StoreLostError, StalledError) as error:
            raise self._end(error, self._store_thread.stage) from error
        outer = None if self._within is None else self._within.failure()
        if outer is not None:
            raise outer

    def _standstill(self, where: str) -> StalledError | None:
        store_thread, longest_s = self._store_thread, self._patience_s
        silent = [watch for watch in store_thread.watches.values() if watch.is_silent_for(longest_s)]
        if not silent and store_thread.still_s <= longest_s:
            return None
        # Whoever does not move is waited for; without a sign of life it is the cause.
        waited_for = silent or [watch for watch in store_thread.watches.values() if not watch.closed]
        seconds = max(watch.silent_s for watch in silent) if silent else store_thread.still_s
        heartbeat = waited_for[0].heartbeat if waited_for else None
        return StalledError(
            f"no progress for {seconds:.0f} s {where} (stall_timeout_s={self.stall_timeout_s:g}); waiting for "
            + described(waited_for),
            rank=waited_for[0].rank if silent else None,
            host=heartbeat.process.host if silent and heartbeat is not None else None,
        )

    @property
    def _patience_s(self) -> float:
        """Rank 0's error comes first, since it sees all ranks; the others see rank 0 alone."""
        return self.stall_timeout_s + (0 if self.rank == 0 else 3 * HEARTBEAT_S)

    def _stalled(self) -> StalledError | None:
        """The error for a rank that waits while nothing moves anywhere."""
        store_thread = self._store_thread
        still_s = min(store_thread.still_s, store_thread.waited_s)
        if still_s <= self._patience_s:
            return None
        return StalledError(
            f"no progress for {still_s:.0f} s {place(store_thread.stage)} "
            f"(stall_timeout_s={self.stall_timeout_s:g}); rank {self.rank} (host {self.host}, pid "
            f"{self._process.pid}) waits for {store_thread.waiting_for or 'what it fetches'}",
            rank=self.rank,
            host=self.host,
        )

    def _combined(self, label: str, name: str, part: Callable[[], bytes], combine: Combine) -> bytes:
        with self._announcing(name):
            return self._agreement.reach(label, part(), combine)

    @contextmanager
    def _announcing(self, stage: str) -> Iterator[None]:
        """Announces what the block raises, which ends the channel for all; raises the error that all ranks raise."""
        self._raise_if_over()
        outer = self._store_thread.stage
        self._store_thread.stage = stage or outer
        try:
            yield
        except BaseException as error:
            outcome = self._end(error, stage)
            if outcome is error:
                raise
            raise outcome from _cause_of(outcome, error)
        finally:
            self._store_thread.stage = outer

    def _end(self, error: BaseException, stage: str) -> BaseException:
        """Announces ``error``; returns what this rank raises: the first failure, which may be another rank's."""
        if self._failure is None:
            self._failure = self._first_cause(error, stage)
        return self._failure if isinstance(error, Exception) else error

    def _first_cause(self, error: BaseException, stage: str) -> RankloadError:
        announced = self._store_thread.announced
        if announced is not None:
            return announced
        if isinstance(error, StoreLostError):
            return store_lost(self._store_thread, error, self.rank, self._process)
        mine = bounded(as_rankload_error(error, self.rank, self._process, stage))
        record = to_record(mine)
        settled = self._announce(record)
        return mine if settled in (None, record) else from_record(str(settled))

    def _announce(self, record: str) -> str | None:
        def settle(key_value: KeyValue) -> str:
            index = self._store_thread.index
            outcome = key_value.settle(decision_key(index), record)
            # This agreement was reached before this rank saw it; the others wait in the next one, so that one fails.
            return outcome if outcome != AGREED else key_value.settle(decision_key(index + 1), record)

        try:
            return self._store_thread.call(settle, LINGER_AFTER_FAILURE_S)
        except (StoreLostError, RankloadError):
            return None  # The others will notice that this rank's process has ended.

    def _leave(self, key_value: KeyValue) -> None:
        self._store_thread.send_last_heartbeat(key_value)
        key_value.count("left", 1)

    def _linger(self, longest_s: float) -> None:
        until, pause_s = time.monotonic() + longest_s, 0.001
        while (
            left := self._store_thread.call(lambda key_value: key_value.count("left", 0))
        ) < self.world_size:
            alive = [watch for watch in self._store_thread.watches.values() if watch.may_still_leave]
            if time.monotonic() > until or not alive:
                break
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)
        self.absent = self.world_size - left
        if left == self.world_size:
            ranks = range(self.world_size)
            spent = [heartbeat_key(rank) for rank in ranks] + [claim_key(rank) for rank in ranks]
            index = self._store_thread.index
            for last in (index, index - 1):
                spent += self._agreement.spent_keys(last)
            spent += self.changes.spent_keys()
            spent += [witness_key(rank) for rank in sorted({0, *self._store_thread.suspects})]
            self._store_thread.call(lambda key_value: key_value.forget([*spent, "left"]))

    def _raise_if_over(self) -> None:
        if self._failure is None:
            self._failure = self._store_thread.announced
        if self._failure is not None:
            raise self._failure


def _cause_of(outcome: BaseException, error: BaseException) -> BaseException:
    """What `outcome` is raised from in the place of `error`: what it came from on this rank, where it is this one's."""
    return outcome.__cause__ or error


def claim_key(rank: int) -> str:
    """The key of the process that is ``rank``."""
    return f"claim/{rank}"


def _encode(value: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(value).encode()
