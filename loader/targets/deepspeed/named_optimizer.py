"""Names an optimizer's state that no engine saved by the checkpoint's names of the parameters, as ZeRO's files have it.

Other checkpoints keep an optimizer's state by the parameters' names, or by numbers in the order of its groups. Names
are matched with this job's as those of weights are; numbers with the engine's groups, whose parameters have the order
in which the job gave them to the optimizer. What was not trained has no state, and no place in an engine's groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from ...saved.contents import Saved
from ...saved.mismatch import Mismatch
from ...saved.names import match_names
from ..optimizer_kinds import sources_of
from ..optimizer_names import names_of_saved, unplaced
from ..parts import missing_part
from .live import LiveEngine
from .plan import ModelPart


def name_optimizer(
    live: LiveEngine, saved: Saved, model: ModelPart, optimizer_class: str, rename: Mapping[str, str]
) -> tuple[Saved, Mismatch]:
    """`saved` with the engine's optimizer alone, its state by the checkpoint's names; and what does not fit.

    `optimizer_class` is the class of the engine's optimizer, which chooses between several saved ones. Where they
    cannot be told apart, or parameters not be matched, the optimizer is left out, and the mismatch says why.
    """
    at = f"optimizers/{optimizer_class}"
    whole = saved.whole.state.get("optimizers")
    states: Mapping[str, Any] = whole if isinstance(whole, Mapping) else {}
    source = sources_of({optimizer_class: live.optimizer}, list(states))[optimizer_class]
    if source is None:
        missing = [missing_part(at, states)] if states else []
        return _with_optimizers(saved, {}, {}), Mismatch(missing)
    state = states[source]
    groups = _groups(state)
    if groups is None:
        wrong = f"optimizers/{source}/param_groups: expected a list of dicts with params"
        return _with_optimizers(saved, {}, {}), Mismatch(wrong=[wrong])
    entries = state.get("state")
    owners, mismatch = _owners(
        live, saved, model, groups, entries if isinstance(entries, Mapping) else {}, rename
    )
    left = saved.state.get("optimizers")
    kept = left.get(source) if isinstance(left, Mapping) else None
    return (
        _with_optimizers(
            saved,
            {source: _named(state, owners)},
            {source: _named(kept, owners)} if isinstance(kept, Mapping) else {},
        ),
        Mismatch(
            wrong=[f"{at}: {one}" for one in mismatch.wrong],
            unexpected=[f"{at}/{one}" for one in mismatch.unexpected],
        ),
    )


def _owners(
    live: LiveEngine,
    saved: Saved,
    model: ModelPart,
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Any],
    rename: Mapping[str, str],
) -> tuple[dict[Any, str], Mismatch]:
    """The keys of the saved state to the checkpoint's names of their parameters."""
    mismatch = Mismatch()
    key_of: dict[str, Any] = {}
    """This job's name to the key of its saved state."""
    names = names_of_saved(groups, state)
    if names is not None:
        match = match_names(names, live.names, rename)
        for source, target in match.target_of.items():
            key_of.setdefault(live.aliases.get(target, target), names[source][1])
        mismatch.unexpected.extend(name for name in match.unexpected if state.get(names[name][1]))
    else:
        own = [list(names) for names in live.groups]
        keys = [list(group["params"]) for group in groups]
        if _sizes(own) != _sizes(keys):
            # Some jobs give the optimizer parameters that are not trained, and DeepSpeed leaves them out.
            own = [[name for name in names if name not in live.frozen] for names in own]
            keys = [[key for key in each if key in state] for each in keys]
        if _sizes(own) == _sizes(keys):
            key_of = dict(zip(chain(*own), chain(*keys), strict=True))
        else:
            given = [len(group["params"]) for group in groups]
            mismatch.wrong.append(unplaced(_sizes(live.groups), given))
    owners = {}
    for name, key in key_of.items():
        known = model.saved_names.get(name, name)
        owners[key] = saved.aliases.get(known, known)
    return owners, mismatch


def _sizes(groups: Sequence[Sequence[Any]]) -> list[int]:
    return [len(group) for group in groups]


def _groups(state: Any) -> list[Mapping[str, Any]] | None:
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not isinstance(groups, list):
        return None
    right = all(isinstance(one, Mapping) and isinstance(one.get("params"), list | tuple) for one in groups)
    return groups if right else None


def _named(state: Mapping[str, Any], owners: Mapping[Any, str]) -> dict[str, Any]:
    """An optimizer's `state`, or what ``ignore_keys`` left of it, under the names in `owners`."""
    named = dict(state)
    entries = state.get("state")
    if isinstance(entries, Mapping):
        named["state"] = {owners[key]: value for key, value in entries.items() if key in owners}
    groups = state.get("param_groups")
    if isinstance(groups, list):
        named["param_groups"] = [
            {
                **{key: value for key, value in group.items() if key != "param_names"},
                "params": [owners[key] for key in group.get("params") or () if key in owners],
            }
            for group in groups
            if isinstance(group, Mapping)
        ]
    return named


def _with_optimizers(saved: Saved, whole: Mapping[str, Any], left: Mapping[str, Any]) -> Saved:
    before = replace(saved.whole, state={**saved.whole.state, "optimizers": dict(whole)})
    return replace(saved, state={**saved.state, "optimizers": dict(left)}, unfiltered=before)
