"""Matching a checkpoint's parameter names with a model's. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import OptionError

WRAPPER_PREFIX = "module."
"""What DistributedDataParallel, DataParallel and DeepSpeed put before every name."""
COMPILED_PREFIX = "_orig_mod."
"""What torch.compile puts before the names of the module that it wraps, at any depth."""


@dataclass(frozen=True)
class NameMatch:
    """Which name in the checkpoint is which in the model."""

    target_of: dict[str, str]
    """Checkpoint name to model name, for those that match."""
    missing: tuple[str, ...]
    """The model's names that the checkpoint has nothing for."""
    unexpected: tuple[str, ...]
    """The checkpoint's names that the model has no place for."""

    @property
    def renamed(self) -> dict[str, str]:
        """The matched names that differ."""
        return {source: target for source, target in self.target_of.items() if source != target}


def match_names(
    source: Iterable[str], target: Iterable[str], rename: Mapping[str, str] | None = None
) -> NameMatch:
    """Matches `source` (the checkpoint's names) with `target` (the model's).

    `rename` comes first: a whole name, or a prefix that ends with a dot; the longest key wins. Then
    ``_orig_mod.`` is disregarded wherever it stands, and leading ``module.`` prefixes are dropped or added if
    that makes more names match. Raises `OptionError` where two of the checkpoint's names would become one.
    """
    sources = list(source)
    targets = list(target)
    known = set(targets)
    renamed = {name: _rename(name, rename or {}) for name in sources}
    plain_target: dict[str, str] = {}
    for name in targets:
        plain_target.setdefault(name.replace(COMPILED_PREFIX, ""), name)
    plain_source = {name: new.replace(COMPILED_PREFIX, "") for name, new in renamed.items()}

    best: dict[str, str] = {}
    for drop, add in _PREFIX_CHANGES:
        found = {}
        for name, plain in plain_source.items():
            if not plain.startswith(drop):
                continue
            hit = plain_target.get(add + plain[len(drop) :])
            if hit is not None:
                found[name] = hit
        if len(found) > len(best):
            best = found
    # An exact match always stands: a wrapper's own names are not to be shifted by the majority.
    exact = {name: new for name, new in renamed.items() if new in known}
    if len(exact) >= len(best):
        best = exact
    _refuse_collisions(best)
    taken = set(best.values())
    return NameMatch(
        best,
        tuple(name for name in targets if name not in taken),
        tuple(name for name in sources if name not in best),
    )


_PREFIX_CHANGES: tuple[tuple[str, str], ...] = tuple(
    (WRAPPER_PREFIX * drop, WRAPPER_PREFIX * add) for drop, add in ((0, 0), (1, 0), (0, 1), (2, 0), (0, 2))
)


def _rename(name: str, rename: Mapping[str, str]) -> str:
    if name in rename:
        return rename[name]
    end = name.rfind(".") + 1
    while end:
        if name[:end] in rename:
            return rename[name[:end]] + name[end:]
        end = name.rfind(".", 0, end - 1) + 1
    return name


def _refuse_collisions(target_of: dict[str, str]) -> None:
    source_of: dict[str, str] = {}
    for source, target in target_of.items():
        if target in source_of:
            raise OptionError(
                f"{source_of[target]!r} and {source!r} of the checkpoint would both become {target!r}: "
                "correct LoadOptions(rename=...)"
            )
        source_of[target] = source
