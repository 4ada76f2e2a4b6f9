"""One call of a command: the options that commands share, resolved, and how the command says its result."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, get_type_hints

import typer

from ...loader.options import LoadOptions, Options, resolve_options
from .blocks import Block, show
from .endings import DONE, SCHEMA_VERSION, WrongArgumentsError, say_error

_GROUP = "Options of the load"

SHARED: dict[str, tuple[Any, Any]] = {
    "json": (
        Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON.")],
        False,
    ),
    "debug": (
        Annotated[bool, typer.Option("--debug", help="Print an error's traceback too.")],
        False,
    ),
    "storage_option": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--storage-option",
                metavar="K=V",
                rich_help_panel=_GROUP,
                help="A setting of the path's file system, in fsspec's names; may be repeated. V is text, but for "
                "true, false and JSON that begins with { or [; K:=V takes any JSON.",
            ),
        ],
        None,
    ),
    "cache_dir": (
        Annotated[
            str | None,
            typer.Option(
                metavar="FOLDER", rich_help_panel=_GROUP, help="This node's folder for fetched files."
            ),
        ],
        None,
    ),
    "cache_home": (
        Annotated[
            Literal["auto", "memory", "disk"] | None,
            typer.Option(rich_help_panel=_GROUP, help="Where that folder is when it is not given."),
        ],
        None,
    ),
    "cache_size": (
        Annotated[
            str | None,
            typer.Option(
                metavar="SIZE",
                rich_help_panel=_GROUP,
                help="Bytes of fetched files that may stay for later loads, such as 20GB.",
            ),
        ],
        None,
    ),
    "stall_timeout": (
        Annotated[
            float | None,
            typer.Option(
                metavar="SECONDS",
                rich_help_panel=_GROUP,
                help="Give up after so many seconds without progress.",
            ),
        ],
        None,
    ),
    "verify": (
        Annotated[
            Literal["before", "during", "off"] | None,
            typer.Option(rich_help_panel=_GROUP, help="When stored checksums are compared."),
        ],
        None,
    ),
    "mode": (
        Annotated[
            Literal["node", "direct", "auto", "job"] | None,
            typer.Option(rich_help_panel=_GROUP, help="How the bytes of remote files reach the ranks."),
        ],
        None,
    ),
    "safe_type": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--safe-type",
                metavar="NAME",
                rich_help_panel=_GROUP,
                help="A type (package.module.Type) that the checkpoint may construct; may be repeated.",
            ),
        ],
        None,
    ),
    "layout": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--layout",
                metavar="ROLE=KEY",
                rich_help_panel=_GROUP,
                help="Which key of a hand-written file is the model, optimizer and so on; may be repeated.",
            ),
        ],
        None,
    ),
}
"""By argument: typer's type, and the default. A field of `LoadOptions` has the same help there at more length."""


@dataclass(frozen=True)
class Call:
    """What a command is told beyond its own arguments."""

    command: str
    """As it was called: ``inspect``, or ``cache list``."""
    json: bool = False
    debug: bool = False
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The other options of `SHARED`, as they were given."""

    @cached_property
    def load_options(self) -> LoadOptions:
        """The options of the load. Raises `OptionError`, or `WrongArgumentsError` for text that is no ``K=V``."""
        given = self.given
        return LoadOptions(
            cache_dir=given.get("cache_dir"),
            cache_home=given.get("cache_home"),
            cache_size=given.get("cache_size"),
            stall_timeout_s=given.get("stall_timeout"),
            verify=given.get("verify"),
            mode=given.get("mode"),
            safe_types=tuple(given.get("safe_type") or ()),
            storage_options=storage_options(given.get("storage_option") or ()),
            layout=dict(_pair(one, "--layout", "ROLE=KEY") for one in given.get("layout") or ()),
        )

    @cached_property
    def options(self) -> Options:
        """The same, with the environment's values and the defaults where nothing was given."""
        return resolve_options(self.load_options)

    @property
    def progress_bar(self) -> bool:
        """Whether somebody watches, to whom progress is shown on standard error."""
        return sys.stderr.isatty() and not self.json

    def show(self, fields: Mapping[str, Any], blocks: Sequence[Block]) -> None:
        """Prints the result: `fields` with ``--json``, which are JSON types, else `blocks`."""
        if self.json:
            whole = {"schema_version": SCHEMA_VERSION, "command": self.command, **fields}
            json.dump(whole, sys.stdout, allow_nan=False)
            print()
        else:
            show(blocks)


def sharing(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a command that takes only these of `SHARED`, besides ``--json`` and ``--debug``."""
    unknown = set(names) - set(SHARED)
    if unknown:
        raise ValueError(f"no shared options: {sorted(unknown)}")

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__dict__["shares"] = ("json", "debug", *names)
        return function

    return mark


def command(name: str, function: Callable[..., int | None]) -> Callable[..., int]:
    """`function` as typer takes it: with the shared options in its signature, and errors made an exit code."""
    signature = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)
    own = [
        one.replace(annotation=hints.get(one.name, one.annotation)) for one in signature.parameters.values()
    ]
    takes_call = bool(own) and own[0].name == "call"
    shared = getattr(function, "shares", tuple(SHARED)) if takes_call else ()
    added = [
        inspect.Parameter(
            one, inspect.Parameter.KEYWORD_ONLY, annotation=SHARED[one][0], default=SHARED[one][1]
        )
        for one in shared
        if one not in signature.parameters
    ]

    def called(**arguments: Any) -> int:
        given = {one.name: arguments.pop(one.name) for one in added}
        call = Call(name, given.pop("json", False), given.pop("debug", False), given)
        try:
            if takes_call:
                arguments["call"] = call
            code = function(**arguments)
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            return say_error(error, as_json=call.json, debug=call.debug)
        return DONE if code is None else code

    kept = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (own[1:] if takes_call else own)
    ] + added
    called.__name__ = function.__name__
    # A terminal breaks lines where it ends; those of the source would be broken once more.
    called.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(function.__doc__ or ""))
    called.__annotations__ = {one.name: one.annotation for one in kept}
    called.__dict__["__signature__"] = inspect.Signature(kept)
    return called


def storage_options(given: Sequence[str]) -> dict[str, Any]:
    """``K=V`` and ``K:=JSON`` as a dict. Raises `WrongArgumentsError`, whose message never has a value."""
    found: dict[str, Any] = {}
    for text in given:
        key, value = _pair(text, "--storage-option", "K=V")
        if key.endswith(":"):
            found[key[:-1]] = _json(key[:-1], value)
        elif value in ("true", "false") or value[:1] in ("{", "["):
            found[key] = _json(key, value)
        else:
            found[key] = value
    return found


def renames(given: Sequence[str] | None) -> dict[str, str]:
    """What ``--rename OLD=NEW`` says, as `LoadOptions.rename` takes it. Raises `WrongArgumentsError`."""
    found: dict[str, str] = {}
    for text in given or ():
        old, separator, new = text.partition("=")
        if not separator:
            raise WrongArgumentsError(f"--rename {text!r}: expected OLD=NEW")
        found[old] = new
    return found


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        shown = f" {key!r}" if option != "--storage-option" else ""
        raise WrongArgumentsError(f"{option}{shown}: expected {form}")
    return key, value


def _json(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise WrongArgumentsError(f"--storage-option {key}: its value is no JSON") from None
