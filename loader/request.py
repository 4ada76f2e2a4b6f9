"""Holds the arguments of a load, checks them on each rank, and compares them over all ranks.

`agree_on_arguments` does both: `check_arguments` runs on each rank; then rank 0 passes every rank's
`LoadRequest.comparable` to `check_same`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..distributed.session import Session
from .cache.records import Purpose
from .errors import OptionError
from .options import OF_EACH_NODE, LoadOptions, Options, resolve_options
from .redaction import redact_path
from .saved.ignore import IgnoreKeys
from .stages import Stages
from .state import AlgorithmPass, ForeignState, State, as_list
from .torch_modes import what_tensors_lack


@dataclass(frozen=True)
class LoadRequest:
    """The arguments of one load, as one rank gave them; a path object becomes its text."""

    path: str = field(repr=False)  # may have a signature or a password in it
    state: Any
    options: Options
    logger: Any = None
    object_store: Any = None
    weights_only: bool = False
    strict: bool = True
    progress_bar: bool = True
    ignore_keys: IgnoreKeys | str | None = None
    exclude_algorithms: Collection[str] | None = None
    algorithm_passes: Sequence[AlgorithmPass] | None = None
    purpose: Purpose = "load"
    """What the files in the node's cache are used for."""
    renew_indexes: bool = False
    """Whether indexes that no checksum proves are fetched although the node's cache has them."""

    def __post_init__(self) -> None:
        # What is no path stays as it is: `check_arguments` refuses it, in a stage that raises it on all ranks.
        with contextlib.suppress(OptionError):
            object.__setattr__(self, "path", as_path(self.path))

    @property
    def run_name(self) -> str | None:
        name = getattr(self.state, "run_name", None)
        return name if isinstance(name, str) else None

    def comparable(self) -> dict[str, str]:
        """Every argument that must be equal on all ranks, as text; what may hold secrets, as a digest."""
        ignore_keys: object = self.ignore_keys
        if callable(ignore_keys):
            ignore_keys = "a callable"
        return {
            "path": redact_path(self.path),
            "path's user info or query": f"not shown, digest {_digest(self.path)}",
            "object_store": "None" if self.object_store is None else type(self.object_store).__qualname__,
            "load_weights_only": str(self.weights_only),
            "strict_model_weights": str(self.strict),
            "ignore_keys": repr(_plain(ignore_keys)),
            "exclude_algorithms": "None"
            if self.exclude_algorithms is None
            else repr(sorted(self.exclude_algorithms)),
            "algorithm_passes": str(len(self.algorithm_passes or ())),
            "state.run_name": repr(self.run_name),
            **_parts(self.state),
            **{f"options.{name}": text for name, text in _comparable_options(self.options).items()},
        }


def settle_options(
    options: LoadOptions | Mapping[str, Any] | None,
) -> tuple[Options, OptionError | None]:
    """The options to go by, and what is wrong with those given: `agree_on_arguments` raises it, on all ranks.

    All ranks are about to enter a session, in which they would wait for one that raised it at once.
    """
    try:
        return resolve_options(options), None
    except OptionError as error:
        return resolve_options(None, {}), error


def agree_on_arguments(
    request: LoadRequest, problem: OptionError | None, session: Session, stages: Stages
) -> bool:
    """Whether any rank has imported DeepSpeed, the same on all: if none has, no rank's model is an engine.

    Raises `OptionError` on all ranks where one has arguments that do not fit, or where they differ between ranks.
    `problem` is what this rank found before it entered the session. Every rank must call.
    """
    with stages.announced("arguments"):
        if problem is not None:
            raise problem
        lacking = what_tensors_lack()
        if lacking is not None:
            raise OptionError(
                f"torch.empty makes {lacking} here: the call was made inside a context that changes what torch's "
                "constructors give, such as FakeTensorMode, deepspeed.zero.Init or init_empty_weights; build the model "
                "there, and load or save outside of it"
            )
        check_arguments(request)

    def compare(told: Sequence[tuple[Mapping[str, str], bool]]) -> bool:
        check_same([arguments for arguments, _ in told])
        return any(imported for _, imported in told)

    own = request.comparable(), "deepspeed" in sys.modules
    return bool(session.channel.decide("same arguments", own, compare))


