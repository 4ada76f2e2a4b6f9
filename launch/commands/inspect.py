"""``rankload inspect``: what a checkpoint is and holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ...loader.inspection import HeldFile, Inspection, Key, inspect_checkpoint, matching, nearest
from ...loader.plurals import counted, in_units
from .blocks import Block, Branch, Facts, Line, Table
from .calls import Call
from .endings import DONE, FOUND_WRONG


def inspect(
    call: Call,
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="File, folder or URI; {rank} where each rank has a file.")
    ],
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", help="The files of this saved rank, and what a file of its own holds."),
    ] = None,
    grep: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Only keys that hold this text, or match it where it is a glob."),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Show N levels of the tree of keys.")
    ] = None,
    files: Annotated[bool, typer.Option("--files", help="Show the files alone, without the keys.")] = False,
) -> int:
    """Show what a checkpoint is and holds, without reading its tensors.

    Kind, writer, world size, step, files and keys, named as ignore_keys would name them. Indexes alone are read, and of
    every other file its size is asked for. Exit code 1 where a file is missing or cut short, or --grep finds nothing.
    """
    found = inspect_checkpoint(path, rank=rank, options=call.options, progress_bar=call.progress_bar)
    keys = found.keys if grep is None else matching(found.keys, grep)
    fields = _fields(found, () if files else keys)
    blocks = [*_summary(found), *_files(found), *(() if files else _tree(keys, depth))]
    if grep is not None and not keys:
        near = ", ".join(nearest(found.keys, grep))
        blocks.append(
            Line(f"no key matches {grep!r}" + (f"; the nearest: {near}" if near else ""), strong=True)
        )
    call.show(fields, blocks)
    return FOUND_WRONG if found.missing or found.unfinished or (grep is not None and not keys) else DONE


def _summary(found: Inspection) -> list[Block]:
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in found.dtypes.items())
    ranks = None if found.world_size is None else counted(found.world_size, "rank")
    if ranks is not None and found.model_parts > 1:
        ranks += f"; the model is split into {found.model_parts} parts, and the keys are those of the first"
    return [
        Line(found.name, strong=True),
        Facts(
            [
                ("kind", found.kind),
                ("written by", found.layout),
                ("latest", found.tag),
                ("ZeRO stage", _text(found.zero_stage)),
                ("saved by", ranks),
                ("step", _text(found.step)),
                ("epoch", _text(found.epoch)),
                ("model", f"{counted(found.parameters, 'element')} in {dtypes}" if dtypes else None),
                ("tensors", f"{found.tensors:,}, {in_units(found.tensor_bytes)}"),
                ("files", f"{len(found.files):,}, {in_units(found.file_bytes)}"),
            ]
        ),
        *(Line(f"note: {note}") for note in found.notes),
        *(Line(f"not finished: {sentence}", strong=True) for sentence in found.unfinished),
    ]


def _files(found: Inspection) -> list[Block]:
    rows = [
        (one.name, "" if one.size_bytes is None else f"{one.size_bytes:,}", _state(one))
        for one in found.files
    ]
    marked = any(state for *_, state in rows)
    return [
        Line(),
        Table(
            ("file", "bytes", "state") if marked else ("file", "bytes"),
            rows if marked else [row[:2] for row in rows],
            right=frozenset({1}),
        ),
    ]


def _state(file: HeldFile) -> str:
    if not file.there:
        return "MISSING"
    if file.short:
        return f"CUT SHORT: {file.least_bytes:,} bytes or more were written"
    return ""


def _tree(keys: Sequence[Key], depth: int | None) -> list[Block]:
    """The keys as trees, one for each first part of a path; below `depth` levels there are sums alone."""
    roots: list[Branch] = []
    places: dict[tuple[str, ...], Branch] = {}
    sums: dict[tuple[str, ...], list[int]] = {}
    for key in keys:
        for level in range(1, len(key.parts) + 1):
            here = key.parts[:level]
            if depth is not None and level > depth:
                break
            if here not in places:
                places[here] = Branch(here[-1])
                (places[here[:-1]].branches if level > 1 else roots).append(places[here])
        else:
            places[key.parts].columns = _columns(key)
        if key.shape is not None:
            for level in range(1, min(len(key.parts), depth or len(key.parts) + 1) + 1):
                total = sums.setdefault(key.parts[:level], [0, 0])
                total[0] += 1
                total[1] += key.size_bytes
    for place, (count, nbytes) in sums.items():
        branch = places[place]
        if not branch.columns:
            branch.columns = (counted(count, "tensor"), "", in_units(nbytes))
    return [Line(), *roots]


def _columns(key: Key) -> tuple[str, ...]:
    if key.shape is None:
        return (key.kind,) if key.value is None else (key.kind, "", key.value)
    shape = f"({', '.join(map(str, key.shape))}{',' if len(key.shape) == 1 else ''})"
    return (shape, key.dtype or "", in_units(key.size_bytes))


def _fields(found: Inspection, keys: Sequence[Key]) -> dict[str, Any]:
    """The result as JSON has it: docs/commands.md."""
    return {
        "path": found.name,
        "kind": found.kind,
        "layout": found.layout,
        "tag": found.tag,
        "zero_stage": found.zero_stage,
        "world_size": found.world_size,
        "model_parts": found.model_parts,
        "step": found.step,
        "epoch": found.epoch,
        "parameters": found.parameters,
        "dtypes": dict(found.dtypes),
        "tensors": found.tensors,
        "tensor_bytes": found.tensor_bytes,
        "file_bytes": found.file_bytes,
        "files": [
            {
                "name": one.name,
                "there": one.there,
                "size_bytes": one.size_bytes,
                "least_bytes": one.least_bytes,
                "rank": one.rank,
            }
            for one in found.files
        ],
        "files_read": list(found.files_read),
        "keys": [
            {
                "key": key.path,
                "kind": key.kind,
                "dtype": key.dtype,
                "shape": None if key.shape is None else list(key.shape),
                "size_bytes": key.size_bytes if key.shape is not None else None,
                "value": key.value,
            }
            for key in keys
        ],
        "notes": list(found.notes),
        "unfinished": list(found.unfinished),
    }


def _text(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"
