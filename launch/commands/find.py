"""``rankload find``: which checkpoint of a run would be taken, and why not the others."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ...loader.candidates.found import FoundCheckpoint
from ...loader.finding import find as find_in
from .blocks import Block, Line, Table
from .calls import Call
from .endings import DONE, FOUND_WRONG


def find(
    call: Call,
    path: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="Where a run keeps its checkpoints: a folder or URI, or a template such as run/ep*-rank{rank}.pt.",
        ),
    ],
    newest: Annotated[
        bool, typer.Option("--newest", help="Take the highest step, whatever latest or a link names.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--every", help="Examine all, also those after the first that is whole.")
    ] = False,
    run_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Stands for {run_name} in FOLDER.")
    ] = None,
) -> int:
    """Show which checkpoint autoresume would take, and why not the others.

    A checkpoint is whole where all files that it consists of are there and none is cut short. Their indexes alone are
    read. Exit code 1 where none is whole: a run would start cold.
    """
    found = find_in(path, options=call.options, run_name=run_name, newest=newest, every=every)
    taken = next((one for one in found if one.proven), None)
    call.show(
        {"taken": None if taken is None else _fields(taken), "found": [_fields(one) for one in found]},
        _blocks(found, taken),
    )
    return FOUND_WRONG if taken is None else DONE


def _fields(one: FoundCheckpoint) -> dict[str, Any]:
    return {
        "path": one.path,
        "step": one.step,
        "kind": one.kind,
        "world_size": one.world_size,
        "proven": one.proven,
        "reason": one.reason,
        "pointer": one.pointer,
    }


def _blocks(found: list[FoundCheckpoint], taken: FoundCheckpoint | None) -> list[Block]:
    if not found:
        return [Line("no checkpoint: a run would start cold", strong=True)]
    rows = [
        (
            one.shown,
            "" if one.step is None else f"{one.step:,}",
            one.kind or "",
            "taken"
            if one is taken
            else {True: "whole", False: "passed over", None: "not examined"}[one.proven],
            "; ".join(
                each for each in (f"named by {one.pointer}" if one.pointer else "", one.reason) if each
            ),
        )
        for one in found
    ]
    blocks: list[Block] = [Table(("checkpoint", "step", "kind", "", "why"), rows)]
    if taken is None:
        blocks.append(Line("none is whole: a run would start cold", strong=True))
    return blocks