def as_path(path: Any) -> str:
    """`path` (text, or any ``os.PathLike`` of text) as text. Raises `OptionError` for anything else."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise OptionError(f"path is {_shown(path)}: expected a string or an os.PathLike of one")
    if not text:
        raise OptionError("path is empty: expected a path, a URL or an object's name")
    return text


def check_arguments(request: LoadRequest) -> None:
    """Raises `OptionError` for an argument of the wrong type or form, saying what was passed and what is expected.

    Opens nothing and asks no store. Call it in a stage, so that an error of one rank is raised on all.
    """
    if isinstance(request.path, State | ForeignState) and isinstance(request.state, str | os.PathLike):
        raise OptionError("path is a state, and state a path: the order is load(path, state)")
    as_path(request.path)
    check_logger(request.logger)
    _check_state(request.state)
    if request.weights_only and "model" in request.options.leave_out:
        raise OptionError(
            "load_weights_only=True with leave_out=['model'] restores nothing: drop one of them"
        )
    if request.weights_only and isinstance(request.state, State) and request.state.model is None:
        raise OptionError("load_weights_only=True with State(model=None) restores nothing: pass the model")
    for name, flag in (
        ("load_weights_only", request.weights_only),
        ("strict_model_weights", request.strict),
        ("progress_bar", request.progress_bar),
    ):
        if not isinstance(flag, bool):
            raise OptionError(f"{name} is {_shown(flag)}: expected True or False")
    if isinstance(request.object_store, str | bytes | Mapping | os.PathLike):
        raise OptionError(
            f"object_store is {_shown(request.object_store)}: expected an fsspec file system, or an object with "
            "download_object or download_file"
        )
    ignored = request.ignore_keys
    if not callable(ignored) and not isinstance(ignored, str):
        _check_entries("ignore_keys", ignored, "globs such as 'state/model/*', or a callable")
    if isinstance(request.exclude_algorithms, str):
        raise OptionError(
            f"exclude_algorithms is {_shown(request.exclude_algorithms)}: pass a list, "
            f"[{request.exclude_algorithms!r}]"
        )
    _check_entries("exclude_algorithms", request.exclude_algorithms, "names of algorithms")
    passes: Any = request.algorithm_passes
    if passes is not None and not isinstance(passes, list | tuple):
        raise OptionError(f"algorithm_passes is {_shown(passes)}: expected a list of callables, or None")
    for one in passes or ():
        if not callable(one):
            raise OptionError(f"algorithm_passes holds {_shown(one)}: expected callables")


def check_logger(logger: Any) -> None:
    """Raises `OptionError` where `logger` is none of the kinds that `receipt.log_receipt` takes."""
    known = logger is None or isinstance(logger, logging.Logger)
    if not known and not any(
        callable(getattr(logger, name, None)) for name in ("log_metrics", "log_hyperparameters")
    ):
        raise OptionError(
            f"logger={logger!r}: expected a logging.Logger, an object with log_metrics or log_hyperparameters, "
            "or None"
        )


def _check_state(state: Any) -> None:
    if not isinstance(state, State | ForeignState):
        wrap = {"module": "model", "optimizer": "optimizers", "lr scheduler": "schedulers"}.get(_role(state))
        hint = f". Pass State(model=...{f', {wrap}=...' * (wrap != 'model')})" if wrap else ""
        raise OptionError(
            f"state is {_shown(state)}: expected a rankload.State, or an object with load_state_dict and "
            f"load_model_state such as Composer's State{hint}"
        )
    if not isinstance(state, State):
        return
    if state.model is None:
        return
    if isinstance(state.model, Mapping) or not all(
        callable(getattr(state.model, name, None)) for name in ("state_dict", "load_state_dict")
    ):
        raise OptionError(
            f"state.model is {_shown(state.model)}: expected State(model=...) with a module or a DeepSpeed engine, or "
            "None for a state without one"
        )
    for part, role in (("model", "module"), ("optimizers", "optimizer"), ("schedulers", "lr scheduler")):
        for item in as_list(getattr(state, part)):
            found = _role(item)
            if found not in ("", role):
                raise OptionError(
                    f"state.{part} holds an object of type {type(item).__name__}, which is a kind of {found}: "
                    "expected State(model=module, optimizers=optimizer, schedulers=scheduler)"
                )


def _role(item: Any) -> str:
    """What `item` is by the methods that torch gives each kind; "" where those do not say."""
    if callable(getattr(type(item), "named_parameters", None)):
        return "module"
    if isinstance(getattr(item, "param_groups", None), list):
        return "optimizer"
    return "lr scheduler" if callable(getattr(type(item), "get_last_lr", None)) else ""


def _check_entries(name: str, value: Any, expected: str) -> None:
    if value is None:
        return
    if not isinstance(value, list | tuple | set | frozenset):
        raise OptionError(f"{name} is {_shown(value)}: expected a list of {expected}, or None")
    for entry in value:
        if not isinstance(entry, str):
            raise OptionError(f"{name} holds {_shown(entry)}: expected {expected}")


def _shown(value: Any) -> str:
    """`value` for messages; longer values, and those of the user's types, by their type alone."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str) and len(value) <= 40 and "://" not in value:
        return repr(value)
    return f"of type {type(value).__name__}"


