"""Matches a checkpoint's parameter names with a model's, across wrappers' prefixes and renames. Pure.

`canonical_name` is a name without the components that wrappers put into it. Names match whose canonical names are
equal, where no other name of either side has the same one; where one has, one change of prefixes must hold for all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import OptionError

EXTRA_STATE = "_extra_state"
"""The last part of the name under which ``state_dict`` has what a submodule's ``get_extra_state`` returns."""
WRAPPER = "module"
"""DistributedDataParallel, DataParallel, AveragedModel and DeepSpeed keep the module that they wrap under this name. So
do modules of users, which is why a name is never changed where that would make it another's."""
CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module"
"""torch's activation checkpointing and offloading; a state dict leaves it out, and ``named_parameters`` does not."""
WRAPPERS = frozenset(
    {
        CHECKPOINT_WRAPPER,
        "_dmp_wrapped_module",  # torchrec's DistributedModelParallel
        "_forward_module",  # Lightning's Fabric and strategies
        "_fpw_module",  # FSDP of torch before 2.0, and fairscale's
        "_fsdp_wrapped_module",
        "_orig_mod",  # torch.compile
    }
)
"""Names under which other wrappers keep their module, and which no model gives to a module of its own."""

_LEADING: tuple[tuple[int, int], ...] = ((0, 0), (1, 0), (0, 1), (2, 0), (0, 2))
"""How many leading ``module.`` a change takes off the checkpoint's names, and off the model's."""
_TRIED = 6
"""How many prefixes `suggest_rename` tries on all names, the likeliest first."""
_SAMPLE = 40
"""Names of each side from which `suggest_rename` reads what the prefix may be."""


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

    @property
    def modules(self) -> dict[str, str]:
        """The checkpoint's names of submodules to the model's, as far as the names of their tensors tell."""
        found: dict[str, str] = {}
        for source, target in self.target_of.items():
            here, there = source.split("."), target.split(".")
            while here and there and here.pop() == there.pop():
                found[".".join(here)] = ".".join(there)
        return found


def canonical_name(name: str) -> str:
    """`name` without the components that wrappers put into it, at any depth; its last component always stays."""
    if "module" not in name and "_orig_mod" not in name:
        return name
    *parents, last = name.split(".")
    return ".".join([*(one for one in parents if one != WRAPPER and one not in WRAPPERS), last])


def without_checkpoint_wrappers(name: str) -> str:
    """What a state dict calls the parameter or submodule `name` of a module in which some are checkpointed."""
    return name.replace(f"{CHECKPOINT_WRAPPER}.", "").removesuffix(CHECKPOINT_WRAPPER).rstrip(".")


def match_names(
    source: Iterable[str], target: Iterable[str], rename: Mapping[str, str] | None = None
) -> NameMatch:
    """Matches `source` (the checkpoint's names) with `target` (the model's).

    `rename` is applied first. Its keys are whole names, prefixes that end with a dot, or "", which is a prefix of every
    name; the longest key that fits wins. A key that fits no name as it is is compared without wrappers' prefixes.

    Then names match whose canonical names are equal. Where several names of one side have the same one, those match
    that do so as they are, or by one change of prefixes for all names if that makes more of them match; others stay
    unmatched. Raises `OptionError` where `rename` makes two of the checkpoint's names one of the model's.
    """
    sources, targets = list(dict.fromkeys(source)), list(dict.fromkeys(target))
    if not rename and not _may_be_wrapped(sources) and not _may_be_wrapped(targets):
        return _by_equal_names(sources, targets)
    renamed = _renamed(sources, rename or {})
    classes: dict[str, tuple[list[str], list[str]]] = {}
    for name in sources:
        classes.setdefault(canonical_name(renamed[name]), ([], []))[0].append(name)
    for name in targets:
        classes.setdefault(canonical_name(name), ([], []))[1].append(name)
    found: dict[str, str] = {}
    unclear: list[list[str]] = []
    for names, wanted in classes.values():
        if len(names) == len(wanted) == 1:
            found[names[0]] = wanted[0]
        elif names and wanted:
            _refuse_collision(names, renamed)
            unclear.append(names)
    if unclear:
        best = _by_one_change(renamed, targets)
        found.update((name, best[name]) for names in unclear for name in names if name in best)
    taken = set(found.values())
    return NameMatch(
        {name: found[name] for name in sources if name in found},
        tuple(name for name in targets if name not in taken),
        tuple(name for name in sources if name not in found),
    )


def _may_be_wrapped(names: Sequence[str]) -> bool:
    """Whether the `canonical_name` of any of `names` may be another name."""
    together = "\n".join(names)
    return WRAPPER in together or "_orig_mod" in together


