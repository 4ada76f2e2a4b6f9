"""Settles the options of a load: each is the value given, else the environment's, else the default.

`LoadOptions` are those that the user gives, `Options` those that a load goes by.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from .errors import OptionError

Verify = Literal["before", "during", "off"]
VERIFY_CHOICES: tuple[str, ...] = ("before", "during", "off")
Mode = Literal["node", "direct", "auto", "job"]
MODE_CHOICES: tuple[str, ...] = ("node", "direct", "auto", "job")
CacheHomeChoice = Literal["auto", "memory", "disk"]
CACHE_HOME_CHOICES: tuple[str, ...] = ("auto", "memory", "disk")
Hyperparameters = Literal["checkpoint", "job"]
HYPERPARAMETERS_CHOICES: tuple[str, ...] = ("checkpoint", "job")
LAYOUT_ROLES = ("model", "optimizer", "scheduler", "scaler", "rng", "timestamp")
"""The roles that `LoadOptions.layout` can give to keys of a hand-written file."""
_PART_OF_ROLE = {"optimizer": "optimizers", "scheduler": "schedulers"}
"""What a `State` calls the parts that have another name as a role."""
PARTS = (
    "model", "optimizers", "schedulers", "scaler", "algorithms", "callbacks", "timestamp", "rank_zero_seed", "run_name",
    "dataset_state", "train_metrics", "eval_metrics", "rng",
)  # fmt: skip
"""The parts of a checkpoint that `LoadOptions.leave_out` can name."""

FROM_ENVIRONMENT = ("cache_dir", "cache_home", "cache_size", "stall_timeout_s", "verify", "mode", "interface")
OF_EACH_NODE = ("cache_dir", "cache_home", "cache_size", "interface")
"""Fields that may differ between ranks."""
"""Fields that a variable ``RANKLOAD_<FIELD>`` can set."""

RESUME = "RANKLOAD_RESUME"
"""The variable by which ``rankload run --resume`` tells `autoresume` what to resume from. No field of a load's."""

