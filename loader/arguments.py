"""What a load was asked for, and whether every rank was asked for the same."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .algorithms import AlgorithmPass
from .errors import OptionError
from .ignore import IgnoreKeys
from .options import LoadOptions


@dataclass(frozen=True)
class LoadRequest:
    """The arguments of one load, as one rank gave them."""

    path: str
    state: Any
    logger: Any
    object_store: Any
    weights_only: bool
    strict: bool
    progress_bar: bool
    ignore_keys: IgnoreKeys | str | None
    exclude_algorithms: Collection[str] | None
    algorithm_passes: Sequence[AlgorithmPass] | None
    options: LoadOptions

    @property
    def run_name(self) -> str | None:
        name = getattr(self.state, "run_name", None)
        return name if isinstance(name, str) else None

    def comparable(self) -> dict[str, str]:
        """Every argument that must be equal on all ranks, as text; what may hold secrets, as a digest."""
        ignore_keys: object = self.ignore_keys
        if callable(ignore_keys):
            ignore_keys = "a callable"
        found = {
            "path": self.path,
            "object_store": "None" if self.object_store is None else type(self.object_store).__qualname__,
            "load_weights_only": str(self.weights_only),
            "strict_model_weights": str(self.strict),
            "ignore_keys": repr(ignore_keys),
            "exclude_algorithms": "None"
            if self.exclude_algorithms is None
            else repr(sorted(self.exclude_algorithms)),
            "algorithm_passes": str(len(self.algorithm_passes or ())),
            "state.run_name": repr(self.run_name),
        }
        for option in fields(LoadOptions):
            value = getattr(self.options, option.name)
            if option.name == "cache_dir":
                continue  # each node may have its own
            if option.name == "storage_options":
                digest = hashlib.sha256(repr(_sorted(value)).encode()).hexdigest()[:12]
                found["options.storage_options"] = f"a mapping with digest {digest}" if value else "{}"
            else:
                found[f"options.{option.name}"] = repr(_sorted(value))
        return found


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted((str(key), _sorted(item)) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return [item if isinstance(item, str) else f"{item.__module__}.{item.__qualname__}" for item in value]
    return value


def check_same(asked: Sequence[Mapping[str, str]]) -> None:
    """Raises `OptionError` naming the first argument that differs between ranks; `asked` is by rank."""
    for name, value in asked[0].items():
        groups: dict[str, list[int]] = {}
        for rank, arguments in enumerate(asked):
            groups.setdefault(arguments.get(name, "(not passed)"), []).append(rank)
        if len(groups) == 1:
            continue
        told = "; ".join(f"{_ranks(ranks)}: {text}" for text, ranks in groups.items())
        hint = " (pass one template, such as ep1-rank{rank}.tar, on every rank)" if name == "path" else ""
        raise OptionError(f"argument {name} differs between ranks{hint}: {told}; first rank's was {value}")


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
