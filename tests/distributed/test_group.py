"""The default process group: made and destroyed, or used as it is."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from processes import free_port, run_ranks
from rankload.distributed import group, rendezvous, siblings
from rankload.distributed.errors import PeerError, RankloadError, StalledError, TopologyError
from rankload.distributed.group import process_group
from rankload.distributed.liveness import identity_of, this_process
from rankload.distributed.rendezvous import RollCall, meeting_point
from rankload.distributed.session import open_session
from rankload.distributed.topology import Topology, discover_topology

THIS = __file__


def sessions_then_a_group() -> None:
    """Two loads without a group, then the user's own group at the same address, and a load over that."""
    import torch
    import torch.distributed as dist

    for _ in range(2):
        with open_session(stall_timeout_s=20) as session:
            assert dist.is_initialized()
            assert dist.get_backend() == "gloo"
            ones = torch.ones(1)
            dist.all_reduce(ones)
            found = session.topology
            assert ones.item() == found.world_size
        assert not dist.is_initialized()
        assert threading.active_count() == 1
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    with open_session(stall_timeout_s=20) as session:
        assert session.channel.gather("rank", dist.get_rank()) == list(range(dist.get_world_size()))
    assert dist.is_initialized()
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps([found.rank, found.node_rank, found.local_rank, found.n_nodes, found.ranks_by_node]))


def test_a_group_is_made_and_destroyed_and_its_address_is_free_again() -> None:
    finished = run_ranks(f"{THIS}:sessions_then_a_group", 4, deadline_s=60, nodes=(1, 3))
    assert [one.returncode for one in finished] == [0] * 4, finished
    nodes = [[0], [1, 2, 3]]
    places = [(0, 0), (1, 0), (1, 1), (1, 2)]
    for one, (node, local) in zip(finished, places, strict=True):
        assert json.loads(one.stdout) == [one.rank, node, local, 2, nodes]


def open_mpi(rank: int) -> dict[str, str | None]:
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
                "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
    return {
        **dict.fromkeys(torchrun),
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_NODE_RANK": str(rank),
        "PMIX_NAMESPACE": f"test-{os.getpid()}",
    }


def one_load() -> None:
    with open_session(stall_timeout_s=20) as session:
        found = session.topology
    print(json.dumps([found.launcher, found.node_rank, found.local_rank, found.ranks_by_node]))


def test_mpi_on_one_node_needs_no_address() -> None:
    finished = run_ranks(f"{THIS}:one_load", 2, deadline_s=60, env=open_mpi)
    for one in finished:
        assert one.returncode == 0, finished
        assert json.loads(one.stdout) == ["openmpi", 0, one.rank, [[0, 1]]]