_UNITS = {unit + tail: base**power
          for base, tail in ((1000, "B"), (1024, "iB"))
          for power, unit in enumerate("KMGT", 1)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Settings of a load beyond its arguments. The same on every rank, but for ``interface`` and the ``cache_`` fields.

    A field left at None takes the environment's ``RANKLOAD_<FIELD>`` (``RANKLOAD_CACHE_DIR``, ``RANKLOAD_CACHE_HOME``,
    ``RANKLOAD_CACHE_SIZE``, ``RANKLOAD_STALL_TIMEOUT_S``, ``RANKLOAD_VERIFY``, ``RANKLOAD_MODE``,
    ``RANKLOAD_INTERFACE``), then its default.

    Attributes:
        cache_dir: the folder on this node that fetched files lie in while they are read. It must be private to the
            user (0700). Default: as `cache_home` says. An ``os.PathLike`` becomes its text, and ``~`` the home folder.
        cache_home: where that folder is when `cache_dir` is not given. ``memory``: ``rankload-<uid>`` in /dev/shm.
            ``disk``: ``rankload-<uid>`` in the system's temporary folder. ``auto`` (default): a file goes into memory
            when it fits in half of what is free there, else on disk; on disk when `cache_size` is above 0.
        cache_size: bytes of fetched files that may stay on disk for later loads; above it whole checkpoints are
            evicted, the least recently used first. A number, or text such as ``"20GB"`` or ``"20GiB"``. Default 0:
            nothing stays.
        stall_timeout_s: seconds without progress on any rank after which every rank raises `StalledError`. It does
            not limit how long a load may take: each byte that arrives starts it anew. Default 120.
        safe_types: types that a checkpoint may construct, besides the known ones: the types, or their names
            (``package.module.Type``, imported when a checkpoint first names them). You vouch for what their
            constructors do.
        storage_options: credentials, endpoint and other settings for the path's file system, in fsspec's names and
            handed to fsspec; those for http(s) URLs are read here, and unknown ones refused. Never shown in messages,
            logs or receipts.
        rename: names in the checkpoint mapped to names in the model, of weights and optimizer state alike. A key that
            ends with a dot is a prefix: ``{"model.": ""}`` takes it off, ``{"encoder.": "backbone."}`` puts another in
            its place. The key "" is a prefix of every name: ``{"": "model."}`` puts one before all that no other key
            fits. Any other key is a whole name: ``{"head.w": "classifier.weight"}``. The longest key that fits counts.
            There are no patterns. Prefixes of wrappers (``module.``, ``_orig_mod.`` and the like) need no entry.
        allow_missing_frozen: whether the checkpoint may lack parameters that the model does not train
            (``requires_grad=False``), as adapters and files saved with ``exclude_frozen_parameters`` do. They keep
            their values. Any other missing name stays an error. Default False.
        layout: for a hand-written file, which of its ``/``-joined keys is ``model``, ``optimizer``, ``scheduler``,
            ``scaler``, ``rng`` or ``timestamp``: ``{"model": "net/weights", "optimizer": "opt"}``.
        hyperparameters: whose hyperparameters (learning rate, weight decay, betas and so on) each parameter group of
            the optimizers has afterwards. ``checkpoint``: those of the saved group with its parameters. ``job``: its
            own; a restored lr scheduler may still set its learning rate. Not given: as ``checkpoint``, and a
            `MismatchError` where groups of this job that differ from each other would all get one saved group's.
        leave_out: parts that are not restored, and not missed where the checkpoint lacks them: ``model``,
            ``optimizer``, ``scheduler``, ``scaler``, ``rng``, ``timestamp``, or any other part of `State` by its name
            there. The job keeps its own; the receipt has them among ``ignored``. Of a DeepSpeed engine, ``optimizer``
            is its state and hyperparameters, ``scheduler`` its lr scheduler, ``scaler`` its loss scaler. Its fp32
            masters are weights, and are restored with the model, which cannot be left out of an engine.
        verify: when the stored checksums are compared. ``during`` (default): as the bytes are restored; a mismatch is
            then a `PartialRestoreError`. ``before``: all of them before the first change. ``off``: not at all. Where it
            is given, a file of checksums that may be there and cannot be read is an error, and else a note.
        mode: how the bytes of remote files reach the ranks. ``auto`` (default): long ranges that only one rank of its
            node needs go from the store into that rank's tensors, where that takes no more requests; all else, and
            everything with a `cache_size` or with ``verify="before"``, as with ``node``. ``node``: each node fetches
            what its ranks need once, into its cache, where a load goes on after a kill. ``direct``: as ``auto``, with
            short ranges and a `cache_size` too; refused with ``verify="before"``. ``job``: as ``node``, and bytes that
            several nodes need leave the store once: one node sends them to the others.
        interface: by which of its network interfaces a node sends bytes to others (``mode="job"``): a name (``eth1``),
            an address, or a network (``10.1.0.0/16``), several of them with commas. Default: others try the address
            from which the node reaches MASTER_ADDR, then those of its other interfaces.
        trace: a file that rank 0 writes every rank's stages to, for Perfetto or ``chrome://tracing``. As a path it is
            like `cache_dir`.

    Raises:
        OptionError: a value does not fit. An unknown field, or an unknown ``RANKLOAD_*`` variable, raises it in `load`.
    """

    cache_dir: str | None = None
    cache_home: CacheHomeChoice | None = None
    cache_size: int | str | None = None
    stall_timeout_s: float | None = None
    safe_types: Collection[str | type] = ()
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    rename: Mapping[str, str] = field(default_factory=dict)
    allow_missing_frozen: bool = False
    layout: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: Hyperparameters | None = None
    leave_out: Collection[str] = ()
    verify: Verify | None = None
    mode: Mode | None = None
    interface: str | None = None
    trace: str | None = None

    def __post_init__(self) -> None:
        for name in ("cache_dir", "trace"):
            if getattr(self, name) is not None:
                what = "folder" if name == "cache_dir" else "file"
                object.__setattr__(self, name, _path(name, getattr(self, name), what))
        for name, choices in (
            ("verify", VERIFY_CHOICES),
            ("hyperparameters", HYPERPARAMETERS_CHOICES),
            ("mode", MODE_CHOICES),
            ("cache_home", CACHE_HOME_CHOICES),
        ):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise OptionError(f"{name}={value!r}: expected one of {', '.join(choices)}")
        if self.interface is not None and not (isinstance(self.interface, str) and self.interface.strip()):
            raise OptionError(
                f"interface={self.interface!r}: expected an interface's name, an address or a network, such as 'eth1' "
                "or '10.1.0.0/16'"
            )
        if self.cache_size is not None:
            object.__setattr__(self, "cache_size", parse_size("cache_size", self.cache_size))
        if self.stall_timeout_s is not None and not _is_seconds(self.stall_timeout_s):
            raise OptionError(f"stall_timeout_s={self.stall_timeout_s!r}: expected seconds above 0")
        _check_safe_types(self.safe_types)
        _check_mapping("storage_options", self.storage_options)
        _check_mapping("rename", self.rename, to_names=True)
        _check_rename(self.rename)
        if not isinstance(self.allow_missing_frozen, bool):
            raise OptionError(f"allow_missing_frozen={self.allow_missing_frozen!r}: expected True or False")
        _check_mapping("layout", self.layout, to_names=True)
        unknown = set(self.layout) - set(LAYOUT_ROLES)
        if unknown:
            raise OptionError(
                f"layout names {', '.join(sorted(unknown))}: expected some of {', '.join(LAYOUT_ROLES)}"
            )
        _parts(self.leave_out)


@dataclass(frozen=True, kw_only=True)
class Options:
    """`LoadOptions` as a load goes by them: each field has a value, and none is an "unset" that means its default."""

    cache_dir: str | None
    """None: no folder was given, and `cache_home` says where files lie."""
    cache_home: CacheHomeChoice
    cache_size: int
    stall_timeout_s: float
    safe_types: tuple[str | type, ...]
    storage_options: Mapping[str, Any] = field(repr=False)
    rename: Mapping[str, str]
    allow_missing_frozen: bool
    layout: Mapping[str, str]
    hyperparameters: Hyperparameters | None
    """None: the checkpoint's, and an error where groups that differ would all get one saved group's."""
    leave_out: tuple[str, ...]
    """Of `PARTS`, in their order."""
    verify: Verify
    asks_for_checksums: bool
    """Whether ``verify`` was given, and is not "off": then no checksum is passed over that may be there."""
    mode: Mode
    interface: str | None
    """None: whatever reaches the others."""
    trace: str | None
    """None: no trace is written."""


def resolve_options(
    options: LoadOptions | Mapping[str, Any] | None, environ: Mapping[str, str] | None = None
) -> Options:
    """`options` with every field at None filled from the environment, else with its default.

    A mapping has the fields of `LoadOptions`; `environ` is ``os.environ`` where it is None. Raises `OptionError` for an
    unknown field, an unknown ``RANKLOAD_*`` variable, a value that does not fit, or ``mode="direct"`` together with
    ``verify="before"``.
    """
    given = _filled(_given(options), os.environ if environ is None else environ)
    resolved = Options(
        cache_dir=given.cache_dir,
        cache_home=given.cache_home or "auto",
        cache_size=parse_size("cache_size", given.cache_size or 0),
        stall_timeout_s=120.0 if given.stall_timeout_s is None else float(given.stall_timeout_s),
        safe_types=_in_order(given.safe_types),
        storage_options=given.storage_options,
        rename=given.rename,
        allow_missing_frozen=given.allow_missing_frozen,
        layout=given.layout,
        hyperparameters=given.hyperparameters,
        leave_out=_parts(given.leave_out),
        verify=given.verify or "during",
        asks_for_checksums=given.verify in ("during", "before"),
        mode=given.mode or "auto",
        interface=given.interface,
        trace=given.trace,
    )
    if resolved.mode == "direct" and resolved.verify == "before":
        raise OptionError(
            'mode="direct" puts bytes into tensors as they come, and cannot compare them before: use mode="auto", '
            'or verify="during"'
        )
    return resolved


def _given(options: LoadOptions | Mapping[str, Any] | None) -> LoadOptions:
    if options is None:
        return LoadOptions()
    if isinstance(options, LoadOptions):
        return options
    if not isinstance(options, Mapping):
        raise OptionError(
            f"options is of type {type(options).__name__}: expected LoadOptions or a mapping of its fields"
        )
    known = [one.name for one in fields(LoadOptions)]
    unknown = {str(name) for name in options} - set(known)
    if unknown:
        near = [close for name in sorted(unknown) for close in get_close_matches(name, known, n=1)]
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise OptionError(
            f"unknown option {', '.join(sorted(unknown))}{hint}; known ones: {', '.join(known)}"
        )
    return LoadOptions(**options)


def _filled(options: LoadOptions, environ: Mapping[str, str]) -> LoadOptions:
    """`options`, whose fields at None are filled from the environment where it has them."""
    variables = {f"RANKLOAD_{name.upper()}": name for name in FROM_ENVIRONMENT}
    for variable in sorted(environ):
        if variable.startswith("RANKLOAD_") and variable not in variables and variable != RESUME:
            raise OptionError(
                f"unknown environment variable {variable}; known ones: {', '.join(sorted(variables))}"
            )
    found: dict[str, Any] = {
        name: _parse(variable, environ[variable])
        for variable, name in variables.items()
        if getattr(options, name) is None and environ.get(variable)
    }
    return replace(options, **found)


def _in_order(safe_types: Collection[str | type]) -> tuple[str | type, ...]:
    """`safe_types` in the order that was given; those of a set, which is another in every process, by name."""
    if not isinstance(safe_types, set | frozenset):
        return tuple(safe_types)
    return tuple(
        sorted(
            safe_types,
            key=lambda one: one if isinstance(one, str) else f"{one.__module__}.{one.__qualname__}",
        )
    )


def _parse(variable: str, text: str) -> str | float:
    if variable == "RANKLOAD_CACHE_SIZE":
        return parse_size(variable, text)
    if variable != "RANKLOAD_STALL_TIMEOUT_S":
        return text
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"{variable}={text!r}: expected a number of seconds") from None


def parse_size(name: str, value: Any) -> int:
    """A number of bytes, from a whole number or from text such as ``20GB`` or ``1.5 GiB``.

    ``KB`` to ``TB`` are powers of 1000, ``KiB`` to ``TiB`` of 1024. Raises `OptionError`, which names `name`.
    """
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        units = {"": 1, "B": 1, **_UNITS}
        if found is not None and found[2] in units:
            return (
                int(float(found[1]) * units[found[2]]) if "." in found[1] else int(found[1]) * units[found[2]]
            )
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise OptionError(f"{name}={value!r}: expected a number of bytes, or text such as '20GB' or '20GiB'")


def _path(name: str, value: Any, what: str) -> str:
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path:
        raise OptionError(f"{name}={value!r}: expected the path of a {what}")
    return os.path.expanduser(path)


def _is_seconds(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )


def _check_safe_types(value: Any) -> None:
    if not isinstance(value, list | tuple | set | frozenset):
        raise OptionError(
            f"safe_types={value!r}: expected a list of types or names, got one {type(value).__name__}"
        )
    for item in value:
        if not isinstance(item, str | type):
            raise OptionError(
                f"safe_types holds {item!r}: expected types, or their names as in 'package.module.Type'"
            )


def _parts(leave_out: Any) -> tuple[str, ...]:
    """The parts that `leave_out` names, in the order of `PARTS`; a string is one name."""
    named = [leave_out] if isinstance(leave_out, str) else leave_out
    if not isinstance(named, list | tuple | set | frozenset):
        raise OptionError(
            f"leave_out={leave_out!r}: expected a list of names such as 'optimizer', got one {type(leave_out).__name__}"
        )
    found = {_PART_OF_ROLE.get(one, one) if isinstance(one, str) else one for one in named}
    unknown = sorted(repr(one) for one in found if one not in PARTS)
    if unknown:
        known = dict.fromkeys((*LAYOUT_ROLES, *PARTS))
        raise OptionError(f"leave_out names {', '.join(unknown)}: expected some of {', '.join(known)}")
    return tuple(part for part in PARTS if part in found)


def _check_mapping(name: str, value: Any, *, to_names: bool = False) -> None:
    """Messages say of what type a value is, never the value: it may be a secret."""
    if not isinstance(value, Mapping):
        raise OptionError(f"{name} is of type {type(value).__name__}: expected a mapping")
    for key, item in value.items():
        if not isinstance(key, str):
            raise OptionError(f"{name} has a key of type {type(key).__name__}: expected strings")
        if to_names and not isinstance(item, str):
            raise OptionError(f"{name}[{key!r}] is of type {type(item).__name__}: expected a string")


def _check_rename(rename: Mapping[str, str]) -> None:
    for key, new in rename.items():
        if any(re.search(r"[*?\\]|^\^|\$$", text) for text in (key, new)):
            start, other = _before_pattern(key), _before_pattern(new)
            meant = f', as in rename={{"{start}": "{other}"}}' if start.endswith(".") else ""
            raise OptionError(
                f"rename={{{key!r}: {new!r}}} is a pattern, and rename knows none: a key that ends with a dot is a "
                f"prefix{meant}; any other key is a whole name"
            )
        if key and not key.endswith(".") and new.endswith("."):
            raise OptionError(
                f"rename={{{key!r}: {new!r}}} maps a whole name to a prefix: end the key with a dot too, as in "
                f'rename={{"{key}.": "{new}"}}'
            )


def _before_pattern(text: str) -> str:
    return re.split(r"[*?\\(\[]", text.removeprefix("^").removesuffix("$").replace("\\.", "."))[0]
