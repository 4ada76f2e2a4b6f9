"""The command line where typer or rich is not installed: `demo` works, every other command says what to install."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .commands.endings import EXIT_CODES, INSTALL, WRONG_ARGUMENTS, say_error


def run_without_typer(
    argv: Sequence[str], *, program: str, version: str, commands: Sequence[str], missing: str
) -> int:
    """Runs the command that `argv` names, and returns its exit code; `missing` says which library is not there."""
    if argv and argv[0] in commands and argv[0] != "demo":
        print(f"rankload {argv[0]} needs {missing}, which is not installed: {INSTALL}", file=sys.stderr)
        return WRONG_ARGUMENTS
    top = argparse.ArgumentParser(
        prog=program,
        description="Resume distributed PyTorch jobs.",
        epilog=f"{EXIT_CODES} The commands {', '.join(one for one in commands if one != 'demo')} need {INSTALL}.",
    )
    top.add_argument("--version", action="version", version=f"{program} {version}")
    places = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = places.add_parser(
        "demo",
        help="train, save, restore over HTTP and go on, with 4 ranks on this machine's CPU",
        epilog=EXIT_CODES,
    )
    demo.add_argument(
        "--stage", type=int, choices=(1, 2, 3), default=1, help="DeepSpeed ZeRO stage (default 1)"
    )
    demo.add_argument("--plain", action="store_true", help="plain DDP and one .pt file")
    arguments = top.parse_args(argv)
    from .demo import demo as run_demo

    try:
        return run_demo(stage=None if arguments.plain else arguments.stage)
    except Exception as error:
        return say_error(error, as_json=False, debug=False)
