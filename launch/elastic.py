"""Runs torchrun through its own API, and writes which ranks failed: ``elastic FOLDER TORCHRUN'S ARGUMENTS``.

Torchrun knows the exit code or the signal of each of its ranks, and says it by an exception; as a command it prints a
table of it. Here it becomes `FAILURES` in the folder of the ranks' records.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

FAILURES = "torchrun.json"
"""A list of ``{"rank": .., "pid": .., "exit_code": ..}``: negative for a signal."""


def main(words: Sequence[str]) -> int:
    """Runs torchrun with the arguments after the folder; returns its exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    torchrun: Any = run
    folder, *arguments = words
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as error:
        failures = [
            {"rank": rank, "pid": one.pid, "exit_code": one.exitcode} for rank, one in error.failures.items()
        ]
        with open(os.path.join(folder, FAILURES), "w", encoding="utf-8") as file:
            json.dump(failures, file)
        return 1
    except SignalException as error:
        print(f"torchrun ended its ranks, and ends: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
