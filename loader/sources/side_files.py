"""Adds what transformers' Trainer and Accelerate save beside a model: in files of their own, in the same folder.

Trainer's ``checkpoint-N`` is known by ``trainer_state.json``, a folder of Accelerate's ``save_state`` by
``random_states_0.pkl``. The model's own files, with those of DeepSpeed or DCP, are read by their own source; of what is
beside them, `with_side_files` takes the optimizer, unless the model's source has one, schedulers, the gradient scaler,
each rank's random states, and counters. It asks for each name, as a store that cannot list is asked for all others.

Not read: ``training_args.bin``, ``config.json``, tokenizers, and further models of one Accelerator. Names and forms are
those of ``transformers/trainer.py`` (5.x) and ``accelerate/checkpointing.py`` (1.x).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from ..errors import CorruptError
from ..formats.strict_json import parse_json
from ..plurals import counted
from ..saved.contents import Saved, SetFile
from ..saved.demand import Demand
from ..saved.node_file import NodeFile
from ..saved.values import kind_of
from ..stores.locate import MODEL_FILES
from .base import Files
from .single_file import by_class, rng_list

_LARGEST_JSON = 64 << 20
_TRAINERS = re.compile(r"checkpoint-\d+")
"""How Trainer names its folders."""
_ACCELERATES_OWN = re.compile(r"checkpoint_\d+")
"""How Accelerate does."""
_TRAINERS_FIRST = ("training_args.bin", "rng_state_0.pth", "rng_state.pth")
"""What it writes before the file that it writes last."""
_ACCELERATES = ("pytorch_model", "pytorch_model_fsdp_0")
"""The folders in which Accelerate has DeepSpeed and DCP save the model."""
_NUMBERED = 8
"""How many files of a numbered kind are asked for at first; twice as many more, as long as all are there."""


@dataclass(frozen=True)
class _Writer:
    """The names that a framework gives its files; ``{}`` stands for a number from 0 on."""

    layout: str
    """What the receipt calls it."""
    marker: str
    """A file that each of its folders has, once it is complete."""
    optimizers: tuple[str, ...]
    """The first one's name, and those of further ones, numbered from 1 on."""
    schedulers: tuple[str, ...]
    random_states: tuple[str, ...]
    """Of each rank, or of a job of one process."""
    entries: Mapping[str, str]
    """Further files to the names of the entries that they become."""
    scaler: str = "scaler.pt"


_WRITERS = (
    _Writer(
        "trainer",
        "trainer_state.json",
        ("optimizer.pt",),
        ("scheduler.pt",),
        ("rng_state_{}.pth", "rng_state.pth"),
        {"trainer_state.json": "trainer_state"},
    ),
    _Writer(
        "accelerate",
        "random_states_0.pkl",
        ("optimizer.bin", "optimizer_{}.bin"),
        ("scheduler.bin", "scheduler_{}.bin"),
        ("random_states_{}.pkl",),
        {
            "sampler.bin": "sampler",
            "dl_state_dict.bin": "dl_state_dict",
            "custom_checkpoint_{}.pkl": "custom_checkpoint_{}",
        },
    ),
)

MARKERS = tuple(writer.marker for writer in _WRITERS)
"""The files that `with_side_files` looks for first."""


def with_side_files(files: Files, demand: Demand, saved: Saved) -> Saved:
    """`saved`, and the parts that lie beside it. Every rank must call.

    Raises, on all ranks alike, as `Files.beside` and `Files.index`, and `CorruptError` where such a file holds
    something else than its writer puts there.
    """
    if demand.weights_only:
        return saved
    there = files.beside(MARKERS, "look beside")
    writer = next((one for one in _WRITERS if one.marker in there), None)
    if writer is None:
        if not demand.outline:
            return saved
        return replace(saved, unfinished=(*saved.unfinished, *_left_by_killed_save(files)))
    wanted = [*writer.schedulers, writer.scaler, *writer.random_states, *writer.entries]
    if demand.optimizer and not saved.state.get("optimizers"):
        wanted += writer.optimizers
    found = _fetch(files, wanted, there)
    with files.stage("read beside"):
        return _joined(files, writer, found, demand, saved)


def _left_by_killed_save(files: Files) -> tuple[str, ...]:
    """What shows that a framework began to save the folder, and was killed before its last file. Every rank must call.

    Both write the file by which their folders are known after the model and the optimizer; the weights come first, so
    that a folder of their name may have them alone.
    """
    weights = files.first.name.rpartition("/")[2] in MODEL_FILES
    if _TRAINERS.fullmatch(files.folder) and (weights or files.beside(_TRAINERS_FIRST, "look beside")):
        return (
            f"{files.folder} has no trainer_state.json, which Trainer writes last: the save was not finished",
        )
    named = weights and _ACCELERATES_OWN.fullmatch(files.folder)
    if named or (files.folder and any(part in _ACCELERATES for part in files.name.split("/"))):
        return (
            f"{files.folder} has no random_states_0.pkl, which Accelerate writes last: the save was not finished",
        )
    return ()


