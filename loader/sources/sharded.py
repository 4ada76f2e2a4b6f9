"""Opens a model in several files, of safetensors or of torch, with an index that says which file has which weight.

Every rank reads the index of each file, whatever it keeps: that is small, and it alone states the shapes and dtypes,
and whether the file is the one that the model's index was written for. Which bytes of weights are fetched follows from
what the rank keeps, as for any other source.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import CorruptError
from ..formats.model_index import ModelIndex, read_model_index
from ..formats.torch_file import FileIndex
from ..saved.contents import Saved, SetFile
from ..saved.demand import Demand
from ..stores.locate import MODEL_INDEX
from .base import Files
from .single_file import STATE_DICT, state_dict_of

_SHOWN = 8


class Sharded:
    """A model as Hugging Face's libraries save one that is too large for one file: weights, and nothing else."""

    def recognises(self, files: Files) -> bool:
        return files.in_folder and files.first.name.endswith(MODEL_INDEX)

    def open(self, files: Files, demand: Demand) -> Saved:
        with files.stage("read index"):
            index = files.parsed(files.first, lambda path, name: read_model_index(path, name=name))
        fetched = files.fetch(index.file_names, "fetch")
        with files.stage("read"):
            read = {name: files.index(fetched[name]) for name in index.file_names}
            formats = {one.format for one in read.values()}
            extra = {"metadata": index.metadata} if index.metadata else {}
            model, notes = _joined(index, read, files.first.source)
            layout = "safetensors" if formats == {"safetensors"} else STATE_DICT
            own = tuple(map(SetFile, (files.first.name, *index.file_names)))
            return Saved(files.name, "sharded", layout, {"model": model}, extra=extra, notes=notes, files=own)


def _joined(
    index: ModelIndex, read: dict[str, FileIndex], shown: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The weights of all files, and notes on those that the index does not name; messages call it `shown`.

    Raises `CorruptError` where a file lacks a weight that the index says it has, or two files have the same one.
    """
    model: dict[str, Any] = {}
    file_of: dict[str, str] = {}
    for file, one in read.items():
        for name, value in state_dict_of(one).items():
            if name in model:
                raise CorruptError(
                    f"{shown}: {file_of[name]} and {file} both have {name!r}: they were not saved together. Put all "
                    "files of one save there, and no others.",
                    path=shown,
                )
            model[name], file_of[name] = value, file
    lacking = [
        f"{name!r} in {file}" + (f" (it is in {file_of[name]})" if name in file_of else "")
        for name, file in index.files.items()
        if file_of.get(name) != file
    ]
    if lacking:
        raise CorruptError(
            f"{shown} says where weights are that are not there: {_listed(lacking)}. The files are not those that it "
            "was written for: put all files of one save there, with the index of that save.",
            path=shown,
        )
    unnamed = [name for name in model if name not in index.files]
    notes = (
        (f"{shown} does not name these weights of its files: {_listed(map(repr, unnamed))}",)
        if unnamed
        else ()
    )
    return model, notes


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
