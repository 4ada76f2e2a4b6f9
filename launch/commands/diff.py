"""``rankload diff``: where two checkpoints differ."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .blocks import Block, Facts, Line, Table
from .calls import Call, renames, sharing, storage_options
from .endings import DONE, FOUND_WRONG

if TYPE_CHECKING:
    from ...loader.comparing.compare import Watch
    from ...loader.comparing.results import Comparison, Difference

_SHOWN = 200
"""Rows of a table; ``--json`` has them all."""


@sharing("storage_option", "cache_dir", "cache_home", "cache_size", "stall_timeout", "safe_type", "layout")
def diff(
    call: Call,
    a: Annotated[str, typer.Argument(metavar="A", help="File, folder or URI of a checkpoint of any kind.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The one that it is compared with.")],
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Compare the models' parameters and buffers alone.")
    ] = False,
    keys_only: Annotated[
        bool, typer.Option("--keys-only", help="Compare names, shapes and dtypes alone; no tensor is read.")
    ] = False,
    grep: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Only keys that hold this text, or match it where it is a glob."),
    ] = None,
    rtol: Annotated[
        float, typer.Option(min=0.0, help="How far elements may be apart, relative to B's; 0 is exact.")
    ] = 0.0,
    atol: Annotated[float, typer.Option(min=0.0, help="How far they may be apart besides.")] = 0.0,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW",
            help="A name of A's parameters, or a prefix that ends with a dot; may be repeated.",
        ),
    ] = None,
    exact_names: Annotated[
        bool, typer.Option("--exact-names", help="Names that wrappers changed are different ones.")
    ] = False,
    other_storage_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K=V", help="A setting of B's file system, where it is another; may be repeated."
        ),
    ] = None,
) -> int:
    """Show where two checkpoints differ: names, shapes, dtypes, and values by how much.

    They may be of different kinds, local or remote. Tensors are read piece by piece. Where weights have other dtypes,
    and one checkpoint keeps fp32 masters in the other's dtype, those are compared. Whether bytes are as they were
    written is for rankload verify to tell. Exit code 0 where both are equal, 1 where they differ.
    """
    from dataclasses import replace

    from ...loader.comparing.compare import compare_checkpoints

    options = replace(call.load_options, rename=renames(rename))
    others = replace(call.load_options, storage_options=storage_options(other_storage_option or ()))
    with _progress(call.progress_bar and not keys_only) as watch:
        found = compare_checkpoints(
            a,
            b,
            weights_only=weights_only,
            keys_only=keys_only,
            grep=grep,
            exact_names=exact_names,
            rtol=rtol,
            atol=atol,
            options=options,
            other_options=others if other_storage_option else None,
            watch=watch,
        )
    call.show(found.as_dict(), [*_summary(found), *_only(found), *_differences(found), _verdict(found)])
    return DONE if found.equal else FOUND_WRONG


@contextlib.contextmanager
def _progress(enabled: bool) -> Iterator[Watch | None]:
    """Shows on standard error, which is a terminal, how many elements were compared."""
    if not enabled:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from ...loader.comparing.compare import Watch

    columns = (TextColumn("comparing"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield Watch(
            lambda elements: bar.update(task, total=elements), lambda elements: bar.advance(task, elements)
        )


def _summary(found: Comparison) -> list[Block]:
    compared = f"{found.elements:,} elements" if not found.keys_only else "names, shapes and dtypes alone"
    return [
        Facts(
            [
                ("A", f"{found.a} ({found.kind_a})"),
                ("B", f"{found.b} ({found.kind_b})"),
                ("compared", compared),
                ("equal", f"{found.n_equal:,} keys"),
                ("renamed", f"{len(found.renamed):,} names" if found.renamed else None),
            ]
        )
    ]


def _only(found: Comparison) -> Iterator[Block]:
    for which, keys in (("A", found.only_a), ("B", found.only_b)):
        if keys:
            yield Line()
            yield Line(f"only in {which} ({len(keys):,}):", strong=True)
            yield from (Line(f"  {key}") for key in keys[:_SHOWN])
            yield from _more(len(keys))


def _differences(found: Comparison) -> Iterator[Block]:
    others = [one for one in found.differences if one.what != "elements"]
    elements = [one for one in found.differences if one.what == "elements"]
    if others:
        yield Line()
        rows = [(one.what, _key(one), one.a, one.b) for one in others[:_SHOWN]]
        yield Table(("differs", "key", "A", "B"), rows)
        yield from _more(len(others))
    if elements:
        yield Line()
        yield Table(
            ("elements differ", "of", "by at most", "NaN in A, B alone", "first", "key"),
            [_row(one) for one in elements[:_SHOWN]],
            right=frozenset({0, 1, 2}),
        )
        yield from _more(len(elements))
    yield from (Line(f"note: {note}") for note in found.notes)


def _row(one: Difference) -> tuple[Any, ...]:
    return (
        f"{one.differing:,}",
        f"{one.elements:,}",
        "" if one.max_abs is None else f"{one.max_abs:.6g}",
        f"{one.only_a_nan:,}, {one.only_b_nan:,}" if one.only_a_nan or one.only_b_nan else "",
        "" if one.first is None else str(list(one.first)),
        _key(one),
    )


def _key(one: Difference) -> str:
    return one.key if one.key == one.other_key else f"{one.key} / {one.other_key}"


def _more(count: int) -> Iterator[Block]:
    if count > _SHOWN:
        yield Line(f"  and {count - _SHOWN:,} more: --json shows them all")


def _verdict(found: Comparison) -> Line:
    if found.equal and not found.n_equal:
        return Line("nothing was compared", strong=True)
    if found.equal:
        return Line("equal" if not found.keys_only else "equal names, shapes and dtypes", strong=True)
    keys = len({one.key for one in found.differences})
    parts = [
        f"{count:,} {text}"
        for count, text in (
            (keys, "differ"),
            (len(found.only_a), "only in A"),
            (len(found.only_b), "only in B"),
        )
        if count
    ]
    return Line(f"different keys: {', '.join(parts)}", strong=True)
