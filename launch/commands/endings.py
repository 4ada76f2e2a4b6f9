"""How a command ends: its exit code, and what standard error gets where it failed. Needs neither typer nor rich."""

from __future__ import annotations

import json
import sys
import traceback

from ...loader.errors import OptionError, RankloadError, TemplateError

SCHEMA_VERSION = 1
"""Of what ``--json`` prints, on standard output and standard error; a field that goes or changes makes it another."""
DONE = 0
FOUND_WRONG = 1
WRONG_ARGUMENTS = 2
UNREADABLE = 3
INTERRUPTED = 130
EXIT_CODES = (
    "Exit codes: 0 done; 1 the command found something wrong; 2 wrong arguments; 3 the checkpoint cannot be read, or "
    "another error of rankload; 130 interrupted."
)
"""For every command's help."""
INSTALL = "pip install 'rankload[cli]'"


class WrongArgumentsError(Exception):
    """The command line cannot be understood; the message says why, and how it is used."""


def code_of(error: BaseException) -> int:
    """The exit code of a command that `error` ended."""
    if isinstance(error, KeyboardInterrupt | BrokenPipeError):
        return INTERRUPTED
    if isinstance(error, WrongArgumentsError | OptionError | TemplateError):
        return WRONG_ARGUMENTS
    return UNREADABLE


def say_error(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Prints `error` to standard error, as one block or one JSON object; returns the exit code.

    A mistake of rankload itself, which is no `RankloadError`, comes with its traceback, `debug` or not.
    """
    if isinstance(error, BrokenPipeError):
        return INTERRUPTED
    if isinstance(error, KeyboardInterrupt):
        kind, message = "Interrupted", "what was started has been ended"
    elif isinstance(error, WrongArgumentsError):
        kind, message = "WrongArguments", str(error)
    elif isinstance(error, RankloadError):
        kind, message = type(error).__name__, str(error)
    else:
        kind = "InternalError"
        message = f"a mistake in rankload itself, please report it: {type(error).__name__}: {error}"
        debug = True
    path = error.path if isinstance(error, RankloadError) else None
    lines = "".join(traceback.format_exception(error)) if debug else ""
    if as_json:
        said = {"type": kind, "message": message, "path": path}
        if lines:
            said["traceback"] = lines
        print(json.dumps({"schema_version": SCHEMA_VERSION, "error": said}), file=sys.stderr)
    else:
        print(f"{lines}{kind}: {message}", file=sys.stderr)
    return code_of(error)
