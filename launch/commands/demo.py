"""``rankload demo``."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from ..demo import demo as run_demo
from .blocks import Line
from .calls import Call, sharing
from .endings import DONE


@sharing()
def demo(
    call: Call,
    stage: Annotated[int, typer.Option(min=1, max=3, help="DeepSpeed ZeRO stage.")] = 1,
    plain: Annotated[
        bool, typer.Option("--plain", help="Plain DDP and one .pt file, as where deepspeed is not installed.")
    ] = False,
) -> int:
    """Train, save, restore over HTTP and go on, with 4 ranks on this machine's CPU.

    Trains a small model on 4 ranks, saves a checkpoint, serves it over HTTP on loopback, restores it into 4 fresh
    ranks, and compares their losses with those of the run that never stopped. Exit code 1 where they differ.
    """
    # As JSON there is the verdict alone; what the demo tells on its way goes where a person may read it.
    with contextlib.redirect_stdout(sys.stderr) if call.json else contextlib.nullcontext():
        code = run_demo(stage=None if plain else stage)
    if call.json:
        call.show({"equal": code == DONE}, [Line()])
    return code
