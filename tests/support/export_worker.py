"""Exports a checkpoint again and again, each time killed one step later, and says what each kill left behind.

    python export_worker.py SOURCE OUT TO BEFORE

OUT is a local folder, or ``disk://FOLDER`` for the same as a store. BEFORE is an export that OUT has at first, "" for
none. Each export is a process of its own, which sends itself SIGKILL at its Nth step: before it changes a file in OUT,
or once it has read four more pieces. The last line of output is a list: ``old``, ``new``, ``nothing``, or what else a
load would take.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from rankload.loader.alone import EVERYTHING, open_alone
from rankload.loader.exporting.export import export_checkpoint
from rankload.loader.materialize.tensors import read_tensor

from rankload import RankloadError

CHANGES = ("os.rename", "os.remove", "os.mkdir", "shutil.move", "shutil.copyfile")


class Disk(LocalFileSystem):
    protocol = "disk"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("disk://")


def export(source: str, out: str, to: str, last_step: int) -> None:
    """Exports, and ends this process at step `last_step`."""
    folder, steps, pieces = out.removeprefix("disk://"), 0, 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    def piece(*_: int) -> None:
        nonlocal pieces
        pieces += 1
        if pieces % 4 == 0:
            step()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[1], str) and args[1][:1] in ("w", "x")
        if (event in CHANGES or writes) and any(str(one).startswith(folder) for one in args):
            step()

    sys.addaudithook(hook)
    export_checkpoint(source, out, to=to, max_shard_bytes=4000, force=True, on_progress=piece)  # type: ignore[arg-type]


def values(path: str) -> dict[str, torch.Tensor] | None:
    """What a load would take of `path`; None where it would take nothing."""
    try:
        with open_alone(path, EVERYTHING) as opened:
            return {name: read_tensor(one) for name, one in opened.saved.state["model"].items()}
    except RankloadError:
        return None


def equal(one: dict[str, torch.Tensor] | None, other: dict[str, torch.Tensor]) -> bool:
    return one is not None and all(name in one and torch.equal(one[name], other[name]) for name in other)


def main(source: str, out: str, to: str, before: str) -> None:
    fsspec.register_implementation("disk", Disk)
    folder = Path(out.removeprefix("disk://"))
    new, old = values(source), values(before) if before else None
    assert new is not None
    outcomes = []
    for step in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        if before:
            shutil.copytree(before, folder)
        child = os.fork()
        if not child:
            code = 1
            try:
                export(source, out, to, step)
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.WIFSIGNALED(status), status
        left = values(str(folder))
        if left is None:
            outcomes.append("nothing")
        elif old is not None and equal(left, old) and not equal(left, new):
            outcomes.append("old")
        else:
            outcomes.append(
                "new" if equal(left, new) else f"step {step}: {sorted(left)}, {os.listdir(folder)}"
            )
    # What the kills left does not stay, either.
    export_checkpoint(source, folder, to=to, max_shard_bytes=4000, force=True)  # type: ignore[arg-type]
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
