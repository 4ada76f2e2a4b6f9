"""Where this process stands in the job: discovered from the environment, then confirmed among all ranks.

Order of preference: torchrun, deepspeed, Composer's launcher, plain RANK and WORLD_SIZE, Open MPI, MVAPICH,
MPICH and Intel MPI (Hydra), srun (inside a step), and else one rank. Importing this needs no torch.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from .errors import TopologyError
from .launchers import Claim, read_claim
from .liveness import machine_identity

LAUNCHERS_OF_RANK_VARIABLES = frozenset({"torchrun", "deepspeed", "composer", "environment"})
"""Those whose ranks have RANK and WORLD_SIZE, which a process group that says otherwise contradicts."""


@dataclass(frozen=True)
class Topology:
    """One rank's place in the job.

    In what `confirm_topology` returns, every field is known. Before that, the fields named in ``assumed`` are guesses
    that no variable gave, and ``ranks_by_node`` is empty.

    Attributes:
        rank, world_size: in the whole job.
        local_rank, local_world_size: on this node.
        node_rank, n_nodes: of this node. Two agents on one machine are two nodes.
        launcher: ``torchrun``, ``deepspeed``, ``composer``, ``environment`` (RANK and WORLD_SIZE alone),
            ``openmpi``, ``mvapich``, ``hydra``, ``slurm``, ``process group`` or ``python``.
        host: this process's host name.
        ranks_by_node: global ranks of each node by node rank; within a node by local rank, so that
            ``ranks_by_node[n][0]`` is the node's local rank 0.
        assumed: names of the fields that are still guesses.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    n_nodes: int
    launcher: str
    host: str
    ranks_by_node: tuple[tuple[int, ...], ...] = ()
    assumed: frozenset[str] = frozenset()


class Decider(Protocol):
    """What confirmation needs of a `Channel`."""

    def decide(self, name: str, value: Any, decider: Any) -> Any: ...


def discover_topology(
    environ: Mapping[str, str] | None = None, argv: Sequence[str] | None = None
) -> Topology:
    """This process's place by its launcher's variables; see the module for the order of preference.

    Args:
        environ: variables; this process's by default.
        argv: arguments, for deepspeed's ``--local_rank``; this process's by default.

    Raises:
        TopologyError: a variable is no number, is missing, or contradicts another; named with their values.
    """
    claim = read_claim(os.environ if environ is None else environ, sys.argv[1:] if argv is None else argv)
    if claim is None:
        return Topology(0, 0, 1, 1, 0, 1, "python", socket.gethostname())
    return _from_claim(claim)


def group_topology(rank: int, world_size: int, discovered: Topology) -> Topology:
    """The place of a process whose default process group gives it ``rank`` of ``world_size``: the group decides.

    Raises:
        TopologyError: RANK and WORLD_SIZE are set and say something else.
    """
    if (discovered.rank, discovered.world_size) == (rank, world_size):
        return discovered
    if discovered.launcher in LAUNCHERS_OF_RANK_VARIABLES:
        raise TopologyError(
            f"RANK={discovered.rank} and WORLD_SIZE={discovered.world_size}, but the initialised process "
            f"group has rank {rank} of {world_size}; unset them, or initialise the group from them"
        )
    # Spawned by a process that the launcher started: its variables describe the parent.
    return _from_claim(Claim("process group", rank, world_size))


def confirm_topology(topology: Topology, channel: Decider) -> Topology:
    """Checks every rank's place against all others', and fills in what no variable gave. Every rank must call.

    Raises:
        TopologyError: on every rank, where the ranks contradict each other; names ranks, fields and values.
    """
    report = asdict(topology) | {
        "assumed": sorted(topology.assumed),
        "machine": machine_identity().partition(" ")[0],
        "pid": os.getpid(),
    }
    nodes = channel.decide("topology", report, arrange)
    node_rank = next(index for index, ranks in enumerate(nodes) if topology.rank in ranks)
    return replace(
        topology,
        local_rank=nodes[node_rank].index(topology.rank),
        local_world_size=len(nodes[node_rank]),
        node_rank=node_rank,
        n_nodes=len(nodes),
        ranks_by_node=tuple(tuple(ranks) for ranks in nodes),
        assumed=frozenset(),
    )


