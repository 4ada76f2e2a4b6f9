"""Parses the command line and runs one command: see ``commands`` for how one is added.

Exit codes: see `commands.endings`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, NoReturn

from .commands.endings import (
    DONE,
    EXIT_CODES,
    WrongArgumentsError,
    say_error,
)

if TYPE_CHECKING:
    import typer

COMMAND = "rankload"
COMMANDS = (
    "inspect",
    "plan",
    "verify",
    "diff",
    "find",
    "fetch",
    "export",
    "run",
    "cache",
    "demo",
)  # fmt: skip
"""Each is a module of `commands`, in the order of ``--help``."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command that `argv` names (this process's arguments by default), and ends with its exit code."""
    raise SystemExit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Runs the command that `argv` names; returns its exit code.

    Raises SystemExit where a library that parses `argv` does.
    """
    # So that SIGTERM, too, ends the processes that the command started.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(list(argv))
    except KeyboardInterrupt as error:
        return say_error(error, as_json=_as_json(argv), debug=False)
    finally:
        signal.signal(signal.SIGTERM, before)
        _flush()


def _run(argv: list[str]) -> int:
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        from .without_typer import run_without_typer

        return run_without_typer(
            argv, program=COMMAND, version=version(), commands=COMMANDS, missing=error.name or "typer"
        )
    wrong: Any = typer.BadParameter.__mro__[1]  # UsageError, which typer itself does not name
    try:
        ended = typer.main.get_command(application()).main(argv, prog_name=COMMAND, standalone_mode=False)
    except typer.Abort:
        return say_error(KeyboardInterrupt(), as_json=_as_json(argv), debug=False)
    except wrong as error:
        usage = error.ctx.get_usage() if error.ctx is not None else f"usage: {COMMAND} --help"
        path = error.ctx.command_path if error.ctx is not None else COMMAND
        message = f"{error.format_message()}\n{usage[:1].lower()}{usage[1:]}\n{path} --help says more"
        return say_error(WrongArgumentsError(message), as_json=_as_json(argv), debug=False)
    return ended if isinstance(ended, int) else DONE


def application() -> typer.Typer:
    """All commands, as typer runs them. Help has colours and boxes on a terminal only."""
    import typer

    from .commands.calls import command

    drawn: Any = "rich" if sys.stdout.isatty() else None
    settings: dict[str, Any] = {"rich_markup_mode": drawn, "pretty_exceptions_enable": False}
    top = typer.Typer(name=COMMAND, help="Resume distributed PyTorch jobs.", epilog=EXIT_CODES, **settings)

    @top.callback()
    def _common(
        version_wanted: bool = typer.Option(
            False, "--version", is_eager=True, callback=_say_version, help="Print the version and exit."
        ),
    ) -> None:
        pass

    for name in COMMANDS:
        module = import_module(f".commands.{name}", __package__)
        function = getattr(module, name)
        if isinstance(function, dict):
            group = typer.Typer(
                name=name, help=(module.__doc__ or "").partition("\n\n")[0], epilog=EXIT_CODES, **settings
            )
            for each, own in function.items():
                _add(group, each, f"{name} {each}", own, command)
            top.add_typer(group)
        else:
            _add(top, name, name, function, command)
    return top


def version() -> str:
    """The installed distribution's version."""
    try:
        return metadata.version("rankload")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _add(place: typer.Typer, name: str, whole_name: str, function: Any, command: Any) -> None:
    kind = getattr(function, "command_class", None)
    added = place.command(name, cls=kind, epilog=EXIT_CODES)
    added(command(whole_name, function))


def _say_version(wanted: bool) -> None:
    import typer

    if wanted:
        print(f"{COMMAND} {version()}")
        raise typer.Exit


def _as_json(argv: Sequence[str]) -> bool:
    """Whether errors are JSON, as far as it shows before the arguments are understood."""
    return "--json" in argv


def _flush() -> None:
    """Writes what is left of standard output, unless its reader has gone (`rankload inspect PATH | head`)."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Else the interpreter would try again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
