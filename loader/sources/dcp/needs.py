"""Works out which items of a DCP folder this rank reads, before any of its files is fetched. Pure.

Of a parameter that is saved in chunks, a rank needs the chunks that meet what it keeps of it, and of the optimizer's
state the same; of everything else it needs all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...formats.dcp_metadata import ChunkedTensor, Item, Metadata
from ...saved.contents import Saved
from ...saved.demand import Demand
from ...saved.names import match_names
from ...saved.regions import Laid, Region, extent, intersect, row_major_stride
from ...saved.strided import Box
from ...saved.tensor import same_shape
from ...saved.tree import iterate
from .layout import tensors_by_role

Keys = Mapping[int, str]
"""The keys of an outline's tensors and objects, by ``id``."""
SMALL_BYTES = 16 << 10
"""Up to this size, values that are no part of the state are read with the weights alone, too."""
STEP = "step"
"""The key of an optimizer's state that never lies along a parameter, whatever shapes the two have."""


def wanted_items(metadata: Metadata, outline: Saved | None, key_of: Keys, demand: Demand) -> dict[Item, bool]:
    """The items that hold anything this rank reads, each with whether it reads all of it.

    `outline` is the checkpoint's parts before anything of them was read, None where they show only in the items: then
    the indexes of all are read. A job that is not sharded reads all of them whole.
    """
    if demand.outline:
        return {item: True for item in metadata.objects.values() if item.length <= SMALL_BYTES}
    if outline is None:
        whole = not (demand.parameters or demand.shards or demand.weights_only)
        return {item: whole for key in (*metadata.tensors, *metadata.objects) for item in _all(metadata, key)}
    kept = dict(_kept(outline, key_of, demand))
    wanted = {*metadata.tensors, *metadata.objects}
    if not demand.optimizer:
        wanted -= _keys(outline.state.get("optimizers"), key_of)
    if demand.weights_only:
        # Extra state may be a dict, which has keys of its own.
        wanted = _keys(outline.state.get("model"), key_of)
        wanted |= {key for key in _keys(outline.extra, key_of) if _is_small(metadata, key)}
    return {item: whole for key in wanted for item, whole in _met(metadata, key, kept.get(key))}


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
    return sum(item.length for item in _all(metadata, key)) <= SMALL_BYTES


def _all(metadata: Metadata, key: str) -> Iterator[Item]:
    if key in metadata.objects:
        yield metadata.objects[key]
    else:
        yield from (chunk.item for chunk in metadata.tensors[key].chunks)


def _met(metadata: Metadata, key: str, kept: Sequence[Region] | None) -> Iterator[tuple[Item, bool]]:
    """The items of `key` that hold elements of `kept`, each with whether one region has all of it.

    Where `kept` is None, all items, and all of each.
    """
    if kept is None or key in metadata.objects:
        yield from ((item, True) for item in _all(metadata, key))
        return
    tensor = metadata.tensors[key]
    for chunk in tensor.chunks:
        common = max((_common(tensor, chunk.box, region) for region in kept), default=0)
        if common:
            yield chunk.item, common == chunk.box.numel


def _common(tensor: ChunkedTensor, box: Box, region: Region) -> int:
    """How many elements the two have in common."""
    if isinstance(region, Box):
        common = 1
        for start, size, other, other_size in zip(
            box.starts, box.sizes, region.starts, region.sizes, strict=True
        ):
            common *= max(0, min(start + size, other + other_size) - max(start, other))
        return common
    if not box.numel or not region.numel:
        return 0
    first, stop = extent(tensor.shape, box)
    other_first, other_stop = extent(tensor.shape, region)
    if stop <= other_first or other_stop <= first:
        return 0
    here, there = Laid(box, 0, row_major_stride(box.sizes)), Laid(region, 0, (1,))
    return sum(math.prod(layout.shape) for layout, _ in intersect(tensor.shape, here, there))