def arrange(reports: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The ranks of each node, from every rank's report (as `confirm_topology` makes them), by rank.

    Nodes are those that the launcher numbered; without numbers, hosts in order of their lowest rank.

    Raises:
        TopologyError: the reports contradict each other.
    """
    for rank, report in enumerate(reports):
        if report["rank"] != rank or report["world_size"] != len(reports):
            raise TopologyError(
                f"{_who(report)} has WORLD_SIZE={report['world_size']} and RANK={report['rank']}; "
                f"rank {rank} of {len(reports)} was expected"
            )
    nodes = _numbered_nodes(reports) if _all_say(reports, "node_rank") else _host_nodes(reports)
    _check_sizes(reports, nodes)
    if not _all_say(reports, "local_rank"):
        # Where some ranks know their local rank and others don't, all are numbered anew, by rank.
        return nodes
    return [_by_local_rank([reports[rank] for rank in ranks]) for ranks in nodes]


def _numbered_nodes(reports: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for report in reports:
        found.setdefault(report["node_rank"], []).append(report["rank"])
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise TopologyError(f"nodes are numbered {sorted(found)}: no rank is on node {missing[0]}")
    for node, ranks in found.items():
        hosts = {(reports[rank]["host"], reports[rank]["machine"]): rank for rank in reversed(ranks)}
        if len(hosts) > 1:
            one, other = sorted(hosts.values())[:2]
            raise TopologyError(
                f"{_who(reports[one])} and {_who(reports[other])} both say that they are on node {node}; "
                "give each node its own GROUP_RANK, NODE_RANK or CROSS_RANK"
            )
    return [found[node] for node in range(len(found))]


def _host_nodes(reports: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    found: dict[tuple[str, str], list[int]] = {}
    for report in reports:
        found.setdefault((report["host"], report["machine"]), []).append(report["rank"])
    return list(found.values())


def _check_sizes(reports: Sequence[Mapping[str, Any]], nodes: list[list[int]]) -> None:
    for ranks in nodes:
        for rank in ranks:
            report = reports[rank]
            for field, seen in (("local_world_size", len(ranks)), ("n_nodes", len(nodes))):
                if field not in report["assumed"] and report[field] != seen:
                    raise TopologyError(
                        f"{_who(report)} says {field}={report[field]}, but the ranks together show "
                        f"{seen}: its node has ranks {ranks}, and there are {len(nodes)} nodes"
                    )


def _by_local_rank(reports: Sequence[Mapping[str, Any]]) -> list[int]:
    found: dict[int, Mapping[str, Any]] = {}
    for report in reports:
        local_rank = report["local_rank"]
        if local_rank in found:
            raise TopologyError(
                f"{_who(found[local_rank])} and {_who(report)} both have LOCAL_RANK={local_rank} on one "
                "node; if these are two nodes on one machine, give each its NODE_RANK"
            )
        found[local_rank] = report
    missing = sorted(set(range(len(reports))) - set(found))
    if missing:
        ranks = [report["rank"] for report in reports]
        raise TopologyError(
            f"ranks {ranks} share a node (host {reports[0]['host']}), with local ranks "
            f"{sorted(found)}: local rank {missing[0]} is missing"
        )
    return [found[local_rank]["rank"] for local_rank in sorted(found)]


def _all_say(reports: Sequence[Mapping[str, Any]], field: str) -> bool:
    return all(field not in report["assumed"] for report in reports)


def _who(report: Mapping[str, Any]) -> str:
    return f"rank {report['rank']} (host {report['host']}, pid {report['pid']})"


def _from_claim(claim: Claim) -> Topology:
    """The launcher's claim, with guesses for the fields that it lacks."""
    guesses = _guesses(claim)
    claimed: dict[str, int | None] = {field: getattr(claim, field) for field in guesses}

    def value(field: str) -> int:
        own = claimed[field]
        return guesses[field] if own is None else own

    return Topology(
        rank=claim.rank,
        world_size=claim.world_size,
        launcher=claim.launcher,
        host=socket.gethostname(),
        assumed=frozenset(field for field, own in claimed.items() if own is None),
        local_rank=value("local_rank"),
        local_world_size=value("local_world_size"),
        node_rank=value("node_rank"),
        n_nodes=value("n_nodes"),
    )


def _guesses(claim: Claim) -> dict[str, int]:
    """The fields as they are where all nodes have equally many ranks, numbered in order; one node unless known."""
    size = claim.local_world_size or claim.world_size
    if claim.local_world_size is None and claim.n_nodes is not None:
        size = -(-claim.world_size // claim.n_nodes)
    return {
        "local_rank": claim.rank % size,
        "local_world_size": size,
        "node_rank": claim.rank // size,
        "n_nodes": -(-claim.world_size // size),
    }
