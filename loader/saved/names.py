"""Matches a checkpoint's parameter names with a model's, across wrappers' prefixes and renames. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import OptionError

WRAPPER_PREFIX = "module."
"""DistributedDataParallel, DataParallel and DeepSpeed put it before every name."""
COMPILED_PREFIX = "_orig_mod."
"""torch.compile puts it before the names of the module that it wraps, at any depth."""
EXTRA_STATE = "_extra_state"
"""The last part of the name under which ``state_dict`` has what a submodule's ``get_extra_state`` returns."""
_PREFIX_CHANGES: tuple[tuple[str, str], ...] = tuple(
    (WRAPPER_PREFIX * drop, WRAPPER_PREFIX * add) for drop, add in ((0, 0), (1, 0), (0, 1), (2, 0), (0, 2))
)
"""(prefix to drop, prefix to add), in the order of trying."""


@dataclass(frozen=True)
class NameMatch:
    """Which of the checkpoint's names match which of the model's."""

    target_of: dict[str, str]
    """Checkpoint name to model name, for those that match."""
    missing: tuple[str, ...]
    """The model's names that none of the checkpoint's matches."""
    unexpected: tuple[str, ...]
    """The checkpoint's names that match none of the model's."""

    @property
    def renamed(self) -> dict[str, str]:
        """Checkpoint name to model name, for those that match and differ."""
        return {source: target for source, target in self.target_of.items() if source != target}


def match_names(
    source: Iterable[str], target: Iterable[str], rename: Mapping[str, str] | None = None
) -> NameMatch:
    """Matches `source` (the checkpoint's names) with `target` (the model's).

    `rename` is applied first: its keys are whole names, or prefixes that end with a dot; the longest key that fits
    wins. Then ``_orig_mod.`` is disregarded anywhere in a name, and leading ``module.`` prefixes are dropped or added,
    the same for all names, if that makes more of them match. Raises `OptionError` where two of the checkpoint's names
    would become one.
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
    # As many exact matches are better than matches by a change of prefixes.
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
