"""Discovery from every launcher's environment, and confirmation among the ranks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.distributed.errors import TopologyError
from rankload.distributed.rendezvous import first_of_nodes, meeting_point
from rankload.distributed.topology import (
    Topology,
    arrange,
    confirm_topology,
    discover_topology,
    group_topology,
)

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2",
}  # fmt: skip
COMPOSER = {"RANK": "5", "LOCAL_RANK": "1", "NODE_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_NODE_RANK": "1", "PMIX_RANK": "5",
}  # fmt: skip
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "5", "MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "4",
}  # fmt: skip
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
DEEPSPEED_MPICH = {"PMIX_RANK": "5", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "PALS_LOCAL_RANKID": "1"}
SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_NNODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "launcher", "assumed"),
    [
        (TORCHRUN, "torchrun", set()),
        (DEEPSPEED, "deepspeed", set()),
        (COMPOSER, "composer", {"n_nodes"}),
        (OPEN_MPI, "openmpi", {"node_rank", "n_nodes"}),
        (MVAPICH, "mvapich", {"node_rank", "n_nodes"}),
        (HYDRA, "hydra", {"node_rank", "n_nodes"}),
        (DEEPSPEED_MPICH, "hydra", {"node_rank", "n_nodes"}),
        (SLURM, "slurm", set()),
    ],
)
def test_every_launcher(environ: dict[str, str], launcher: str, assumed: set[str]) -> None:
    found = discover_topology(environ, [])
    assert (found.rank, found.world_size, found.launcher) == (5, 8, launcher)
    assert (found.local_rank, found.local_world_size, found.node_rank, found.n_nodes) == (1, 4, 1, 2)
    assert found.assumed == assumed
    assert found.ranks_by_node == ()


def test_plain_python_is_one_rank() -> None:
    found = discover_topology({"MASTER_ADDR": "x", "WORLD_SIZE": "1"}, ["--local_rank=3"])
    assert (found.rank, found.world_size, found.launcher, found.assumed) == (0, 1, "python", frozenset())


def test_rank_and_world_size_alone() -> None:
    found = discover_topology({"RANK": "2", "WORLD_SIZE": "3"}, [])
    assert (found.rank, found.world_size, found.launcher) == (2, 3, "environment")
    assert found.assumed == {"local_rank", "local_world_size", "node_rank", "n_nodes"}


def test_deepspeed_takes_the_local_rank_from_the_command_line() -> None:
    environ = {name: value for name, value in DEEPSPEED.items() if name != "LOCAL_RANK"}
    assert discover_topology(environ, ["--local_rank=1"]).local_rank == 1
    assert discover_topology(environ, ["--local_rank", "1"]).local_rank == 1


def test_torchrun_agents_under_srun_or_mpirun_are_no_contradiction() -> None:
    outer = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "OMPI_COMM_WORLD_RANK": "1",
             "OMPI_COMM_WORLD_SIZE": "2"}  # fmt: skip
    assert discover_topology({**TORCHRUN, **outer}, []).launcher == "torchrun"
    daemon = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    assert discover_topology({**OPEN_MPI, **daemon}, []).launcher == "openmpi"


@pytest.mark.parametrize("step", [None, "4294967291", "batch"])
def test_a_batch_shell_is_no_slurm_rank(step: str | None) -> None:
    environ = {**SLURM, "SLURM_STEP_ID": step} if step else {**SLURM}
    if step is None:
        del environ["SLURM_STEP_ID"]
    assert discover_topology({k: v for k, v in environ.items() if v is not None}, []).launcher == "python"


@pytest.mark.parametrize(
    ("environ", "argv", "words"),
    [
        ({"RANK": "5", "WORLD_SIZE": "4"}, [], ["RANK=5 but WORLD_SIZE=4"]),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, [], ["LOCAL_RANK=4 but LOCAL_WORLD_SIZE=4"]),
        ({**TORCHRUN, "GROUP_RANK": "2"}, [], ["GROUP_RANK=2 but GROUP_WORLD_SIZE=2"]),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, [], ["LOCAL_WORLD_SIZE=9 but WORLD_SIZE=8"]),
        ({"RANK": "one", "WORLD_SIZE": "4"}, [], ["RANK='one' is no integer"]),
        ({"RANK": "1_0", "WORLD_SIZE": "40"}, [], ["RANK='1_0' is no integer"]),
        ({"RANK": "", "WORLD_SIZE": "4"}, [], ["RANK='' is no integer"]),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, [], ["RANK=-1", "0 or more"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, [], ["WORLD_SIZE=0", "1 or more"]),
        ({"RANK": "0"}, [], ["RANK is set, but WORLD_SIZE is not"]),
        ({"WORLD_SIZE": "4"}, [], ["WORLD_SIZE=4", "rank"]),
        (DEEPSPEED, ["--local_rank=3"], ["LOCAL_RANK=1", "--local_rank=3"]),
        ({"RANK": "1", "WORLD_SIZE": "8", **OPEN_MPI}, [], ["RANK=1", "OMPI_COMM_WORLD_RANK=5"]),
        ({"RANK": "1", "WORLD_SIZE": "4", **SLURM}, [], ["WORLD_SIZE=4", "SLURM_NTASKS=8"]),
        ({**OPEN_MPI, **MVAPICH, "MV2_COMM_WORLD_RANK": "4"}, [], ["MV2_COMM_WORLD_RANK=4", "OMPI_COMM_WORLD_RANK=5"]),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, [],
         ["LOCAL_WORLD_SIZE=4", "LOCAL_SIZE=2"]),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "4"}, [], ["SLURM_STEP_NUM_TASKS=4", "SLURM_NTASKS=8"]),
    ],
)  # fmt: skip
def test_contradictions_are_named(environ: dict[str, str], argv: list[str], words: list[str]) -> None:
    with pytest.raises(TopologyError) as caught:
        discover_topology(environ, argv)
    for word in words:
        assert word in str(caught.value)


NAMES = sorted({*TORCHRUN, *DEEPSPEED, *COMPOSER, *OPEN_MPI, *HYDRA, *SLURM})


@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["0", "1", "2", "5", "-1", "x", "", "4(x2)"])))
def test_any_environment_gives_a_sound_topology_or_a_named_error(environ: dict[str, str]) -> None:
    found, error = None, ""
    try:
        found = discover_topology(environ, [])
    except TopologyError as caught:
        error = str(caught)
    if found is None:
        assert any(name in error for name in environ)
        return
    assert 0 <= found.rank < found.world_size
    assert 0 <= found.local_rank < found.local_world_size <= found.world_size
    assert 0 <= found.node_rank < found.n_nodes <= found.world_size


def test_the_group_decides_unless_rank_variables_say_otherwise() -> None:
    plain = discover_topology({}, [])
    assert group_topology(0, 1, plain) is plain
    spawned = group_topology(2, 4, plain)
    assert (spawned.rank, spawned.world_size, spawned.launcher) == (2, 4, "process group")
    under_slurm = group_topology(2, 4, discover_topology({**SLURM}, []))
    assert (under_slurm.rank, under_slurm.world_size) == (2, 4)
    with pytest.raises(TopologyError, match=r"RANK=5 and WORLD_SIZE=8.*rank 2 of 4"):
        group_topology(2, 4, discover_topology(TORCHRUN, []))


class Alone:
    """Stands in for a channel: every report is known, and the decision is made at once."""

    def __init__(self, others: list[dict[str, Any]]) -> None:
        self.others = others

    def decide(self, name: str, value: Any, decider: Any) -> Any:
        reports = [*self.others]
        reports[value["rank"]] = value
        return decider(reports)


def report(topology: Topology, machine: str = "m", pid: int = 1) -> dict[str, Any]:
    return {**asdict(topology), "assumed": sorted(topology.assumed), "machine": machine, "pid": pid}


def reports(environs: list[dict[str, str]], hosts: list[str]) -> list[dict[str, Any]]:
    found = [report(discover_topology(environ, [])) for environ in environs]
    return [{**one, "host": host} for one, host in zip(found, hosts, strict=True)]


def test_nodes_come_from_hosts_where_no_launcher_numbers_them() -> None:
    environs = [{"RANK": str(rank), "WORLD_SIZE": "4"} for rank in range(4)]
    assert arrange(reports(environs, ["b", "a", "b", "a"])) == [[0, 2], [1, 3]]


def test_open_mpi_nodes_come_from_hosts() -> None:
    environs = [
        {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
         "OMPI_COMM_WORLD_LOCAL_RANK": str(rank // 2), "OMPI_COMM_WORLD_NODE_RANK": str(rank // 2)}
        for rank in range(4)
    ]  # fmt: skip
    assert arrange(reports(environs, ["a", "b", "a", "b"])) == [[0, 2], [1, 3]]


def torchrun_rank(rank: int, **changes: str) -> dict[str, str]:
    return {
        **TORCHRUN, "RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2),
        "GROUP_RANK": str(rank // 2), **changes,
    }  # fmt: skip


def test_two_agents_on_one_host_are_two_nodes() -> None:
    assert arrange(reports([torchrun_rank(rank) for rank in range(4)], ["h"] * 4)) == [[0, 1], [2, 3]]


def test_ranks_of_a_node_are_in_order_of_local_rank() -> None:
    environs = [torchrun_rank(rank, LOCAL_RANK=str(1 - rank % 2)) for rank in range(4)]
    assert arrange(reports(environs, ["h"] * 4)) == [[1, 0], [3, 2]]


@pytest.mark.parametrize(
    ("environs", "hosts", "words"),
    [
        ([torchrun_rank(rank) for rank in (0, 1, 3, 3)], ["h"] * 4, ["rank 3", "rank 2 of 4 was expected"]),
        ([torchrun_rank(rank) for rank in range(3)] + [torchrun_rank(3, WORLD_SIZE="5")], ["h"] * 4,
         ["rank 3", "WORLD_SIZE=5"]),
        ([torchrun_rank(rank, GROUP_RANK="0", LOCAL_WORLD_SIZE="4", GROUP_WORLD_SIZE="1") for rank in range(4)],
         ["h"] * 4,
         ["rank 0", "rank 2", "LOCAL_RANK=0"]),
        ([torchrun_rank(rank) for rank in range(4)], ["h", "i", "h", "h"], ["both say", "node 0"]),
        ([torchrun_rank(rank, LOCAL_WORLD_SIZE="4", GROUP_WORLD_SIZE="2") for rank in range(4)], ["h"] * 4,
         ["local_world_size=4", "2"]),
        ([{"RANK": str(r), "WORLD_SIZE": "4", "LOCAL_RANK": str(r % 2)} for r in range(4)], ["h"] * 4,
         ["rank 0", "rank 2", "LOCAL_RANK=0", "NODE_RANK"]),
        ([{**COMPOSER, "RANK": str(r), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0",
           "NODE_RANK": str(2 * r)} for r in range(2)], ["h", "i"], ["no rank is on node 1"]),
        ([{"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank)} for rank in range(3)], ["h", "h", "i"],
         ["local rank 0 is missing"]),
    ],
)  # fmt: skip
def test_ranks_that_contradict_each_other(
    environs: list[dict[str, str]], hosts: list[str], words: list[str]
) -> None:
    with pytest.raises(TopologyError) as caught:
        arrange(reports(environs, hosts))
    for word in words:
        assert word in str(caught.value)


def test_confirmation_fills_everything_in() -> None:
    mine = discover_topology({"RANK": "1", "WORLD_SIZE": "2"}, [])
    other = report(discover_topology({"RANK": "0", "WORLD_SIZE": "2"}, []))
    confirmed = confirm_topology(mine, Alone([{**other, "host": "elsewhere"}, {}]))
    assert confirmed.assumed == frozenset()
    assert confirmed.ranks_by_node == ((0,), (1,))
    assert (confirmed.node_rank, confirmed.local_rank, confirmed.local_world_size, confirmed.n_nodes) == (
        1,
        0,
        1,
        2,
    )


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.randoms())
def test_any_placement_on_hosts_is_recovered(sizes: list[int], shuffle: Any) -> None:
    hosts = [f"h{node}" for node, size in enumerate(sizes) for _ in range(size)]
    shuffle.shuffle(hosts)
    environs = [{"RANK": str(rank), "WORLD_SIZE": str(len(hosts))} for rank in range(len(hosts))]
    nodes = arrange(reports(environs, hosts))
    assert sorted(rank for ranks in nodes for rank in ranks) == list(range(len(hosts)))
    assert all(len({hosts[rank] for rank in ranks}) == 1 for ranks in nodes)
    assert [ranks[0] for ranks in nodes] == sorted(ranks[0] for ranks in nodes)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("gpu[003-010,12],login1", "gpu003"),
        ("a1", "a1"),
        ("n[7],m", "n7"),
        ("r[1-2]n[3-4]", "r1n3"),
        ("x,y", "x"),
    ],
)
def test_first_host_of_a_slurm_node_list(text: str, first: str) -> None:
    assert first_of_nodes(text) == first


def test_meeting_points() -> None:
    slurm = {**SLURM, "SLURM_STEP_NODELIST": "gpu[3-4]", "SLURM_JOB_ID": "77"}
    found = discover_topology(slurm, [])
    point = meeting_point(found, slurm)
    assert point.host == "gpu3"
    assert 20000 <= point.port < 32000
    assert meeting_point(found, {**slurm, "SLURM_STEP_ID": "1"}).port != point.port
    one_node = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8", "PMIX_NAMESPACE": "job"}
    assert meeting_point(discover_topology(one_node, []), one_node).host == "127.0.0.1"
    given_address = {**OPEN_MPI, "MASTER_ADDR": "h", "MASTER_PORT": "1234"}
    assert (meeting_point(discover_topology(OPEN_MPI, []), given_address).port) == 1234
    with pytest.raises(TopologyError, match="MASTER_ADDR and MASTER_PORT"):
        meeting_point(discover_topology(OPEN_MPI, []), OPEN_MPI)
    with pytest.raises(TopologyError, match="MASTER_PORT"):
        meeting_point(found, {**slurm, "MASTER_PORT": "many"})


def test_the_package_imports_no_torch() -> None:
    code = (
        "import sys, rankload.distributed as d\n"
        "[getattr(d, name) for name in d.__all__]\n"
        "d.discover_topology({}, [])\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
