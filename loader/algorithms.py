"""Algorithms that a checkpoint was trained with and that change the model: Composer's ``required_on_load``.

Composer rebuilds such an algorithm by evaluating the text that the checkpoint holds. Here that text is parsed
as one call of one registered constructor with literal arguments; nothing else is ever rebuilt.
"""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from .errors import AlgorithmError, FormatError, OptionError

__all__ = [
    "Algorithm",
    "AlgorithmPass",
    "Event",
    "apply_required",
    "register_algorithm",
    "registered_algorithm",
    "required_algorithms",
    "without_unregistered",
]


class Event(str, Enum):
    """When an algorithm is applied; a load knows only ``INIT``."""

    INIT = "init"


@runtime_checkable
class Algorithm(Protocol):
    """What an algorithm offers; Composer's own satisfy it.

    ``repr(algorithm)`` must be the call that makes it, such as ``SqueezeExcite(latent_channels=4)``.
    """

    def match(self, event: Any, state: Any) -> bool: ...

    def apply(self, event: Any, state: Any, logger: Any) -> int | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    @staticmethod
    def required_on_load() -> bool: ...


AlgorithmPass = Callable[[Sequence[Any], Any], Sequence[Any]]
"""Takes the algorithms and the event, returns them in the order in which they should run."""

_REGISTRY: dict[str, Callable[..., Any]] = {}


