"""Gathers which rank needs which files, and raises the error that names each missing one, its ranks and its nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import NotFoundError
from ..plurals import counted, ranks_text
from ..stores.base import Store

if TYPE_CHECKING:
    from ...distributed.channel import Channel
    from ...distributed.topology import Topology

_SHOWN = 8
"""Files, and nodes of a file, that a message lists."""


@dataclass(frozen=True, slots=True)
class FileNeed:
    """One object that this rank wants to read; an `optional` one may be missing."""

    name: str = field(repr=False)  # may have a signature in it
    optional: bool = False


@dataclass(frozen=True, slots=True)
class NeedTable:
    """What all ranks need, as every rank knows it."""

    own: tuple[FileNeed, ...]
    rank: int
    node: int
    leader: int
    """The lowest rank of this node, which fetches for it."""
    load_id: str
    rows: tuple[Mapping[str, Any], ...]
    """By rank: ``node``, ``host``, ``required`` and ``optional`` names."""

    @property
    def leads(self) -> bool:
        """Whether this rank fetches for its node."""
        return self.rank == self.leader

    @property
    def node_needs(self) -> list[str]:
        """The names that this node's ranks need, each once, in order of rank."""
        rows = [row for row in self.rows if row["node"] == self.node]
        return list(dict.fromkeys(name for row in rows for name in (*row["required"], *row["optional"])))

    @property
    def leaders(self) -> dict[int, int]:
        """Each node's leader, by node."""
        leaders: dict[int, int] = {}
        for rank, row in enumerate(self.rows):
            leaders.setdefault(row["node"], rank)
        return leaders

    @property
    def ranks_needing(self) -> dict[str, list[int]]:
        """The ranks that need each file, by its name."""
        needing: dict[str, list[int]] = {}
        for rank, row in enumerate(self.rows):
            for name in (*row["required"], *row["optional"]):
                needing.setdefault(name, []).append(rank)
        return needing


def gather_needs(
    channel: Channel, topology: Topology, needs: Sequence[str | FileNeed], load_id: str, stage: str
) -> NeedTable:
    """The table of all ranks' needs. Every rank must call."""
    own = _as_needs(needs)
    row = {
        "node": topology.node_rank,
        "host": channel.host,
        **_names(own),
        "load": load_id,
    }
    rows = tuple(channel.gather(f"{stage}: needs", row))
    leader = min(rank for rank, each in enumerate(rows) if each["node"] == topology.node_rank)
    return NeedTable(own, channel.rank, topology.node_rank, leader, rows[0]["load"], rows)


def same_needs(table: NeedTable, needs: Sequence[str | FileNeed]) -> NeedTable:
    """The table where all ranks, of which `table` tells the places, need the same files `needs`."""
    own = _as_needs(needs)
    return replace(table, own=own, rows=tuple({**row, **_names(own)} for row in table.rows))


def _as_needs(needs: Sequence[str | FileNeed]) -> tuple[FileNeed, ...]:
    return tuple(FileNeed(need) if isinstance(need, str) else need for need in needs)


def _names(needs: Sequence[FileNeed]) -> dict[str, list[str]]:
    return {
        "required": [need.name for need in needs if not need.optional],
        "optional": [need.name for need in needs if need.optional],
    }


def find_lacking(table: NeedTable, reports: Sequence[Mapping[str, bool]]) -> dict[str, list[int]]:
    """The ranks that require a file which their node's leader did not find, by the file's name.

    `reports` are by rank: whether it found a file, by name; {} of ranks that do not lead.
    """
    lacking: dict[str, list[int]] = {}
    leaders = table.leaders
    for rank, row in enumerate(table.rows):
        for name in row["required"]:
            if not reports[leaders[row["node"]]].get(name, False):
                lacking.setdefault(name, []).append(rank)
    return lacking


def raise_lacking(
    store: Store,
    table: NeedTable,
    lacking: Mapping[str, Sequence[int]],
    reports: Sequence[Mapping[str, bool]],
) -> None:
    """Raises one `NotFoundError` for all files that are `lacking` (of `find_lacking`).

    `reports` are by rank, as there: for local files the message names the nodes on which each is and is not.
    """
    problems = [_problem(store, table, reports, name, ranks) for name, ranks in lacking.items()]
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"and {len(problems) - _SHOWN} more"]
    name, ranks = next(iter(lacking.items()))
    raise NotFoundError(
        f"{'; '.join(problems)}. The files of one checkpoint belong together: copy what is missing, or take another",
        rank=ranks[0],
        host=table.rows[ranks[0]]["host"],
        path=store.describe(name),
    )


def _problem(
    store: Store,
    table: NeedTable,
    reports: Sequence[Mapping[str, bool]],
    name: str,
    ranks: Sequence[int],
) -> str:
    text = f"{store.describe(name)}: not there, needed by {ranks_text(ranks)}"
    leaders = table.leaders
    if not store.is_local or len(leaders) == 1:
        return text
    lacks = [node for node, leader in leaders.items() if not reports[leader].get(name, False)]
    has = [node for node in leaders if node not in lacks]
    hosts = {node: table.rows[leader]["host"] for node, leader in leaders.items()}
    where = f"there on {_nodes(has, hosts)}" if has else "there on no other"
    return f"{text} (missing on {_nodes(lacks, hosts)}; {where})"


def _nodes(nodes: Sequence[int], hosts: Mapping[int, str]) -> str:
    shown = [f"node {node} on host {hosts[node]}" for node in nodes[:_SHOWN]]
    return ", ".join(shown) + (
        f" and {counted(len(nodes) - _SHOWN, 'more node')}" if len(nodes) > _SHOWN else ""
    )
