"""Agreement between ranks: threads over one store for the protocol, real processes for deaths and stalls."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from processes import Finished, run_ranks
from rankload.distributed import liveness
from rankload.distributed.channel import Channel, open_channel
from rankload.distributed.errors import PeerError, RankloadError, StalledError, TopologyError
from rankload.distributed.heartbeat import SILENT_AFTER_S, SUSPECT_AFTER_S, Heartbeat, PeerWatch, Witness
from rankload.distributed.key_value import VALUE_BYTES, KeyValue
from rankload.distributed.liveness import ProcessIdentity, how_ended, this_process
from rankload.distributed.store_thread import SLEPT_S, StoreThread

THIS = __file__


class CustomError(RankloadError):
    """A checkpoint's error, as the loader has them."""


def hash_store() -> Any:
    from torch.distributed import HashStore

    return HashStore()


def in_threads(
    world_size: int, work: Callable[[Channel], Any], stall_timeout_s: float = 20.0, store: Any = None
) -> list[Any]:
    """What ``work`` returns or raises on each of the ranks, which are threads that share a store."""
    shared = store or hash_store()
    outcomes: list[Any] = [None] * world_size

    def rank_main(rank: int) -> None:
        channel = Channel(lambda: KeyValue(shared), rank, world_size, stall_timeout_s)
        try:
            outcomes[rank] = work(channel)
            channel.close()
        except BaseException as error:
            outcomes[rank] = channel.close(error)

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any("rankload" in thread.name for thread in threading.enumerate())
    return outcomes


def same_error(outcomes: list[Any], kind: type[RankloadError]) -> str:
    assert {type(outcome) for outcome in outcomes} == {kind}, outcomes
    messages = {str(outcome) for outcome in outcomes}
    assert len(messages) == 1, messages
    return messages.pop()


def test_all_ranks_agree_and_keys_are_removed() -> None:
    store = hash_store()

    def work(channel: Channel) -> Any:
        with channel.stage("outer"):
            gathered = channel.gather("inner", {"rank": channel.rank, "none": None})
        big = channel.gather_bytes("bytes", bytes([channel.rank]) * (2 * VALUE_BYTES + channel.rank))
        total = channel.decide("sum", channel.rank, sum)
        own = channel.deal("shares", channel.rank, lambda ranks: [[rank, sum(ranks)] for rank in ranks])
        assert own == [channel.rank, 3]
        return gathered, [(len(one), one[:1]) for one in big], total

    outcomes = in_threads(3, work, store=store)
    gathered = [{"rank": rank, "none": None} for rank in range(3)]
    sizes = [(2 * VALUE_BYTES + rank, bytes([rank])) for rank in range(3)]
    assert outcomes == [(gathered, sizes, 3)] * 3
    assert store.num_keys() == 0


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_channel(SimpleNamespace(rank=0, world_size=1)) as channel:
        with channel.stage("one"):
            channel.progress(bytes_done=3)
        assert channel.gather("g", [1]) == [[1]]
        assert channel.gather_bytes("b", b"\0x") == [b"\0x"]
        assert channel.counters() == {0: {"bytes_done": 3}}
    with pytest.raises(RuntimeError, match="closed"):
        channel.progress()
    with (
        pytest.raises(RankloadError, match="ValueError: no") as caught,
        open_channel(SimpleNamespace(rank=0, world_size=1)) as channel,
        channel.stage("one"),
    ):
        raise ValueError("no")
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_on_one_rank_is_raised_on_all() -> None:
    def work(channel: Channel) -> None:
        with channel.stage("read"):
            if channel.rank == 1:
                error = CustomError("no such file", path="a.pt")
                error.details = {"names": ["x"]}  # type: ignore[attr-defined]
                raise error

    outcomes = in_threads(3, work)
    assert same_error(outcomes, CustomError).startswith("no such file [met by rank 1, host ")
    assert all((one.path, one.details) == ("a.pt", {"names": ["x"]}) for one in outcomes)


def test_another_exception_is_wrapped_and_kept_as_the_cause() -> None:
    def work(channel: Channel) -> None:
        with channel.stage("read"):
            if channel.rank == 2:
                raise OSError(28, "No space left on device")

    outcomes = in_threads(3, work)
    assert "OSError: [Errno 28] No space left on device [met by rank 2" in same_error(outcomes, RankloadError)
    assert isinstance(outcomes[2].__cause__, OSError)
    assert outcomes[0].__cause__ is None


