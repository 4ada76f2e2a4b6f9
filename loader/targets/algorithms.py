"""Adds the algorithms that change a model before its weights are loaded: Composer's ``required_on_load``.

`required_algorithms` rebuilds those that the checkpoint was trained with and the job lacks, `ordered_algorithms` puts
them in order, `apply_required` applies them. Composer rebuilds an algorithm by evaluating the text that the checkpoint
holds. Here that text is parsed as one call of one registered constructor with literal arguments; nothing else is ever
rebuilt.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from ...distributed.printable import warn
from ..errors import AlgorithmError, FormatError, OptionError
from ..saved.values import kind_of
from ..state import AlgorithmPass

__all__ = [
    "Algorithm",
    "AlgorithmPass",
    "Event",
    "apply_required",
    "metrics_logger",
    "ordered_algorithms",
    "register_algorithm",
    "registered_algorithm",
    "required_algorithms",
    "without_unregistered",
]


class Event(str, Enum):
    """When an algorithm is applied; a load applies all at ``INIT``."""

    INIT = "init"


@runtime_checkable
class Algorithm(Protocol):
    """An algorithm that can be added at a load; Composer's own satisfy this protocol.

    ``repr(algorithm)`` must be the call that makes it, such as ``SqueezeExcite(latent_channels=4)``.
    """

    def match(self, event: Any, state: Any) -> bool: ...

    def apply(self, event: Any, state: Any, logger: Any) -> int | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    @staticmethod
    def required_on_load() -> bool: ...


_REGISTRY: dict[str, Callable[..., Any]] = {}
"""Constructors by the name under which checkpoints call them."""


def register_algorithm(constructor: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
    """Lets checkpoints rebuild `constructor`'s objects under `name` (default: its ``__name__``).

    Usable as a decorator. Composer's own algorithms need no registration where Composer has been imported. Raises
    ValueError where the name is no identifier.
    """
    key = name or str(getattr(constructor, "__name__", ""))
    if not key.isidentifier():
        raise ValueError(f"{key!r} is no name for an algorithm: expected an identifier")
    _REGISTRY[key] = constructor
    return constructor


def registered_algorithm(name: str) -> Callable[..., Any] | None:
    """The constructor registered under `name`; else Composer's algorithm of that name, if Composer is imported."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    composer = sys.modules.get("composer.algorithms")
    # Not by getattr, which may run the module's own code.
    found = vars(composer).get(name) if composer is not None and not name.startswith("_") else None
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
    """(name, repr) of each algorithm in a checkpoint's ``algorithms``; [] for older layouts, which are no lists.

    Raises `FormatError` where an entry is no such pair.
    """
    if not isinstance(entries, list):
        return []
    found = []
    for entry in entries:
        if not (isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise FormatError(
                f"state/algorithms holds a {kind_of(entry)}, expected pairs (name, {{'repr': text}})"
            )
        text = entry[1].get("repr") if isinstance(entry[1], Mapping) else None
        found.append((entry[0], text if isinstance(text, str) else ""))
    return found


def required_algorithms(
    entries: Any, present: Sequence[Any], exclude: Collection[str] | None = None
) -> list[Any]:
    """New objects for the algorithms that the checkpoint needs and `present` lacks, in the checkpoint's order.

    Warns of one that is present with other arguments, and of one that cannot be rebuilt. Applies nothing. `entries` is
    the checkpoint's ``algorithms``, `exclude` names to leave out.
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
            warn(
                f"The checkpoint was trained with {text or name}, which is required on load, but it cannot be "
                "rebuilt from that text: expected the call of a registered constructor with literal arguments. "
                "Weights of layers that it changes may fail to load. Pass it in State(algorithms=...), or leave "
                f"it out with exclude_algorithms=[{name!r}]",
                stacklevel=2,
            )
        elif type(algorithm) in reprs and repr(algorithm) not in reprs[type(algorithm)]:
            warn(
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


def ordered_algorithms(
    missing: Sequence[Any], present: Sequence[Any], algorithm_passes: Sequence[AlgorithmPass] | None = None
) -> list[Any]:
    """`missing` in the order in which the passes put them; applies nothing.

    Raises `OptionError` (a ValueError) where a pass puts one of them before one of `present`, which has been
    applied already.
    """
    if not missing:
        return []
    order = [*present, *missing]
    for algorithm_pass in algorithm_passes or ():
        order = list(algorithm_pass(order, _init_event(missing[0])))
    new = {id(algorithm) for algorithm in missing}
    flags = [id(algorithm) in new for algorithm in order]
    if flags != sorted(flags):
        raise OptionError(
            f"The checkpoint needs {[repr(a) for a in missing]}, but the algorithm passes order at least one "
            f"of them before an algorithm of this job, which has been applied already. {_way_out(missing)}"
        )
    return [algorithm for algorithm in order if id(algorithm) in new]


def apply_required(
    ordered: Sequence[Any], state: Any, logger: Any, note_change: Callable[[str], None] = lambda name: None
) -> None:
    """Appends `ordered` to ``state.algorithms`` and applies each at ``INIT``, warning of it.

    Raises `AlgorithmError` (a ValueError) where applying fails. Calls `note_change` before each change.
    """
    logger = metrics_logger(logger)
    for algorithm in ordered:
        note_change(f"algorithm {algorithm!r}")
        state.algorithms.append(algorithm)
        event = _init_event(algorithm)
        try:
            if algorithm.match(event, state):
                algorithm.apply(event, state, logger)
        except Exception as error:
            raise AlgorithmError(
                f"The checkpoint needs {algorithm!r}, but applying it failed: {error}. {_way_out(ordered)}"
            ) from error
        warn(
            f"Added {algorithm!r}, which the checkpoint was trained with and which is required on load. "
            f"{_way_out(ordered)}",
            stacklevel=2,
        )


def _way_out(algorithms: Sequence[Any]) -> str:
    names = [type(algorithm).__qualname__ for algorithm in algorithms]
    return f"To load without them, use exclude_algorithms={names!r}"


def _init_event(algorithm: Any) -> Any:
    """The event as the algorithm's own library spells it."""
    core = sys.modules.get("composer.core")
    if core is not None and type(algorithm).__module__.startswith("composer."):
        return core.Event.INIT
    return Event.INIT


def without_unregistered(entries: Any, present: Sequence[Any] = ()) -> tuple[Any, list[str]]:
    """`entries` without text that is not one call of a registered constructor with literal arguments.

    For a state object that would evaluate the text itself, as Composer's does. The entry of one of `present` that is
    not required on load loses only its text, which Composer does not evaluate. Returns the entries that are left, and
    the names of those taken out that are required on load, or may be: of a class that is not known.
    """
    if not isinstance(entries, list):
        return [], []
    own = {type(algorithm).__qualname__ for algorithm in present}
    kept: list[Any] = []
    refused: list[str] = []
    for entry, (name, text) in zip(entries, saved_algorithms(entries), strict=True):
        constructor = registered_algorithm(name)
        required = constructor is not None and getattr(constructor, "required_on_load", lambda: False)()
        call = parse_call(text)
        if constructor is not None and call is not None and call[0] == name:
            kept.append(entry)
        elif name in own and not required and isinstance(entry[1], Mapping):
            kept.append((name, {key: value for key, value in entry[1].items() if key != "repr"}))
        elif constructor is None or required:
            refused.append(name)
    return kept, refused


class _DroppingLogger:
    """Drops what an algorithm logs, where the user's logger takes no metrics."""

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
        pass


def metrics_logger(logger: Any) -> Any:
    """`logger` where it takes hyperparameters, as algorithms expect; else one that drops them."""
    return logger if callable(getattr(logger, "log_hyperparameters", None)) else _DroppingLogger()
