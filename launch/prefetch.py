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
from collections.abc import Iterator, Mapping
from typing import Any

from ..loader.options import RESUME, LoadOptions
from ..loader.redaction import redact_path
from .children import end


@contextlib.contextmanager
def fetching(
    path: str | None, environ: Mapping[str, str], storage_options: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Around a job that resumes from `path`: what it will load is fetched, until it ends. None fetches nothing."""
    process = _start(path, environ, storage_options) if path is not None and "://" in path else None
    try:
        yield
    finally:
        if process is not None:
            end(process)


def _start(
    path: str, environ: Mapping[str, str], storage_options: Mapping[str, Any] | None
) -> subprocess.Popen[bytes] | None:
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


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main(os.environ.get(RESUME, ""), json.load(sys.stdin))
