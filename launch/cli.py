"""Parses the command line and runs one command.

Exit codes: 0 done, 1 the command found something wrong, 2 wrong arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from importlib import metadata
from types import FrameType

COMMAND = "rankload"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` names (this process's arguments by default); returns its exit code."""
    arguments = parser().parse_args(argv)
    # So that SIGTERM, too, ends the processes that the command started.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted; what was started has been ended")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``run``, a function of the parsed arguments."""
    top = argparse.ArgumentParser(prog=COMMAND, description="Resume distributed PyTorch jobs.")
    top.add_argument("--version", action="version", version=f"{COMMAND} {version()}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train, save, restore over HTTP and go on, with 4 ranks on this machine's CPU",
        description=(
            "Trains a small model on 4 ranks, saves a checkpoint, serves it over HTTP on loopback, restores "
            "it into 4 fresh ranks, and compares their losses with those of the run that never stopped. "
            "Exit code 1 where they differ."
        ),
    )
    demo.add_argument(
        "--stage", type=int, choices=(1, 2, 3), default=1, help="DeepSpeed ZeRO stage (default 1)"
    )
    demo.add_argument(
        "--plain", action="store_true", help="plain DDP and one .pt file, as where deepspeed is not installed"
    )
    demo.set_defaults(run=run_demo)
    return top


def run_demo(arguments: argparse.Namespace) -> int:
    """``rankload demo``."""
    from .demo import demo

    return demo(stage=None if arguments.plain else arguments.stage)


def version() -> str:
    """The installed distribution's version."""
    try:
        return metadata.version("rankload")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