def test_the_first_cause_stays_the_cause_whatever_is_raised_on_its_way_out() -> None:
    def walk() -> None:
        with open_channel(SimpleNamespace(rank=0, world_size=1)) as channel:
            try:
                with channel.stage("one"):
                    raise ValueError("first")
            finally:
                raise KeyError("second")

    with pytest.raises(RankloadError, match="ValueError: first") as caught:
        walk()
    assert isinstance(caught.value.__cause__, ValueError)


def test_the_first_cause_wins_and_later_use_raises_it_again() -> None:
    seen: list[BaseException] = []

    def work(channel: Channel) -> None:
        try:
            with channel.stage("read"):
                time.sleep(0.2 * channel.rank)
                raise ValueError(f"from {channel.rank}")
        except RankloadError:
            pass
        for use in (channel.progress, lambda: channel.gather("later", 1)):
            try:
                use()
            except RankloadError as error:
                seen.append(error)
        with channel.stage("later"):
            pass

    assert "ValueError: from 0" in same_error(in_threads(3, work), RankloadError)
    assert len(seen) == 6
    assert {str(error) for error in seen} == {str(seen[0])}


def test_what_the_decider_raises_is_raised_on_all() -> None:
    def refuse(values: list[int]) -> None:
        raise CustomError(f"got {values}")

    outcomes = in_threads(3, lambda channel: channel.decide("args", channel.rank, refuse))
    assert "got [0, 1, 2]" in same_error(outcomes, CustomError)


def test_a_value_that_json_cannot_hold_fails_everywhere() -> None:
    outcomes = in_threads(2, lambda channel: channel.gather("g", {1} if channel.rank else 1))
    assert "TypeError" in same_error(outcomes, RankloadError)


def test_an_error_between_stages_reaches_the_ranks_that_wait() -> None:
    def work(channel: Channel) -> None:
        if channel.rank == 0:
            time.sleep(0.3)
            raise KeyError("lost")
        with channel.stage("next"):
            pass

    assert "KeyError: 'lost'" in same_error(in_threads(3, work), RankloadError)


def test_differently_named_stages() -> None:
    def work(channel: Channel) -> None:
        with channel.stage("fetch" if channel.rank < 2 else "restore"):
            pass

    message = same_error(in_threads(3, work), RankloadError)
    assert "rank 0 in stage 'fetch'" in message
    assert "rank 2 in stage 'restore'" in message


def test_a_rank_that_works_learns_of_a_failure_by_progress() -> None:
    seconds: dict[int, float] = {}

    def work(channel: Channel) -> None:
        begin = time.monotonic()
        try:
            with channel.stage("read"):
                if channel.rank == 1:
                    raise ValueError("early")
                while channel.rank == 2:
                    channel.progress()
                    time.sleep(0.01)
        finally:
            seconds[channel.rank] = time.monotonic() - begin

    assert "ValueError: early" in same_error(in_threads(3, work), RankloadError)
    assert max(seconds.values()) < 3


def test_a_rank_that_left_is_not_waited_for() -> None:
    def work(channel: Channel) -> None:
        with channel.stage("both"):
            pass
        if channel.rank == 1:
            return
        with channel.stage("not all"):
            pass

    outcomes = in_threads(3, work)
    assert outcomes[1] is None
    assert "rank 1 left the load" in same_error([outcomes[0], outcomes[2]], PeerError)


def test_a_rank_without_progress_is_a_stall_and_one_with_progress_is_not() -> None:
    def work(channel: Channel) -> None:
        with channel.stage("slow"):
            for step in range(20 if channel.rank == 2 else 0):
                time.sleep(0.2)
                channel.progress(step=step)
        with channel.stage("stuck"):
            if channel.rank == 2:
                time.sleep(4)

    begin = time.monotonic()
    message = same_error(in_threads(3, work, stall_timeout_s=2), StalledError)
    assert "stage 'stuck' (stall_timeout_s=2); waiting for rank 2" in message
    assert "step=19" in message
    assert 6 < time.monotonic() - begin < 11


def test_rank_zero_knows_the_counters_of_all() -> None:
    def work(channel: Channel) -> Any:
        channel.progress(bytes_done=channel.rank + 1.0)
        with channel.stage("one"):
            time.sleep(2.2)
        return channel.counters()

    outcomes = in_threads(3, work)
    assert outcomes[0] == {rank: {"bytes_done": rank + 1.0} for rank in range(3)}
    assert outcomes[2] == {0: {"bytes_done": 1.0}, 2: {"bytes_done": 3.0}}