def register_algorithm(constructor: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
    """Lets checkpoints rebuild `constructor`'s objects under `name` (default: its ``__name__``).

    Usable as a decorator. Composer's own algorithms need no registration where Composer has been imported.
    """
    key = name or getattr(constructor, "__name__", "")
    if not key.isidentifier():
        raise ValueError(f"{key!r} is no name for an algorithm: expected an identifier")
    _REGISTRY[key] = constructor
    return constructor


def registered_algorithm(name: str) -> Callable[..., Any] | None:
    """The constructor registered under `name`; else Composer's algorithm of that name, if Composer is imported."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    composer = sys.modules.get("composer.algorithms")
    found = getattr(composer, name, None) if composer is not None and not name.startswith("_") else None
    base = getattr(sys.modules.get("composer.core"), "Algorithm", None)
    if isinstance(found, type) and isinstance(base, type) and issubclass(found, base):
        return found
    return None


def parse_call(text: str) -> tuple[str, list[Any], dict[str, Any]] | None:
    """``Name(literal, key=literal)`` as its parts; None for any other text."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        return None
    try:
        args = [ast.literal_eval(arg) for arg in tree.args]
        kwargs = {word.arg: ast.literal_eval(word.value) for word in tree.keywords if word.arg}
    except (ValueError, TypeError, RecursionError, MemoryError, SyntaxError):
        return None
    if len(kwargs) != len(tree.keywords):
        return None  # **expansion
    return tree.func.id, args, kwargs


def saved_algorithms(entries: Any) -> list[tuple[str, str]]:
    """(name, repr) of each algorithm in a checkpoint's ``algorithms``; empty for the layouts before lists."""
    if not isinstance(entries, list):
        return []
    found = []
    for entry in entries:
        if not (isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise FormatError(f"state/algorithms holds {entry!r}, expected pairs (name, {{'repr': text}})")
        text = entry[1].get("repr") if isinstance(entry[1], Mapping) else None
        found.append((entry[0], text if isinstance(text, str) else ""))
    return found


def required_algorithms(
    entries: Any, present: Sequence[Any], exclude: Collection[str] | None = None
) -> list[Any]:
    """New objects for the algorithms that the checkpoint needs and `present` lacks, in the checkpoint's order.

    Warns of one that is present in another form, and of one that cannot be rebuilt. Applies nothing.
    """
    reprs: dict[type, list[str]] = {}
    for algorithm in present:
        if algorithm.required_on_load():
            reprs.setdefault(type(algorithm), []).append(repr(algorithm))
    missing: list[Any] = []
    for name, text in saved_algorithms(entries):
        constructor = registered_algorithm(name)
        if exclude is not None and name in exclude:
            continue
        if constructor is None or not getattr(constructor, "required_on_load", lambda: False)():
            continue
        algorithm = _rebuild(constructor, name, text)
        if algorithm is None:
            warnings.warn(
                f"The checkpoint was trained with {text or name}, which is required on load, but it cannot be "
                "rebuilt from that text: expected the call of a registered constructor with literal arguments. "
                "Weights of layers that it changes may fail to load. Pass it in State(algorithms=...), or leave "
                f"it out with exclude_algorithms=[{name!r}]",
                stacklevel=2,
            )
        elif type(algorithm) in reprs and repr(algorithm) not in reprs[type(algorithm)]:
            warnings.warn(
                f"The checkpoint was trained with {text}, required on load, but this job has "
                f"{', '.join(reprs[type(algorithm)])}; yours is kept. Weights of layers that it changes may "
                "fail to load",
                stacklevel=2,
            )
        elif type(algorithm) not in reprs:
            missing.append(algorithm)
    return missing


def _rebuild(constructor: Callable[..., Any], name: str, text: str) -> Any | None:
    call = parse_call(text)
    if call is None or call[0] != name:
        return None
    try:
        return constructor(*call[1], **call[2])
    except Exception:
        return None  # the constructor has changed since: the caller warns, with the text


def apply_required(
    missing: Sequence[Any],
    state: Any,
    logger: Any,
    algorithm_passes: Sequence[AlgorithmPass] | None = None,
    note_change: Callable[[str], None] = lambda name: None,
) -> None:
    """Appends `missing` to ``state.algorithms`` and applies them, in the order of the passes.

    Raises `OptionError` where a pass puts one of them before an algorithm of the user's, which has been applied
    already, and `AlgorithmError` where applying fails; both are ValueErrors. Calls `note_change` before each
    change.
    """
    if not missing:
        return
    names = [type(algorithm).__qualname__ for algorithm in missing]
    way_out = f"To load without them, use exclude_algorithms={names!r}"
    order = [*state.algorithms, *missing]
    for algorithm_pass in algorithm_passes or ():
        order = list(algorithm_pass(order, _init_event(missing[0])))
    new = {id(algorithm) for algorithm in missing}
    flags = [id(algorithm) in new for algorithm in order]
    if flags != sorted(flags):
        raise OptionError(
            f"The checkpoint needs {[repr(a) for a in missing]}, but the algorithm passes order at least one "
            f"of them before an algorithm of this job, which has been applied already. {way_out}"
        )
    for algorithm in (a for a in order if id(a) in new):
        note_change(f"algorithm {algorithm!r}")
        state.algorithms.append(algorithm)
        event = _init_event(algorithm)
        try:
            if algorithm.match(event, state):
                algorithm.apply(event, state, logger)
        except Exception as error:
            raise AlgorithmError(
                f"The checkpoint needs {algorithm!r}, but applying it failed: {error}. {way_out}"
            ) from error
        warnings.warn(
            f"Added {algorithm!r}, which the checkpoint was trained with and which is required on load. {way_out}",
            stacklevel=2,
        )


def _init_event(algorithm: Any) -> Any:
    """The event as the algorithm's own library spells it."""
    core = sys.modules.get("composer.core")
    if core is not None and type(algorithm).__module__.startswith("composer."):
        return core.Event.INIT
    return Event.INIT


def without_unregistered(entries: Any) -> tuple[Any, list[str]]:
    """`entries` without those whose text is not one call of a registered constructor with literals.

    For a state object that would evaluate the text itself, as Composer's does. Returns what is left, and the
    names of what was taken out although it is required on load (or may be: its class is not known).
    """
    if not isinstance(entries, list):
        return [], []
    kept, refused = [], []
    for entry, (name, text) in zip(entries, saved_algorithms(entries), strict=True):
        constructor = registered_algorithm(name)
        call = parse_call(text)
        if constructor is not None and call is not None and call[0] == name:
            kept.append(entry)
        elif constructor is None or getattr(constructor, "required_on_load", lambda: False)():
            refused.append(name)
    return kept, refused
