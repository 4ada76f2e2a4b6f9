"""``rankload verify``: whether a checkpoint is complete, and its bytes those that were written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Annotated

import typer

from ...loader.plurals import counted, in_units
from ...loader.wholeness.check import Watch, check_whole
from ...loader.wholeness.values import FileVerdict, Wholeness
from .blocks import Block, Facts, Line, Table
from .calls import Call, sharing
from .endings import DONE, FOUND_WRONG


@sharing("storage_option", "cache_dir", "cache_home", "cache_size", "stall_timeout", "layout")
def verify(
    call: Call,
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="File, folder or URI; {rank} where each rank has a file.")
    ],
    subset: Annotated[
        str | None,
        typer.Option(
            metavar="5%|n/t|SIZE",
            help="Compare a random 5 % of the bytes, the n-th of t parts that together are all, or 10GB at random.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Chooses the same random bytes as a run that printed it.")
    ] = None,
    write_manifest: Annotated[
        bool,
        typer.Option(
            "--write-manifest", help="Write SHA256SUMS beside the files, once all was compared and is right."
        ),
    ] = False,
) -> int:
    """Tell whether a checkpoint is complete, and its bytes those that were written.

    Each file must be there and end as its kind does, and all of them be of one save. Then every byte that a checksum is
    known of is read and compared: the CRC-32s in torch's files, a manifest (SHA256SUMS, NAME.sha256), and what the
    store keeps. Files without any are named, and not called whole. Exit code 1 where anything is wrong.
    """
    with _progress(call.progress_bar) as watch:
        found = check_whole(
            path, subset=subset, seed=seed, write_manifest=write_manifest, options=call.options, watch=watch
        )
    call.show(found.as_dict(), [*_summary(found), *_files(found), *_wrong(found), _verdict(found)])
    return DONE if found.is_sound else FOUND_WRONG


@contextlib.contextmanager
def _progress(enabled: bool) -> Iterator[Watch]:
    """Shows on standard error, which is a terminal, how far it is: bytes, and each file that is wrong at once."""
    if not enabled:
        yield Watch()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("comparing {task.fields[done]}/{task.fields[files]} files"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, done=0, files=0)
        ended = [0]

        def begin(nbytes: int, n_files: int) -> None:
            ended[0] = 0
            bar.update(task, total=nbytes, files=n_files)

        def on_file(verdict: FileVerdict) -> None:
            ended[0] += 1
            bar.update(task, done=ended[0])
            if verdict.is_wrong:
                bar.console.print(Text(f"{verdict.state}: {verdict.file}", style="bold"))

        yield Watch(begin, lambda nbytes: bar.advance(task, nbytes), on_file)


def _summary(found: Wholeness) -> list[Block]:
    subset = found.subset
    if subset is not None and found.seed is not None:
        subset += f", with --seed {found.seed}"
    compared = f"{in_units(found.compared_bytes)} of {in_units(found.total_bytes)} that have checksums"
    return [
        Line(found.path, strong=True),
        Facts(
            [
                ("kind", found.kind),
                ("saved by", None if found.world_size is None else counted(found.world_size, "rank")),
                ("step", None if found.step is None else str(found.step)),
                ("subset", subset),
                ("compared", compared if found.kind is not None else None),
            ]
        ),
    ]


def _files(found: Wholeness) -> list[Block]:
    names = _names(found)
    rows = [
        (
            one.state,
            names[one.file],
            "" if one.size_bytes is None else f"{one.size_bytes:,}",
            f"{one.compared_bytes:,}",
            ", ".join(one.compared_by) or one.reason,
        )
        for one in found.files
    ]
    return [Line(), Table(("state", "file", "bytes", "compared", "by"), rows, right=frozenset({2, 3}))]


def _wrong(found: Wholeness) -> Iterator[Block]:
    names = _names(found)
    for one in found.files:
        if one.is_wrong:
            yield Line()
            yield Line(f"{one.file} is {one.state}", strong=True)
            if one.reason:
                yield Line(f"  {one.reason}")
            yield from (Line(f"  {damage}") for damage in one.damages)
        elif one.state == "in part" and one.reason:
            yield Line(f"{names[one.file]}: not compared: {one.reason}")
        yield from (Line(f"{names[one.file]}: not compared with {sums}") for sums in one.left_out)
    yield from (Line(f"wrong: {problem}", strong=True) for problem in found.problems)
    yield from (Line(f"note: {note}") for note in found.notes)
    yield from (Line(f"written: {manifest}") for manifest in found.written)


def _verdict(found: Wholeness) -> Line:
    wrong = sum(one.is_wrong for one in found.files)
    whole = sum(one.state == "whole" for one in found.files)
    bare = sum(one.state == "nothing to compare with" for one in found.files)
    if wrong:
        text = f"{wrong:,} of {counted(len(found.files), 'file')} wrong"
    elif found.problems:
        text = "wrong: no file is damaged as far as was compared, but they are no whole checkpoint together"
    elif not found.compared_bytes:
        text = "complete; there was nothing to compare its bytes with"
    elif whole == len(found.files):
        text = "complete, and as it was written"
    elif found.subset is not None:
        text = "complete; what was compared is as it was written"
    else:
        text = f"complete; {whole:,} of {counted(len(found.files), 'file')} are as they were written"
    if bare and not wrong and found.compared_bytes:
        text += f"; {bare:,} had nothing to be compared with"
    return Line(text, strong=True)


def _names(found: Wholeness) -> dict[str, str]:
    """How a table calls each file: by what follows the folder that all of them are in."""
    folders = {one.file.rpartition("/")[0] for one in found.files}
    # Not by `commonpath`, which would change the slashes of a URI.
    common = os.path.commonprefix([f"{folder}/" for folder in folders]).rpartition("/")[0]  # noqa: RUF071
    return {one.file: one.file.removeprefix(f"{common}/") for one in found.files}
