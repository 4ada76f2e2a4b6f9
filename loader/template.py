"""Path templates: which object a rank's checkpoint is. Pure.

    {rank}  {local_rank}  {node_rank}  {run_name}      with any format spec: {rank:05d}
    <rank>  <local_rank>  <node_rank>  <run_name>      the same, without a spec
    {{  }}                                             a brace itself

``<`` and ``>`` may occur in file names, so only ``<word>``, where ``word`` could be a variable's name, is
taken as a variable (and refused where there is none of that name); any other ``<`` stays as it is. Everything
else, ``#`` and ``?`` included, is literal. What a variable expands to is never expanded again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import TemplateError

VARIABLES = ("rank", "local_rank", "node_rank", "run_name")

_TOKEN = re.compile(r"\{\{|\}\}|\{(?P<field>[^{}]*)\}|<(?P<angle>[A-Za-z_][A-Za-z0-9_]*)>|(?P<stray>[{}])")
_FIELD = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::(?P<spec>.*))?\Z", re.DOTALL)
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
    for piece in _pieces(template):
        if isinstance(piece, str):
            text = plain = piece
        else:
            text = _substitute(template, piece, values[piece.name])
            plain = "x"
        parts.append(text)
        neutral.append(plain)
    path = "".join(parts)
    if "\0" in path:
        raise TemplateError(f"{template!r}: the path holds a NUL character", path=template)
    if _upward_steps(path) > _upward_steps("".join(neutral)):
        raise TemplateError(
            f"{template!r}: run_name={run_name!r} would lead out of its folder; a run name may not hold '..'",
            path=template,
        )
    return path


def expand_for_rank_zero(template: str, *, run_name: str | None) -> str:
    """The one file of a checkpoint that is not sharded: rank, local_rank and node_rank are all 0."""
    return expand_path(template, rank=0, local_rank=0, node_rank=0, run_name=run_name)


def template_variables(template: str) -> frozenset[str]:
    """Names of the variables that `template` uses. Raises `TemplateError` as `expand_path` does."""
    return frozenset(piece.name for piece in _pieces(template) if isinstance(piece, _Variable))


def escape_braces(text: str) -> str:
    """A template that stands for `text` itself, unless it holds a ``<word>``."""
    return text.replace("{", "{{").replace("}", "}}")


def _pieces(template: str) -> Iterator[str | _Variable]:
    position = 0
    for match in _TOKEN.finditer(template):
        if match.start() > position:
            yield template[position : match.start()]
        position = match.end()
        if match["stray"] is not None:
            raise TemplateError(
                f"{template!r}: single {match['stray']!r} at character {match.start() + 1}; "
                "write '{{' or '}}' for a brace itself",
                path=template,
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
        raise TemplateError(
            f"{template!r}: {shown} is not a variable; expected a plain name with an optional format spec, "
            f"such as {{rank}} or {{rank:05d}}. Known variables: {', '.join(VARIABLES)}",
            path=template,
        )
    return _variable(template, match["name"], match["spec"] or "", shown)


def _variable(template: str, name: str, spec: str, shown: str) -> _Variable:
    if name not in VARIABLES:
        raise TemplateError(
            f"{template!r}: unknown variable {shown}. Known variables: {', '.join(VARIABLES)}", path=template
        )
    return _Variable(name, spec)


def _substitute(template: str, variable: _Variable, value: int | str | None) -> str:
    if value is None:
        raise TemplateError(
            f"{template!r} uses {{{variable.name}}}, but the state has no run name; "
            "set it with State(run_name=...)",
            path=template,
        )
    try:
        if _LONG_NUMBER.search(variable.spec):
            raise ValueError("width or precision above 999")
        text = format(value, variable.spec)
    except (ValueError, OverflowError) as error:
        raise TemplateError(
            f"{template!r}: format spec {variable.spec!r} does not fit {variable.name}={value!r}: {error}",
            path=template,
        ) from error
    if isinstance(value, int) and "/" in text:
        raise TemplateError(
            f"{template!r}: format spec {variable.spec!r} puts a '/' into the path", path=template
        )
    return text


def _upward_steps(path: str) -> int:
    return path.split("/").count("..")