def spawned_with_a_file_store(folder: str) -> None:
    """A group that the user made from a FileStore, in processes without any launcher's variables."""
    import torch.distributed as dist

    rank = int(os.environ.pop("MY_RANK"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with open_session(stall_timeout_s=20) as session:
        found = session.topology
        assert (found.rank, found.local_rank, found.launcher) == (rank, rank, "process group")
        assert session.channel.gather("rank", rank) == [0, 1]
    assert dist.is_initialized()
    os.environ.update(RANK=str(rank + 1), WORLD_SIZE="3")
    with pytest.raises(TopologyError, match=rf"RANK={rank + 1} and WORLD_SIZE=3.*rank {rank} of 2"):
        open_session().__enter__()
    dist.barrier()
    dist.destroy_process_group()


def test_an_existing_group_decides_and_is_kept(tmp_path: Any) -> None:
    def env(rank: int) -> dict[str, str | None]:
        return {**dict.fromkeys(open_mpi(0)), "MY_RANK": str(rank)}

    finished = run_ranks(f"{THIS}:spawned_with_a_file_store", 2, args=(tmp_path,), deadline_s=60, env=env)
    assert [one.returncode for one in finished] == [0, 0], finished


def failing_load() -> None:
    """An error inside; the group of its own is gone after it, and so is what it listened on."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    for attempt in range(2):
        try:
            with open_session(stall_timeout_s=20) as session, session.channel.stage("read"):
                if rank == 1:
                    raise OSError(f"attempt {attempt}")
        except RankloadError as error:
            message = str(error)
        assert f"OSError: attempt {attempt}" in message
        assert not dist.is_initialized()
        assert threading.active_count() == 1


def test_the_group_is_destroyed_after_a_failure() -> None:
    finished = run_ranks(f"{THIS}:failing_load", 2, deadline_s=60)
    assert [one.returncode for one in finished] == [0, 0], finished
    assert max(one.seconds for one in finished) < 30


def missing_peer() -> None:
    begin = time.monotonic()
    try:
        open_session(stall_timeout_s=1.5).__enter__()
    except RankloadError as error:
        print(type(error).__name__, error)
        assert time.monotonic() - begin < 12
        return
    sys.exit(1)


def test_a_rank_that_never_comes_is_named() -> None:
    finished = run_ranks(
        f"{THIS}:missing_peer", 1, deadline_s=40, env={"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    )
    assert finished[0].returncode == 0, finished
    assert "StalledError" in finished[0].stdout
    assert "ranks 1, 2 to join" in finished[0].stdout


def stopped_host(when: str) -> None:
    """Rank 0, which hosts the store, is stopped while the others ask that who has joined, or make the group."""
    if os.environ["RANK"] == "0":
        own = getattr(group, when)

        def stopped(*args: Any) -> Any:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGSTOP)
            return own(*args)

        setattr(group, when, stopped)
    begin = time.monotonic()
    try:
        open_session(stall_timeout_s=3).__enter__()
    except RankloadError as error:
        print(type(error).__name__, error)
        assert time.monotonic() - begin < 3 + 10
        return
    sys.exit(1)


@pytest.mark.parametrize("when", ["await_all", "_make_group"])
def test_a_store_whose_host_is_stopped_holds_up_nobody(when: str) -> None:
    finished = run_ranks(
        f"{THIS}:stopped_host", 2, args=(when,), deadline_s=60, nodes=[1, 1], kill_once_others_end=[0]
    )
    assert finished[1].returncode == 0, finished
    assert "PeerError" in finished[1].stdout or "StalledError" in finished[1].stdout


def test_one_rank_needs_no_group() -> None:
    found = discover_topology({}, [])
    with process_group(found) as topology:
        assert topology == found
    with open_session() as session:
        assert session.topology.ranks_by_node == ((0,),)
        assert session.channel.gather("alone", 1) == [1]
    import torch.distributed as dist

    assert not dist.is_initialized()


def test_torchrun_agents_store_is_used() -> None:
    port = str(free_port())
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": port}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3", "GROUP_RANK": "0"}
    assert not meeting_point(discover_topology(environ, []), environ).hosted
    point = meeting_point(discover_topology({**environ, **agent}, []), {**environ, **agent})
    assert point.hosted


def loads_at_an_agents_store(failing: str) -> None:
    """Two loads; in an attempt that is `failing` rank 1 is killed before it joins the second."""
    from rankload.distributed import group

    calls, joins = [], group.open_meeting_store

    def join(*args: Any) -> Any:
        calls.append(args)
        if failing == "yes" and os.environ["RANK"] == "1" and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return joins(*args)

    group.open_meeting_store = join
    for _ in range(2):
        with open_session(stall_timeout_s=3 if failing == "yes" else 20) as session:
            print(session.channel.gather("pid", os.getpid()))


def test_ranks_that_agents_start_again_meet_whatever_each_agent_counts() -> None:
    """An agent counts the failures of its own ranks alone, and its store keeps the keys of all attempts."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for failing, counts in (("yes", (0, 0)), ("no", (0, 1)), ("no", (1, 1)), ("no", (1, 2))):

        def env(rank: int, counts: tuple[int, int] = counts) -> dict[str, str]:
            return {
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": str(counts[rank]),
                "MASTER_PORT": str(store.port),
            }

        finished = run_ranks(
            f"{THIS}:loads_at_an_agents_store", 2, args=(failing,), deadline_s=60, env=env, nodes=(1, 1)
        )
        if failing == "yes":
            assert finished[1].returncode == -signal.SIGKILL, finished
            continue
        assert [one.returncode for one in finished] == [0, 0], finished
        assert finished[0].stdout == finished[1].stdout
        assert max(one.seconds for one in finished) < 20


def test_a_store_that_is_lost_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is silent: a network that was cut. The others' error should not come later for that."""
    asked: list[float] = []
    monkeypatch.setattr(group, "_leave", lambda *_: asked.append(time.monotonic()))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    alone = Topology(0, 0, 1, 1, 0, 1, "environment", socket.gethostname())
    for lost in (True, False):
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        with (
            pytest.raises(PeerError, match="rank 0 is gone"),
            group._own_group(alone, 20.0, lambda: 0, lambda lost=lost: lost),  # type: ignore[misc]
        ):
            raise PeerError("rank 0 is gone")
        assert len(asked) == (0 if lost else 1)


# --- before all have joined ----------------------------------------------------------------------------------------


def dies_before_it_joins(group: str, folder: str) -> None:
    """Rank 1 is killed before it calls, while the others wait; with ``group``, all have made a group of their own."""
    import torch.distributed as dist  # it takes long, and no rank looks for others meanwhile

    rank = int(os.environ["RANK"])
    if group == "group":
        dist.init_process_group("gloo")
    if rank == 1:
        while len(os.listdir(folder)) < 2:
            time.sleep(0.05)
        time.sleep(2 * siblings.LOOK_S + 2)  # the others have seen its process by then
        os.kill(os.getpid(), signal.SIGKILL)
    Path(folder, str(rank)).touch()
    try:
        open_session(stall_timeout_s=100).__enter__()
    except RankloadError as error:
        print(type(error).__name__, error, flush=True)
        os._exit(3)


@pytest.mark.parametrize("group", ["none", "group"])
def test_a_rank_that_is_killed_before_it_joins_is_noticed_by_its_process(group: str, tmp_path: Path) -> None:
    finished = run_ranks(f"{THIS}:dies_before_it_joins", 3, args=(group, tmp_path), deadline_s=80, fork=False)
    assert [one.returncode for one in finished] == [3, -signal.SIGKILL, 3], finished
    for one in (finished[0], finished[2]):
        kind, message = one.stdout.split(maxsplit=1)
        assert kind == "PeerError", finished
        assert re.match(r"rank 1 \(host .+, pid \d+\) ended before ", message), finished
        assert one.seconds - finished[1].seconds < 10, finished


def test_those_who_are_missing_are_named_early(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "LOOK_S", 0.0)
    assert rendezvous.WARN_AFTER_S <= 10
    monkeypatch.setattr(rendezvous, "WARN_AFTER_S", 0.05)
    topology = Topology(0, 0, 30, 4, 0, 8, "torchrun", "here")
    roll_call = RollCall(topology, "to join")
    roll_call.came(2, this_process())
    missing = [1, *range(3, 30)]
    roll_call.look(missing, tells=True)
    assert not caplog.records
    time.sleep(0.06)
    roll_call.look(missing, tells=True)
    roll_call.look(missing, tells=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    said = caplog.records[0].getMessage()
    assert re.fullmatch(
        rf"rank 0 has waited for 0 s for ranks 1, 3, 4, .*, 17 and 12 more to join \(2 of 30 are there, on "
        rf"{socket.gethostname()}\)",
        said,
    ), said
    ended = subprocess.Popen(["sleep", "60"])
    died = identity_of(ended.pid)
    ended.kill()
    ended.wait()
    assert died is not None
    roll_call.came(5, died)
    with pytest.raises(PeerError, match=rf"rank 5 .*pid {ended.pid}\) ended before all ranks had joined"):
        roll_call.look(missing, tells=False)


def one_call_more() -> None:
    """Without a group: rank 0 makes a second call, rank 1 none."""
    with open_session(stall_timeout_s=20):
        pass
    if os.environ["RANK"] == "1":
        time.sleep(6)
        return
    with pytest.raises(StalledError) as caught:
        open_session(stall_timeout_s=1.5).__enter__()
    print(caught.value)


def test_a_call_that_others_do_not_make_is_told_so() -> None:
    finished = run_ranks(f"{THIS}:one_call_more", 2, deadline_s=40)
    assert [one.returncode for one in finished] == [0, 0], finished
    assert re.search(
        r"rank 0 waited [1-4] s \(stall_timeout_s=1.5\) for rank 1 to join: every rank must make the same calls; this "
        r"rank makes its call number 2 \(1 of 2 are there",
        finished[0].stdout,
    ), finished
