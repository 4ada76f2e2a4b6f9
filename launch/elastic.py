"""Runs torchrun through its own API, and writes which ranks failed: ``elastic FOLDER TORCHRUN'S ARGUMENTS``.

Torchrun learns the exit code or the signal of each rank where it waits for the processes of a round, and tells it of
the last round alone. Here what each wait has found becomes `FAILURES` in the folder of the ranks' records.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

FAILURES = "torchrun.json"
"""A list of ``{"pid": .., "exit_code": ..}``, of all rounds: negative for a signal."""


def main(words: Sequence[str]) -> int:
    """Runs torchrun with the arguments after the folder; returns its exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    torchrun: Any = run
    folder, *arguments = words
    _write_failures(os.path.join(folder, FAILURES))
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError:
        return 1
    except SignalException as error:
        print(f"torchrun ended its ranks, and ends: {error}", file=sys.stderr)
        return 1
    return 0


def _write_failures(path: str) -> None:
    """From now on, whatever torchrun's waits find to have failed is written to `path`, with what was found before."""
    from torch.distributed.elastic.multiprocessing.api import PContext

    wait = PContext.wait
    found: list[dict[str, int]] = []

    def noted(context: Any, *arguments: Any, **named: Any) -> Any:
        result = wait(context, *arguments, **named)
        if result is not None and result.failures:
            found.extend({"pid": one.pid, "exit_code": one.exitcode} for one in result.failures.values())
            with open(path, "w", encoding="utf-8") as file:
                json.dump(found, file)
        return result

    PContext.wait = noted  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