def _by_equal_names(sources: Sequence[str], targets: Sequence[str]) -> NameMatch:
    """The match of names each of which is its own `canonical_name`."""
    wanted, held = set(targets), set(sources)
    return NameMatch(
        {name: name for name in sources if name in wanted},
        tuple(name for name in targets if name not in held),
        tuple(name for name in sources if name not in wanted),
    )


def _by_one_change(renamed: Mapping[str, str], targets: Sequence[str]) -> dict[str, str]:
    """The checkpoint's names to the model's by the change of prefixes that matches most of them.

    As many exact matches are better. Where other changes match as many and disagree, what they agree on is left.
    """
    best = _pairs({name: name for name in renamed.values()}, {name: name for name in targets})
    most, exact = len(best), True
    for source_keys, target_keys in _changes(list(renamed.values()), targets):
        found = _pairs(source_keys, target_keys)
        if len(found) > most:
            best, most, exact = found, len(found), False
        elif len(found) == most and not exact:
            best = {name: hit for name, hit in best.items() if found.get(name) == hit}
    return {name: best[new] for name, new in renamed.items() if new in best}


def _changes(
    sources: Sequence[str], targets: Sequence[str]
) -> Iterator[tuple[Mapping[str, str], Mapping[str, str]]]:
    """For each change, what it makes of the names of either side; names that it does not fit are left out."""
    plain_sources = {name: _without(name, WRAPPERS) for name in sources}
    plain_targets = {name: _without(name, WRAPPERS) for name in targets}
    for drop, add in _LEADING:
        yield _without_leading(plain_sources, drop), _without_leading(plain_targets, add)
    yield _unwrapped(plain_sources), _unwrapped(plain_targets)


def _without(name: str, components: frozenset[str]) -> str:
    *parents, last = name.split(".")
    return ".".join([*(one for one in parents if one not in components), last])


def _without_leading(names: Mapping[str, str], count: int) -> dict[str, str]:
    prefix = f"{WRAPPER}." * count
    return {name: plain[len(prefix) :] for name, plain in names.items() if plain.startswith(prefix)}


def _unwrapped(names: Mapping[str, str]) -> dict[str, str]:
    """Names without ``module`` where it is the only child of its parent, as below a wrapper."""
    children: dict[str, set[str]] = {}
    for plain in names.values():
        parts = plain.split(".")
        for depth, part in enumerate(parts):
            last = "" if depth == len(parts) - 1 else "."
            children.setdefault(".".join(parts[:depth]), set()).add(part + last)
    found: dict[str, str] = {}
    for name, plain in names.items():
        parts = plain.split(".")
        kept = [
            part
            for depth, part in enumerate(parts)
            if part != WRAPPER or children[".".join(parts[:depth])] != {f"{WRAPPER}."}
        ]
        found[name] = ".".join(kept)
    return found


def _pairs(source_keys: Mapping[str, str], target_keys: Mapping[str, str]) -> dict[str, str]:
    """Name to name where the keys are equal, and no other name of either side has the same."""
    often = Counter(source_keys.values())
    of_target: dict[str, list[str]] = {}
    for name, key in target_keys.items():
        of_target.setdefault(key, []).append(name)
    return {
        name: of_target[key][0]
        for name, key in source_keys.items()
        if often[key] == 1 and len(of_target.get(key, ())) == 1
    }


def _refuse_collision(names: Sequence[str], renamed: Mapping[str, str]) -> None:
    source_of: dict[str, str] = {}
    for name in names:
        new = renamed[name]
        if new in source_of:
            raise OptionError(
                f"{source_of[new]!r} and {name!r} of the checkpoint would both become {new!r}: correct "
                "LoadOptions(rename=...)"
            )
        source_of[new] = name


def _renamed(names: Sequence[str], rename: Mapping[str, str]) -> dict[str, str]:
    """Each name to what `rename` makes of it."""
    if not rename:
        return {name: name for name in names}
    key_of = {name: _key_for(name, rename) for name in names}
    used = set(key_of.values())
    # A key may name the module's parameters as they are saved, with a wrapper's prefix, and not the optimizer's.
    others: dict[str, set[str]] = {}
    for key in rename:
        if key and key not in used:
            others.setdefault(_plain(key), set()).add(key)
    plain_keys = {plain: next(iter(keys)) for plain, keys in others.items() if plain and len(keys) == 1}
    found: dict[str, str] = {}
    for name, fitting in key_of.items():
        if fitting is not None:
            found[name] = rename[fitting] + name[len(fitting) :]
            continue
        plain = _plain(name)
        plain_key = _key_for(plain, plain_keys)
        if plain_key is not None:
            found[name] = rename[plain_keys[plain_key]] + plain[len(plain_key) :]
        else:
            found[name] = rename.get("", "") + name
    return found


