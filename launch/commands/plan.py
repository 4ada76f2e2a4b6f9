"""``rankload plan``: what a load would fetch, read and keep, on each node and rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer

from ...loader.planning.loads import LoadPlan, plan_load
from ...loader.planning.restores import Slice, region_text
from ...loader.plurals import counted, in_units
from ...loader.saved.regions import Run
from .blocks import Block, Facts, Line, Table
from .calls import Call, sharing

_MOST_ROWS = 32
"""Of a table of files or ranks; ``--json`` has all."""


@sharing(
    "storage_option", "cache_dir", "cache_home", "stall_timeout", "verify", "mode", "safe_type", "layout"
)
def plan(
    call: Call,
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="File, folder or URI; {rank} where each rank has a file.")
    ],
    world_size: Annotated[
        int, typer.Option("--world-size", metavar="M", min=1, help="Ranks of the job that is to load.")
    ],
    nodes: Annotated[
        int, typer.Option(metavar="K", min=1, help="Nodes that they are on, as many on each.")
    ] = 1,
    target: Annotated[
        Literal["plain", "fsdp2", "stage0", "stage1", "stage2", "stage3"] | None,
        typer.Option(
            help="What they restore into: a plain or DDP model, fully_shard, or a DeepSpeed engine of a ZeRO stage; "
            "as the job that saved where not given."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="R", min=0, help="List what this rank keeps of each tensor.")
    ] = None,
) -> None:
    """Show what a load would do: which node fetches which bytes, what each rank keeps, and how much that takes.

    Nothing is fetched but indexes, and what a store gives only whole. The job is made up of the checkpoint's own names,
    shapes and dtypes. Without the job itself, its model's names and its optimizer are not compared.
    """
    found = plan_load(
        path, world_size=world_size, n_nodes=nodes, target=target, rank=rank, options=call.options
    )
    blocks = [*_summary(found), *_nodes(found), *_ranks(found), *_files(found)]
    if rank is not None:
        blocks += _slices(rank, found.ranks[rank].slices)
    call.show(_fields(found), blocks)


def _summary(found: LoadPlan) -> list[Block]:
    nodes = counted(len(found.nodes), "node")
    ranks = counted(found.world_size, "rank")
    saved = None if found.saved_world_size is None else counted(found.saved_world_size, "rank")
    return [
        Line(found.name, strong=True),
        Facts(
            [
                ("kind", f"{found.kind}, written by {found.layout}"),
                ("saved by", saved),
                ("restored into", f"{found.target} on {ranks} of {nodes}"),
                ("read in place" if found.local else "fetched", in_units(found.fetched_bytes)),
                ("mode", None if found.local else found.mode),
                ("verify", found.verify),
            ]
        ),
    ]


def _nodes(found: LoadPlan) -> list[Block]:
    headings = ["node", "ranks", "reads" if found.local else "fetches", "cache, at most", "memory, at most"]
    rows = [
        [
            str(one.node),
            f"{one.ranks[0]} to {one.ranks[-1]}" if len(one.ranks) > 1 else str(one.ranks[0]),
            in_units(one.fetched_bytes),
            in_units(one.cache_bytes),
            in_units(one.memory_bytes),
        ]
        for one in found.nodes
    ]
    if any(one.from_nodes_bytes for one in found.nodes):
        headings.insert(3, "from other nodes")
        for row, one in zip(rows, found.nodes, strict=True):
            row.insert(3, in_units(one.from_nodes_bytes))
    return [Line(), *_table(headings, rows, "node", range(2, len(headings)))]


def _ranks(found: LoadPlan) -> list[Block]:
    rows = [
        (
            str(one.rank),
            str(one.node),
            in_units(one.weights_bytes),
            in_units(one.optimizer_bytes),
            in_units(one.read_bytes),
            in_units(one.staging_bytes),
        )
        for one in found.ranks
    ]
    headings = ("rank", "node", "weights", "optimizer", "reads", "buffers, at most")
    return [Line(), *_table(headings, rows, "rank", range(2, 6))]


def _files(found: LoadPlan) -> list[Block]:
    rows = [
        (
            str(node.node),
            one.file.removeprefix(f"{found.name}/"),
            in_units(one.fetched_bytes + one.from_nodes_bytes),
            "" if one.size_bytes < 0 else in_units(one.size_bytes),
            str(len(one.ranges)) if one.ranges else "",
        )
        for node in found.nodes
        for one in node.files
        if one.fetched_bytes or one.from_nodes_bytes
    ]
    return [Line(), *_table(("node", "file", "bytes", "of", "ranges"), rows, "file", (2, 3, 4))]


def _slices(rank: int, slices: Sequence[Slice]) -> list[Block]:
    rows = [
        (one.part, one.name, one.dtype, str(one.shape), region_text(one.region, one.shape)) for one in slices
    ]
    return [
        Line(),
        Line(f"what rank {rank} keeps", strong=True),
        Table(("part", "name", "dtype", "shape", "elements"), rows),
    ]


def _table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], what: str, right: Sequence[int]
) -> list[Block]:
    """A table of the first rows, and how many more there are."""
    shown: list[Block] = [Table(tuple(headings), rows[:_MOST_ROWS], right=frozenset(right))]
    if len(rows) > _MOST_ROWS:
        shown.append(Line(f"and {counted(len(rows) - _MOST_ROWS, f'more {what}')}: --json has all"))
    return shown


def _fields(found: LoadPlan) -> dict[str, Any]:
    """The result as JSON has it: docs/commands.md."""
    return {
        "path": found.name,
        "kind": found.kind,
        "layout": found.layout,
        "target": found.target,
        "world_size": found.world_size,
        "saved_world_size": found.saved_world_size,
        "local": found.local,
        "mode": found.mode,
        "verify": found.verify,
        "fetched_bytes": found.fetched_bytes,
        "nodes": [
            {
                "node": node.node,
                "ranks": list(node.ranks),
                "fetched_bytes": node.fetched_bytes,
                "from_nodes_bytes": node.from_nodes_bytes,
                "cache_bytes": node.cache_bytes,
                "shared_bytes": node.shared_bytes,
                "memory_bytes": node.memory_bytes,
                "files": [
                    {
                        "file": one.file,
                        "size_bytes": None if one.size_bytes < 0 else one.size_bytes,
                        "fetched_bytes": one.fetched_bytes,
                        "from_nodes_bytes": one.from_nodes_bytes,
                        "ranges": [list(each) for each in one.ranges],
                    }
                    for one in node.files
                ],
            }
            for node in found.nodes
        ],
        "ranks": [
            {
                "rank": one.rank,
                "node": one.node,
                "weights_bytes": one.weights_bytes,
                "optimizer_bytes": one.optimizer_bytes,
                "read_bytes": one.read_bytes,
                "direct_bytes": one.direct_bytes,
                "staging_bytes": one.staging_bytes,
                "slices": [_slice_fields(each) for each in one.slices] or None,
            }
            for one in found.ranks
        ],
    }


def _slice_fields(one: Slice) -> dict[str, Any]:
    region = one.region
    return {
        "part": one.part,
        "name": one.name,
        "dtype": one.dtype,
        "shape": list(one.shape),
        "size_bytes": one.nbytes,
        "elements": [region.start, region.stop] if isinstance(region, Run) else None,
        "starts": None if isinstance(region, Run) else list(region.starts),
        "sizes": None if isinstance(region, Run) else list(region.sizes),
    }
