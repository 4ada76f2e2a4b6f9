"""``rankload export``: a checkpoint's weights, or all of it, as safetensors or as a DCP folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ...loader.plurals import counted, in_units
from .blocks import Block, Facts, Line, Table
from .calls import Call, renames, storage_options
from .endings import DONE, FOUND_WRONG

if TYPE_CHECKING:
    from ...loader.exporting.export import Exported

_SHOWN_FILES = 12


def export(
    call: Call,
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="File, folder or URI; {rank} where each rank has a file.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write: a local one, or a URI.")],
    format: Annotated[  # noqa: A002
        Literal["safetensors", "dcp"],
        typer.Option(
            help="Safetensors as transformers reads them, or a torch.distributed.checkpoint folder."
        ),
    ] = "safetensors",
    dtype: Annotated[
        Literal["as-saved", "fp32", "bf16"],
        typer.Option(help="Of the weights; fp32 takes the optimizer's fp32 masters where there are any."),
    ] = "as-saved",
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="Optimizers, random states and all the rest too; beside safetensors in one file."
        ),
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="The largest file, unless one tensor takes more.")
    ] = "5GB",
    force: Annotated[
        bool, typer.Option("--force", help="Replace an export that OUT has; other files there stay.")
    ] = False,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW",
            help="Another name for a weight, or prefix of names, such as module.= ; may be repeated.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Keys to leave out, such as state/model/head.*; may be repeated."),
    ] = None,
    out_storage_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K=V",
            help="A setting of OUT's file system, where it is another than PATH's; may be repeated.",
        ),
    ] = None,
) -> int:
    """Write a checkpoint's weights, or all of it, as safetensors or as a DCP folder.

    Tensors are read and written piece by piece, and compared with the checkpoint's checksums. What is not exported is
    said. A killed export leaves nothing that looks whole. Exit code 1 where weights are left out that were asked for.
    """
    from dataclasses import replace

    from ...loader.exporting.export import export_checkpoint

    with _progress(call.progress_bar) as on_progress:
        done = export_checkpoint(
            path,
            out,
            to=format,
            dtype=dtype,
            everything=everything,
            max_shard_bytes=max_shard_size,
            force=force,
            ignore_keys=ignore,
            options=replace(call.load_options, rename=renames(rename)),
            out_storage_options=storage_options(out_storage_option) if out_storage_option else None,
            on_progress=on_progress,
        )
    call.show(done.as_dict(), _blocks(done))
    return FOUND_WRONG if done.lost else DONE


def _blocks(done: Exported) -> list[Block]:
    weights = f"{counted(done.tensors, 'tensor')} of {counted(done.parameters, 'element')}"
    masters = f"; {done.from_masters:,} from the optimizer's fp32 masters" if done.from_masters else ""
    rows = [(one.name, f"{one.bytes:,}") for one in done.files[:_SHOWN_FILES]]
    if len(done.files) > _SHOWN_FILES:
        rest = done.files[_SHOWN_FILES:]
        rows.append((f"and {counted(len(rest), 'more file')}", f"{sum(one.bytes for one in rest):,}"))
    blocks: list[Block] = [
        Line(done.out, strong=True),
        Facts(
            [
                ("from", done.source),
                ("kind", done.kind),
                ("step", None if done.step is None else f"{done.step:,}"),
                ("format", done.format),
                ("weights", weights + masters),
                ("cast", ", ".join(f"{count:,} {cast}" for cast, count in done.casts.items()) or None),
                ("tied", ", ".join(f"{alias} = {name}" for alias, name in done.aliases.items()) or None),
                ("written", f"{counted(len(done.files), 'file')}, {in_units(done.bytes)}"),
            ]
        ),
        Line(),
        Table(("file", "bytes"), rows, right=frozenset({1})),
    ]
    if done.left_out:
        blocks += [Line(), Table(("not exported", "why"), list(done.left_out.items()))]
    return [*blocks, *(Line(f"note: {note}") for note in done.notes)]


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """What to call with bytes done and in all, which shows them on standard error; None where nobody watches."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("export", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