def check_same(asked: Sequence[Mapping[str, str]]) -> None:
    """Raises `OptionError` naming the first argument that differs between ranks; `asked` is by rank."""
    for name, value in asked[0].items():
        groups: dict[str, list[int]] = {}
        for rank, arguments in enumerate(asked):
            groups.setdefault(arguments.get(name, "(not passed)"), []).append(rank)
        if len(groups) == 1:
            continue
        listed = "; ".join(f"{_ranks(ranks)}: {text}" for text, ranks in groups.items())
        hint = " (pass one template, such as ep1-rank{rank}.tar, on every rank)" if name == "path" else ""
        raise OptionError(f"argument {name} differs between ranks{hint}: {listed}; first rank's was {value}")


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def _parts(state: Any) -> dict[str, str]:
    """The types of a state and of its parts, by name; a `ForeignState` may lack some.

    Callbacks are left out: many jobs have some on the first rank only.
    """
    found = {
        "state": f"{type(state).__module__}.{type(state).__qualname__}",
        "state.model": _wrapper(_attribute(state, "model")),
    }
    for part in ("optimizers", "schedulers", "scaler", "algorithms"):
        objects = as_list(_attribute(state, part))
        found[f"state.{part}"] = ", ".join(type(item).__qualname__ for item in objects) or "none"
    return found


def _attribute(state: Any, name: str) -> Any:
    try:
        return getattr(state, name, None)
    except Exception:
        return None  # a property of the user's may raise whatever it likes


def _comparable_options(options: Options) -> dict[str, str]:
    """All as text, but those that each node may have its own of."""
    found = {
        one.name: repr(_plain(getattr(options, one.name)))
        for one in fields(options)
        if one.name not in OF_EACH_NODE
    }
    secrets = _digest(found["storage_options"])
    return {
        **found,
        "storage_options": f"a mapping with digest {secrets}" if options.storage_options else "{}",
    }


_WRAPPERS = (
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "a DeepSpeed engine"),
    ("torch.nn.parallel", "DistributedDataParallel", "a DistributedDataParallel module"),
)
"""Classes that wrap a model: module, name, and what messages call one."""


def _wrapper(model: Any) -> str:
    """What messages call a model. A wrapper is looked for only in modules that were imported: no other made it."""
    for module, name, described in _WRAPPERS:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and isinstance(model, kind):
            return described
    return "none" if model is None else "a module"


def _plain(value: Any) -> Any:
    """`value` in a form whose ``repr`` is the same in every process: no addresses, no order of a set."""
    if isinstance(value, Mapping):
        return sorted(((str(key), _plain(item)) for key, item in value.items()), key=repr)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=repr)
    if value is None or isinstance(value, str | bytes | bool | int | float):
        return value
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
