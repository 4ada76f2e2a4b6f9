"""Expands path templates to the object that a rank's checkpoint is. Pure.

    {rank}  {local_rank}  {node_rank}  {run_name}      with any format spec: {rank:05d}
    <rank>  <local_rank>  <node_rank>  <run_name>      the same, without a spec
    {{  }}                                             a brace itself

In an http(s) or ``file:`` URI, what a variable expands to is percent-encoded, so that a ``#``, ``?`` or ``%`` in a run
name is a character of the object's name there too; and ``%7Brank%7D``, as ``Path.as_uri`` writes it in a ``file:`` URI,
is ``{rank}``.

``<`` and ``>`` may occur in file names, so only ``<word>``, where ``word`` could be a variable's name, is
taken as a variable (and refused where there is none of that name); any other ``<`` stays as it is. Everything
else, ``#`` and ``?`` included, is literal. What a variable expands to is never expanded again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote, unquote

from .errors import TemplateError
from .redaction import redact_path

VARIABLES = ("rank", "local_rank", "node_rank", "run_name")

_TOKEN = re.compile(r"\{\{|\}\}|\{(?P<field>[^{}]*)\}|<(?P<angle>[A-Za-z_][A-Za-z0-9_]*)>|(?P<stray>[{}])")
_FIELD = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::(?P<spec>.*))?\Z", re.DOTALL)
_URI = re.compile(r"https?://|(?:file|local):/", re.IGNORECASE)
_FILE_URI = re.compile(r"(?:file|local):/", re.IGNORECASE)
_ENCODED_FIELD = re.compile(r"(?:%7B)+[^/]*?(?:%7D)+|%3C[a-z_][a-z0-9_]*%3E", re.IGNORECASE)
_LONG_NUMBER = re.compile(r"\d{4,}")


@dataclass(frozen=True, slots=True)
class _Variable:
    name: str
    spec: str


def expand_path(template: str, *, rank: int, local_rank: int, node_rank: int, run_name: str | None) -> str:
    """`template` with every variable replaced by this rank's value.

    Raises `TemplateError` for an unknown variable, a malformed field or spec, ``{run_name}`` without a run
    name, and a run name that would lead out of its folder through ``..``.
    """
    values: dict[str, int | str | None] = {
        "rank": rank,
        "local_rank": local_rank,
        "node_rank": node_rank,
        "run_name": run_name,
    }
    parts, neutral = [], []
    is_uri = _URI.match(template) is not None
    for piece in _pieces(template):
        if isinstance(piece, str):
            text = plain = piece
        else:
            text = _substitute(template, piece, values[piece.name])
            text = quote(text, safe="/") if is_uri else text
            plain = "x"
        parts.append(text)
        neutral.append(plain)
    path = "".join(parts)
    if "\0" in path:
        raise _error(template, "the path holds a NUL character")
    if _upward_steps(path) > _upward_steps("".join(neutral)):
        raise _error(
            template, f"run_name={run_name!r} would lead out of its folder; a run name may not hold '..'"
        )
    return path


def expand_for_rank_zero(template: str, *, run_name: str | None) -> str:
    """`template` expanded with rank, local_rank and node_rank 0: the first file of a checkpoint, or its only one."""
    return expand_path(template, rank=0, local_rank=0, node_rank=0, run_name=run_name)


def expand_for_second_rank(template: str, *, run_name: str | None) -> str:
    """`template` expanded for rank 1, or where it names the node alone, for node 1: the file after the first."""
    node = int(not template_variables(template) & {"rank", "local_rank"})
    return expand_path(template, rank=1, local_rank=1 - node, node_rank=node, run_name=run_name)


def template_variables(template: str) -> frozenset[str]:
    """Names of the variables that `template` uses. Raises `TemplateError` as `expand_path` does."""
    return frozenset(piece.name for piece in _pieces(template) if isinstance(piece, _Variable))


def _pieces(template: str) -> Iterator[str | _Variable]:
    if _FILE_URI.match(template):
        template = _ENCODED_FIELD.sub(lambda match: unquote(match[0]), template)
    position = 0
    for match in _TOKEN.finditer(template):
        if match.start() > position:
            yield template[position : match.start()]
        position = match.end()
        if match["stray"] is not None:
            raise _error(
                template,
                f"single {match['stray']!r} at character {match.start() + 1} of the path; "
                "write '{{' or '}}' for a brace itself",
            )
        if match["angle"] is not None:
            yield _variable(template, match["angle"], "", match[0])
        elif match["field"] is not None:
            yield _field(template, match["field"], match[0])
        else:
            yield match[0][0]
    if position < len(template):
        yield template[position:]


def _field(template: str, field: str, shown: str) -> _Variable:
    match = _FIELD.match(field)
    if match is None:
        raise _error(
            template,
            f"{shown} is not a variable; expected a plain name with an optional format spec, such as {{rank}} or "
            f"{{rank:05d}}. Known variables: {', '.join(VARIABLES)}",
        )
    return _variable(template, match["name"], match["spec"] or "", shown)


def _variable(template: str, name: str, spec: str, shown: str) -> _Variable:
    if name not in VARIABLES:
        raise _error(template, f"unknown variable {shown}. Known variables: {', '.join(VARIABLES)}")
    return _Variable(name, spec)


def _substitute(template: str, variable: _Variable, value: int | str | None) -> str:
    if value is None:
        raise _error(
            template,
            f"it uses {{{variable.name}}}, but no run name was given; set it with State(run_name=...), or as read's "
            "argument run_name",
        )
    try:
        if _LONG_NUMBER.search(variable.spec):
            raise ValueError("width or precision above 999")
        text = format(value, variable.spec)
    except (ValueError, OverflowError) as error:
        raise _error(
            template, f"format spec {variable.spec!r} does not fit {variable.name}={value!r}: {error}"
        ) from error
    if isinstance(value, int) and "/" in text:
        raise _error(template, f"format spec {variable.spec!r} puts a '/' into the path")
    return text


def _error(template: str, problem: str) -> TemplateError:
    described = redact_path(template)
    return TemplateError(f"{described!r}: {problem}", path=described)


def _upward_steps(path: str) -> int:
    return path.split("/").count("..")
