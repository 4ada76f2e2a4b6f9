"""Fetches what a job resumes from into this node's cache while Python and torch start, in a process of its own.

What goes wrong is said on standard error, and never ends the job: its load fetches for itself then. The variable
``RANKLOAD_RESUME`` says what, and the other ``RANKLOAD_`` variables where it goes. Nothing is fetched of local paths.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from ..loader.options import RESUME, LoadOptions
from ..loader.redaction import redact_path

_ENDING_S = 5.0


def start_fetch(
    path: str, environ: Mapping[str, str], storage_options: Mapping[str, Any] | None = None
) -> subprocess.Popen[bytes] | None:
    """The process that fetches what a job will resume from `path`; None where there is nothing to fetch."""
    if "://" not in path:
        return None
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "rankload.launch.prefetch"],
            stdin=subprocess.PIPE,
            env={**environ, RESUME: path},
            start_new_session=True,
        )
        if process.stdin is not None:
            # By a pipe: what is on a command line, others of this machine can see.
            with process.stdin:
                process.stdin.write(json.dumps(dict(storage_options or {})).encode())
    except OSError as error:
        _say(f"{redact_path(path)} is not fetched ahead: {error}")
        return None
    return process


def end_fetch(process: subprocess.Popen[bytes] | None) -> None:
    """Ends the process, if it still runs: the job does not need it any more."""
    if process is None or process.poll() is not None:
        return
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_ENDING_S)
    if process.poll() is None:
        process.kill()
        process.wait()


def main(path: str, storage_options: Mapping[str, Any]) -> None:
    """Fetches the checkpoint that `autoresume` would take at `path`."""
    # Here alone: each rank imports this module, and only the process that fetches needs these.
    from ..loader.finding import find
    from ..loader.prefetching import prefetch

    try:
        options = LoadOptions(storage_options=storage_options)
        chosen = next((one for one in find(path, options=options) if one.proven), None)
        if chosen is None:
            _say(f"nothing is fetched ahead: {redact_path(path)} has no checkpoint that is whole")
            return
        done = prefetch(chosen.path, options=options)
    except KeyboardInterrupt:
        return
    except Exception as error:
        _say(f"{redact_path(path)} is not fetched ahead, the job's load fetches it: {error}")
        return
    if done.bytes:
        _say(f"{done.bytes:,} bytes of {done.name} were fetched ahead")


def _say(text: str) -> None:
    print(f"rankload run: {text}", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    main(os.environ.get(RESUME, ""), json.load(sys.stdin))