def _fetch(files: Files, names: Sequence[str], there: Mapping[str, NodeFile]) -> dict[str, NodeFile]:
    """Those files of `names` that are beside the model; of numbered ones all, up to the first that is not there."""
    found = dict(there)
    numbered = [name for name in names if "{}" in name]
    begin, end = 0, _NUMBERED
    asked = [name for name in names if "{}" not in name]
    while asked or numbered:
        asked += [name.format(number) for name in numbered for number in range(begin, end)]
        found |= files.beside([name for name in asked if name not in found], "fetch beside")
        numbered = [name for name in numbered if name.format(end - 1) in found]
        begin, end, asked = end, 3 * end, []
    return found


def _joined(
    files: Files, writer: _Writer, found: Mapping[str, NodeFile], demand: Demand, saved: Saved
) -> Saved:
    state = dict(saved.state)
    optimizers = _trees(files, writer.optimizers, found)
    if optimizers:
        state["optimizers"] = by_class(optimizers, demand.optimizers, "optimizer")
    schedulers = _trees(files, writer.schedulers, found)
    if schedulers:
        # What DeepSpeed keeps of a scheduler is newer than a file of the same name that another save left.
        beside = by_class(schedulers, demand.schedulers, "scheduler")
        state["schedulers"] = {**beside, **(saved.state.get("schedulers") or {})}
    for scaler in _trees(files, (writer.scaler,), found):
        state["scaler"] = {demand.scaler: scaler}
    extra = dict(saved.extra)
    for name, key in writer.entries.items():
        for number, file in enumerate(_numbered(name, found)):
            extra.setdefault(key.format(number), _entry(files, file))
    ranks = [dict(tree) for tree in _trees(files, writer.random_states, found, first=0)]
    # Accelerate keeps its count of batches there, which tells it when gradients have been accumulated.
    counts = [each.pop("step", None) for each in ranks]
    if counts and counts[0] is not None:
        extra.setdefault("accelerator_step", counts[0])
    known = {one.name for one in saved.files}
    more = (SetFile(name, beside=True) for name in found if name not in known)
    joined = replace(saved, layout=writer.layout, state=state, extra=extra, files=(*saved.files, *more))
    if saved.world_size is not None and ranks and len(ranks) < saved.world_size:
        lost = (
            f"{files.name} was saved by {counted(saved.world_size, 'rank')} and has random states of {len(ranks)}: the "
            "save was not finished",
        )
        joined = replace(joined, unfinished=(*saved.unfinished, *lost))
    if not ranks:
        return joined
    rng = rng_list(ranks)
    if rng is None:
        extra["rng"] = ranks  # in a form that is not known: returned to the caller as it is
        return joined
    return replace(joined, rng=rng, rng_per_rank=False)


def _numbered(name: str, found: Mapping[str, NodeFile], first: int = 0) -> list[NodeFile]:
    """The files of a name that are there, in the order of their numbers from `first` on.

    Raises `CorruptError` where one between others is not there.
    """
    if "{}" not in name:
        return [found[name]] if name in found else []
    names = [name.format(number) for number in range(first, len(found) + 2 * _NUMBERED)]
    there = [found[each] for each in takewhile(found.__contains__, names)]
    later = next((found[each] for each in names[len(there) :] if each in found), None)
    if later is not None:
        raise CorruptError(
            f"{later.source} is there, and {names[len(there)]} beside it is not: the save was not finished, or not all "
            "of it was copied. Copy all of the checkpoint, or take an older one",
            path=later.source,
        )
    return there


def _trees(
    files: Files, names: Sequence[str], found: Mapping[str, NodeFile], *, first: int = 1
) -> list[Mapping[Any, Any]]:
    """What the files of `names` hold; numbered ones begin with `first`."""
    trees = []
    for file in (each for name in names for each in _numbered(name, found, first)):
        tree = files.index(file).tree
        if not isinstance(tree, Mapping):
            raise CorruptError(
                f"{file.source}: expected a state_dict, got a {kind_of(tree)}: was it put there by another program? "
                "Take another copy of the checkpoint",
                path=file.source,
            )
        trees.append(tree)
    return trees


def _entry(files: Files, file: NodeFile) -> Any:
    """What an entry's file holds: JSON, or any object that was pickled."""
    if not file.name.endswith(".json"):
        return files.index(file).tree
    return files.parsed(file, _read_json)


def _read_json(path: str, name: str) -> Any:
    with open(path, "rb") as opened:
        data = opened.read(_LARGEST_JSON + 1)
    if len(data) > _LARGEST_JSON:
        raise CorruptError(
            f"{name}: expected at most {_LARGEST_JSON:,} bytes of JSON; leave it out by renaming it",
            path=name,
        )
    return parse_json(data, name=name, what="it", finite=False)
