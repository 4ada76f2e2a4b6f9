"""Works out which items of a DCP folder this rank reads, before any of its files is fetched. Pure.

Of a parameter that is saved in chunks, a rank needs the chunks that meet what it keeps of it, and of the optimizer's
state the same; of everything else it needs all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...formats.dcp_metadata import Metadata
from ...saved.contents import Saved
from ...saved.demand import Demand
from ...saved.names import match_names
from ...saved.regions import Region
from ...saved.tensor import same_shape
from ...saved.tree import iterate
from .layout import tensors_by_role

Keys = Mapping[int, str]
"""The keys of an outline's tensors and objects, by ``id``."""
Numbers = Sequence[tuple[int, bool]]
"""Of the items of one key: the numbers of those that are read (of an object 0), each with whether all of it is."""
SMALL_BYTES = 16 << 10
"""Up to this size, values that are no part of the state are read with the weights alone, too."""
STEP = "step"
"""The key of an optimizer's state that never lies along a parameter, whatever shapes the two have."""


def wanted_items(
    metadata: Metadata, outline: Saved | None, key_of: Keys, demand: Demand
) -> dict[str, Numbers]:
    """The items that hold anything this rank reads, by their keys; the keys are in the order of `metadata`.

    `outline` is the checkpoint's parts before anything of them was read, None where they show only in the items: then
    the indexes of all are read. A job that is not sharded reads all of them whole.
    """
    if demand.outline:
        return {key: [(0, True)] for key, item in metadata.objects.items() if item.length <= SMALL_BYTES}
    everything = (*metadata.tensors, *metadata.objects)
    if outline is None:
        whole = not (demand.parameters or demand.shards or demand.weights_only)
        return {key: _all(metadata, key, whole) for key in everything}
    wanted = {*everything}
    if not demand.optimizer:
        wanted -= _keys(outline.state.get("optimizers"), key_of)
    if demand.weights_only:
        # Extra state may be a dict, which has keys of its own.
        wanted = _keys(outline.state.get("model"), key_of)
        wanted |= {key for key in _keys(outline.extra, key_of) if _is_small(metadata, key)}
    kept = dict(_kept(outline, key_of, demand))
    met: dict[tuple[int, tuple[Region, ...]], Numbers] = {}
    return {key: _met(metadata, key, kept.get(key), met) for key in everything if key in wanted}


def _kept(outline: Saved, key_of: Keys, demand: Demand) -> Iterator[tuple[str, Sequence[Region]]]:
    """What this rank keeps of tensors of which it may not keep all, by the folder's keys."""
    model = outline.state.get("model")
    if not isinstance(model, Mapping) or not (demand.parameters or demand.shards):
        return
    target_of = match_names(model, demand.names, demand.rename).target_of
    shapes = {name: value.shape for role, name, value in tensors_by_role(outline) if role == "model"}
    for role, saved_name, value in tensors_by_role(outline):
        name, key = target_of.get(saved_name), key_of.get(id(value))
        if name is None or key is None or role == STEP or value.shape != shapes.get(saved_name):
            continue
        name = demand.aliases.get(name, name)
        shard, asked = demand.shards.get(name), (demand.parameters or {}).get(name)
        if shard is not None and shard.shape == value.shape:
            yield key, [shard.box]
        elif asked is not None and same_shape(value.shape, asked.shape):
            yield key, [*asked.updated, *(asked.computed if role == "model" else ())]


def _keys(tree: Any, key_of: Keys) -> set[str]:
    return {key_of[id(value)] for _, value in iterate(tree) if id(value) in key_of}


def _is_small(metadata: Metadata, key: str) -> bool:
    """Whether it costs little to read all of it: counters and settings, which are worth having beside the weights."""
    if key in metadata.objects:
        return metadata.objects[key].length <= SMALL_BYTES
    return sum(metadata.tensors[key].items.lengths) <= SMALL_BYTES


def _all(metadata: Metadata, key: str, whole: bool) -> Numbers:
    count = 1 if key in metadata.objects else len(metadata.tensors[key].items)
    return [(number, whole) for number in range(count)]


def _met(
    metadata: Metadata,
    key: str,
    kept: Sequence[Region] | None,
    known: dict[tuple[int, tuple[Region, ...]], Numbers],
) -> Numbers:
    """The items of `key` that hold elements of `kept`, each with whether one region has all of it.

    Where `kept` is None, all items, and all of each. `known` keeps what was found for tensors that are cut alike.
    """
    if kept is None or key in metadata.objects:
        return _all(metadata, key, True)
    division = metadata.tensors[key].division
    at = id(division), tuple(kept)
    if at not in known:
        known[at] = division.meeting(kept)
    return known[at]