def _plain(name: str) -> str:
    """`name`, or a prefix of names, without what wrappers certainly put there: leading ``module.`` among it."""
    plain = _without(name, WRAPPERS)
    while plain.startswith(f"{WRAPPER}."):
        plain = plain[len(WRAPPER) + 1 :]
    return plain


def _key_for(name: str, keys: Mapping[str, str]) -> str | None:
    """The longest of `keys` that is `name`, or a prefix of it that ends with a dot."""
    if name in keys:
        return name
    end = name.rfind(".") + 1
    while end:
        if name[:end] in keys:
            return name[:end]
        end = name.rfind(".", 0, end - 1) + 1
    return None


def unused_renames(names: Iterable[str], rename: Mapping[str, str]) -> list[str]:
    """The keys of `rename` that fit none of `names`, with or without wrappers' prefixes."""
    if not rename:
        return []
    all_names = set(names)
    fitting = {_key_for(name, rename) for name in all_names}
    plain_names = {_plain(name) for name in all_names}
    left = {_plain(key): key for key in rename if key and key not in fitting}
    fitting |= {left[key] for key in (_key_for(name, left) for name in plain_names) if key}
    return [key for key in rename if key and key not in fitting]


def as_option(rename: Mapping[str, str]) -> str:
    """`rename` as it is written in a call: ``rename={"model.": ""}``."""
    return f"rename={json.dumps(dict(rename), ensure_ascii=False)}"


def suggest_rename(
    source: Iterable[str],
    target: Iterable[str],
    rename: Mapping[str, str] | None = None,
    *,
    agree: Callable[[str, str], bool] = lambda source, target: True,
) -> tuple[dict[str, str], int] | None:
    """The one entry more in `rename` that explains why names do not match, and how many more match with it.

    The entry is proven: all names were matched with it, as a load with this ``rename`` will. None where no entry
    matches at least half of the missing names, and where `agree` (of a name of either side) denies that one fits.
    """
    sources, targets, rename = list(source), list(target), dict(rename or {})
    before = match_names(sources, targets, rename)
    best: tuple[dict[str, str], int] | None = None
    for key, new in _likely_prefixes(before.unexpected, before.missing):
        if key in rename:
            continue
        entries = {**rename, key: new}
        try:
            after = match_names(sources, targets, entries)
        except OptionError:
            continue
        gained = len(before.missing) - len(after.missing)
        if (
            2 * gained >= len(before.missing)
            and gained > (best[1] if best else 0)
            and set(after.missing) <= set(before.missing)
            and all(
                agree(name, hit) for name, hit in after.target_of.items() if before.target_of.get(name) != hit
            )
        ):
            best = entries, gained
    return best


def _likely_prefixes(unexpected: Sequence[str], missing: Sequence[str]) -> list[tuple[str, str]]:
    """(prefix in the checkpoint, prefix in the model) of names that end alike, the most frequent first."""
    ending: dict[str, list[str]] = {}
    """A canonical ending to the prefixes that precede it in the model's names."""
    for name in missing:
        for prefix, rest in _cuts(name):
            ending.setdefault(rest, []).append(prefix)
    votes: Counter[tuple[str, str]] = Counter()
    step = max(1, len(unexpected) // _SAMPLE)
    for name in unexpected[::step]:
        for prefix, rest in _cuts(name):
            if rest in ending:
                for other in dict.fromkeys(ending[rest][:_SAMPLE]):
                    votes[prefix, other] += 1
                    votes[_plain(prefix), other] += 1
                break
    for prefix, other in list(votes):
        if prefix == other:
            del votes[prefix, other]
    # Of equally frequent ones, the shortest is the one that explains most.
    return [pair for pair, _ in sorted(votes.items(), key=lambda item: (-item[1], len(item[0][0])))][:_TRIED]


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """`name` cut at each dot, as its prefix and the canonical name of the rest; the longest rest first."""
    start = 0
    while True:
        yield name[:start], canonical_name(name[start:])
        start = name.find(".", start) + 1
        if not start:
            return


def rename_all(names: Sequence[str], rename: Mapping[str, str]) -> dict[str, str]:
    """Each of `names` to what ``LoadOptions.rename`` makes of it. Raises `OptionError` where two would become one."""
    found = _renamed(names, rename)
    _refuse_collision(names, found)
    return found