def test_a_process_that_ended_is_told_from_one_that_lives() -> None:
    me = this_process()
    assert how_ended(me) is None
    assert how_ended(SimpleNamespace(**{**vars(me), "started": me.started + 1})) == "its process is gone"
    assert how_ended(SimpleNamespace(**{**vars(me), "machine": "other"})) is None
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        os._exit(3)
    try:
        with open(f"/proc/{child}/stat") as file:
            started = int(file.read().rpartition(")")[2].split()[19])
        process = SimpleNamespace(**{**vars(me), "pid": child, "started": started})
        assert how_ended(process) is None
        os.kill(child, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while how_ended(process) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert how_ended(process) in ("killed by SIGKILL", "its process has ended")
    finally:
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


# What follows runs in processes: each function is the main function of a rank.


def rank_store(world_size: int) -> Any:
    from torch.distributed import TCPStore

    return TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, os.environ["RANK"] == "0",
        timedelta(seconds=60),
    )  # fmt: skip


def fault(kind: str, victim: str, stall_timeout_s: str) -> None:
    """All ranks go through a stage; in the next one, something happens to the victim."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = rank_store(world_size)
    begin = time.monotonic()
    try:
        with open_channel(
            SimpleNamespace(rank=rank, world_size=world_size),
            stall_timeout_s=float(stall_timeout_s),
            store=store,
        ) as channel:
            with channel.stage("before"):
                pass
            time.sleep(0.3)
            begin = time.monotonic()
            with channel.stage("fault"):
                if rank == int(victim):
                    {
                        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
                        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
                        "exit": lambda: os._exit(0),
                    }[kind]()
                # Where a rank dies, the last one works on and on; the others wait.
                while rank == world_size - 1 and kind != "stop":
                    time.sleep(0.05)
                    channel.progress()
    except RankloadError as error:
        print(type(error).__name__, f"{time.monotonic() - begin:.2f}", error, flush=True)
        sys.exit(7)
    sys.exit(0)


def a_death_on_another_machine(stall_timeout_s: str) -> None:
    """Rank 0 sees no process of the others, as from another machine; ranks 1 and 2 watch each other; 2 is killed."""
    from rankload.distributed import heartbeat

    rank = int(os.environ["RANK"])
    if rank == 0:
        heartbeat.is_watchable = lambda process: False
        heartbeat.how_ended = lambda process: None
    begin = time.monotonic()
    try:
        with open_channel(
            SimpleNamespace(rank=rank, world_size=3),
            stall_timeout_s=float(stall_timeout_s),
            store=rank_store(3),
        ) as channel:
            with channel.stage("before"):
                pass
            channel.watch_neighbours([0] if rank == 0 else [1, 2])
            with channel.stage("fault"):
                begin = time.monotonic()
                if rank == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
    except RankloadError as error:
        print(type(error).__name__, f"{time.monotonic() - begin:.2f}", error, flush=True)
        sys.exit(7)
    sys.exit(0)


def test_a_death_is_known_on_all_machines_soon() -> None:
    finished = run_ranks(f"{THIS}:a_death_on_another_machine", 3, args=(60,), deadline_s=40)
    assert finished[2].returncode == -signal.SIGKILL
    for one in finished[:2]:
        error, seconds, message = outcome(one)
        assert error == "PeerError"
        assert "rank 2 (host " in message
        # Its silence alone would have told later.
        assert "no sign of life" not in message
        assert seconds < SILENT_AFTER_S


def a_stop_on_another_machine(victim: str, stall_timeout_s: str) -> None:
    """Ranks 0 and 1 see no process of ranks 2 and 3, nor these of them: two machines, and a store that outlives all.

    The victim stops before anybody knows where the others are.
    """
    from rankload.distributed import channel as channels
    from rankload.distributed import heartbeat, store_thread
    from torch.distributed import TCPStore

    rank = int(os.environ["RANK"])
    mine = f"machine {rank // 2}"
    machine, watchable = liveness.machine_identity(), liveness.is_watchable

    def is_watchable(process: ProcessIdentity) -> bool:
        return process.machine == mine and watchable(replace(process, machine=machine))

    def seen(look: Callable[[ProcessIdentity], Any]) -> Callable[[ProcessIdentity], Any]:
        return lambda process: look(replace(process, machine=machine)) if is_watchable(process) else None

    for module in (heartbeat, store_thread):
        module.is_watchable = is_watchable
        module.how_ended = seen(liveness.how_ended)
        module.is_stopped = seen(liveness.is_stopped)
    channels.this_process = lambda: replace(this_process(), machine=mine)
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    begin = time.monotonic()
    try:
        with (
            open_channel(
                SimpleNamespace(rank=rank, world_size=4), stall_timeout_s=float(stall_timeout_s), store=store
            ) as channel,
            channel.stage("places"),
        ):
            if rank == int(victim):
                time.sleep(1.5)  # its heartbeat has told of it by then
                os.kill(os.getpid(), signal.SIGSTOP)
    except RankloadError as error:
        print(type(error).__name__, f"{time.monotonic() - begin:.2f}", error, flush=True)
        sys.exit(7)
    sys.exit(0)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_stopped_on_another_machine_is_not_dead(victim: int) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stall_timeout_s = SILENT_AFTER_S + 2
    finished = run_ranks(
        f"{THIS}:a_stop_on_another_machine",
        4,
        args=(victim, stall_timeout_s),
        deadline_s=60,
        env={"MASTER_PORT": str(store.port)},
        kill_once_others_end=[victim],
    )
    others = [one for one in finished if one.rank != victim]
    assert [one.returncode for one in others] == [7] * 3, finished
    for one in others:
        error, seconds, message = outcome(one)
        assert error == "StalledError", finished
        assert f"rank {victim} (host" in message
        assert seconds < 1.5 + stall_timeout_s + 5
    told = outcome(others[0])[2]
    assert "the process is stopped" in told, told


def test_a_rank_that_was_stopped_hears_of_all_before_it_settles_anything() -> None:
    store_thread = StoreThread(lambda: KeyValue(hash_store()), this_process(), 0, 3, 5.0)
    waiting, left = store_thread.watches.values()
    sent = iter(range(100))

    def beats(watch: PeerWatch, **more: Any) -> None:
        watch.observe(Heartbeat(next(sent), this_process(), **more).encode(), 1.0)

    beats(waiting)
    beats(left)
    assert store_thread.unheard() == []
    store_thread._last_look -= SLEPT_S + 1
    assert store_thread.unheard() == [waiting, left]
    store_thread._last_look = time.monotonic()
    # One may have been on its way while this rank was stopped.
    beats(waiting)
    assert store_thread.unheard() == [waiting, left]
    beats(waiting)
    beats(left)
    beats(left, closed=True)
    assert store_thread.unheard() == [left]


def test_a_process_that_its_neighbour_sees_stopped_is_silent_and_not_dead() -> None:
    watch = PeerWatch(1)
    elsewhere = replace(this_process(), machine="another")
    watch.observe(Heartbeat(1, elsewhere).encode(), 1.0)
    watch.observe(None, SILENT_AFTER_S)
    assert "no sign of life" in str(watch.death())
    assert not watch.may_still_leave
    watch.stopped = True
    assert watch.death() is None
    assert not watch.may_still_leave
    assert "the process is stopped" in watch.describe()


def test_a_silent_process_that_a_witness_sees_is_not_dead() -> None:
    watch = PeerWatch(1)
    elsewhere = replace(this_process(), machine="another")
    watch.observe(Heartbeat(1, elsewhere).encode(), 1.0)
    assert not watch.is_suspect
    watch.observe(None, SUSPECT_AFTER_S + 0.1)
    assert watch.is_suspect
    watch.hear(None, 1.0)
    watch.hear(Witness(2, 1, stopped=True).encode(), 1.0)
    watch.observe(None, SILENT_AFTER_S)
    assert watch.death() is None
    assert "the process is stopped" in watch.describe()
    assert not watch.may_still_leave
    # Starved, and going on: it is waited for.
    watch.hear(Witness(2, 2, stopped=False).encode(), 1.0)
    assert watch.death() is None
    assert "stopped" not in watch.describe()
    assert watch.may_still_leave
    # A witness that says nothing more is no witness, nor is one of an earlier silence.
    watch.hear(Witness(2, 2, stopped=False).encode(), SILENT_AFTER_S)
    assert "no other rank sees its process" in str(watch.death())
    watch.hear(Witness(2, 3, stopped=False).encode(), 1.0)
    assert watch.death() is None
    watch.observe(Heartbeat(2, elsewhere).encode(), 1.0)
    watch.observe(None, SILENT_AFTER_S)
    watch.hear(Witness(2, 3, stopped=False).encode(), 1.0)
    assert "no other rank sees its process" in str(watch.death())


def outcome(finished: Finished) -> tuple[str, float, str]:
    assert finished.returncode == 7, finished
    kind, seconds, message = finished.stdout.split(maxsplit=2)
    return kind, float(seconds), message


@pytest.mark.parametrize(
    ("kind", "victim", "returncode", "words"),
    [
        ("kill", 1, -9, ["rank 1 (host ", "pid ", "in stage 'fault'"]),
        ("kill", 0, -9, ["rank 0 (host ", "pid ", "in stage 'fault'"]),
        ("exit", 1, 0, ["rank 1 (host ", "in stage 'fault'"]),
    ],
)
def test_the_end_of_a_rank_is_noticed_by_all(
    kind: str, victim: int, returncode: int, words: list[str]
) -> None:
    finished = run_ranks(f"{THIS}:fault", 3, args=(kind, victim, 60), deadline_s=40)
    assert finished[victim].returncode == returncode, finished
    ended = [outcome(one) for one in finished if one.rank != victim]
    assert len({message for _, _, message in ended}) == 1, ended
    for error, seconds, message in ended:
        assert error == "PeerError"
        assert seconds < 10
        for word in words:
            assert word in message


@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_rank_counts_as_stalled(victim: int) -> None:
    finished = run_ranks(
        f"{THIS}:fault", 3, args=("stop", victim, 2), deadline_s=40, kill_once_others_end=[victim]
    )
    for one in finished:
        if one.rank != victim:
            error, seconds, message = outcome(one)
            assert error == "StalledError"
            assert f"rank {victim} (host " in message
            assert "the process is stopped" in message
            assert seconds < 12


def rarely_together(folder: str) -> None:
    """Over the default group, with a short time-out: a slow stage; a FileStore; then a rank that never comes."""
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = SimpleNamespace(rank=rank, world_size=world_size)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    short = timedelta(seconds=0.25)
    dist.distributed_c10d._set_pg_timeout(short)
    dist.distributed_c10d._get_default_store().set_timeout(short)
    with open_channel(place, stall_timeout_s=2) as channel, channel.stage("slow"):
        for _ in range(26 if rank == 1 else 0):
            time.sleep(0.1)
            channel.progress()
    with open_channel(place, store=dist.FileStore(f"{folder}/store", world_size)) as channel:
        assert channel.gather("file", rank) == [0, 1]
        assert channel.gather_bytes("file", b"x" * 3_000_000) == [b"x" * 3_000_000] * 2
    try:
        with open_channel(SimpleNamespace(rank=0, world_size=2)) as channel:
            channel.gather("both are rank 0", 1)
    except TopologyError as error:
        message = str(error)
    assert "two processes say that they are rank 0" in message
    if rank == 1:
        time.sleep(5)
        os._exit(0)
    with (
        pytest.raises(StalledError, match=r"waiting for rank 1 \(.*never heard of"),
        open_channel(place, stall_timeout_s=2) as channel,
    ):
        channel.gather("nobody comes", 1)
    os._exit(0)


def test_over_a_default_group(tmp_path: Any) -> None:
    finished = run_ranks(f"{THIS}:rarely_together", 2, args=(tmp_path,), deadline_s=60)
    assert [one.returncode for one in finished] == [0, 0], finished
    assert "time" not in "".join(one.stderr for one in finished).lower(), finished


def calls_apart(how: str) -> None:
    """Over the user's group: rank 1 makes one call, and then none, or ends; the others make a second one."""
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = SimpleNamespace(rank=rank, world_size=world_size)
    dist.init_process_group("gloo")
    with open_channel(place) as channel:
        channel.gather("all", rank)
    if rank == 1:
        if how == "ends":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(20)
        os._exit(0)
    begin = time.monotonic()
    try:
        with open_channel(place, stall_timeout_s=60 if how == "ends" else 2) as channel:
            channel.gather("once more", rank)
    except RankloadError as error:
        print(type(error).__name__, f"{time.monotonic() - begin:.2f}", error, flush=True)
        os._exit(7)


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("ends", "PeerError", r"rank 1 \(host .+, pid \d+\) ended before it came to this call: "),
        (
            "calls no more",
            "StalledError",
            r"waiting for rank 1 \(host .+ never heard of in this call: it has made 1 ",
        ),
    ],
)
def test_a_rank_that_does_not_make_the_same_calls_is_named(how: str, kind: str, words: str) -> None:
    finished = run_ranks(f"{THIS}:calls_apart", 3, args=(how,), deadline_s=60, kill_once_others_end=[1])
    for one in (finished[0], finished[2]):
        error, seconds, message = outcome(one)
        assert (error, bool(re.search(words, message))) == (kind, True), finished
        assert seconds < 10
