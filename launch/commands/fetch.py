"""``rankload fetch``: this node's cache, filled before a load."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ...loader.plurals import counted, in_units
from ...loader.prefetching import Prefetched, prefetch
from .blocks import Block, Facts, Line
from .calls import Call
from .endings import DONE, FOUND_WRONG, WrongArgumentsError


def fetch(
    call: Call,
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="File, folder or URI; {rank} where each rank has a file.")
    ],
    world_size: Annotated[
        int | None, typer.Option("--world-size", metavar="M", min=1, help="Ranks of the job that is to load.")
    ] = None,
    target: Annotated[
        Literal["plain", "fsdp2", "stage0", "stage1", "stage2", "stage3"] | None,
        typer.Option(
            help="What they restore into, as rankload plan takes it: only what this node's ranks restore is fetched; "
            "all of the checkpoint where not given."
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option(metavar="K", min=1, help="Nodes that they are on, as many on each.")
    ] = 1,
    node_rank: Annotated[
        int, typer.Option("--node-rank", metavar="N", min=0, help="Which of them this one is.")
    ] = 0,
) -> int:
    """Fetch a checkpoint into this node's cache, where the next load finds it.

    It stays until the first load on this node that uses it has ended; after a day without one (an hour in memory) the
    next load of another checkpoint removes it. A load that begins meanwhile takes over. Call it again after a kill: it
    goes on where it was. The cache's options must be those of the load. Exit code 1 where a file is missing, or nothing
    could be kept.
    """
    if target is not None and world_size is None:
        raise WrongArgumentsError("--target needs --world-size: which ranks' parts are fetched?")
    found = prefetch(
        path,
        target=target,
        world_size=world_size or 1,
        n_nodes=nodes,
        node_rank=node_rank,
        options=call.options,
        progress_bar=call.progress_bar,
    )
    fields = {
        "path": found.name,
        "fetched_bytes": found.bytes,
        "held_bytes": found.held_bytes,
        "files": found.files,
        "folder": found.folder,
        "taken_over": found.taken_over,
        "missing": list(found.missing),
        "not_kept": list(found.not_kept),
    }
    call.show(fields, _blocks(found))
    return FOUND_WRONG if found.missing or (found.not_kept and not found.taken_over) else DONE


def _blocks(found: Prefetched) -> list[Block]:
    blocks: list[Block] = [Line(found.name, strong=True)]
    if found.folder is None:
        return [*blocks, Line("its files are used in place: there is nothing to fetch")]
    blocks.append(
        Facts(
            [
                ("fetched", in_units(found.bytes)),
                ("here now", f"{in_units(found.held_bytes)} of {counted(found.files, 'file')}"),
                ("in", found.folder),
            ]
        )
    )
    if found.taken_over:
        blocks.append(Line("a load on this node has begun, and fetches the rest itself"))
    blocks += [Line(f"missing: {name}", strong=True) for name in found.missing]
    if not found.taken_over:
        blocks += [
            Line(
                f"not kept: {name}: its store states no version of it, or another process is fetching it",
                strong=True,
            )
            for name in found.not_kept
        ]
    return blocks
