"""A format that nobody saves checkpoints in: a header in JSON, and its tensors in pieces in binary files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankload.loader.saved.contents import Saved
from rankload.loader.saved.demand import Demand
from rankload.loader.saved.dtypes import ITEMSIZE
from rankload.loader.saved.regions import Run, row_major_stride
from rankload.loader.saved.strided import Box
from rankload.loader.saved.tensor import Piece, SavedTensor, StorageRef
from rankload.loader.sources.base import Files


class ToySource:
    """The header has ``files`` (name to size), ``ranks`` and ``state``, where {"tensor": ...} stands for a tensor."""

    def recognises(self, files: Files) -> bool:
        return files.first.name.endswith(".toy")

    def open(self, files: Files, demand: Demand) -> Saved:
        with files.stage("read header"):
            header = json.loads(Path(files.first.path).read_text())
        folder = files.first.name.rpartition("/")[0]
        fetched = files.fetch([f"{folder}/{name}" for name in header["files"]], "fetch pieces")
        with files.stage("read"):
            storages = {
                name: StorageRef(fetched[f"{folder}/{name}"].path, name, 0, size, None)
                for name, size in header["files"].items()
            }
            state = _state(header["state"], storages)
        if demand.weights_only:
            state = {"model": state["model"]}
        return Saved(files.name, "toy", "toy", state, data_parallel_size=header["ranks"])


def _state(value: Any, storages: Mapping[str, StorageRef]) -> Any:
    if isinstance(value, list):
        return [_state(item, storages) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"tensor"}:
        return {key: _state(item, storages) for key, item in value.items()}
    dtype, shape, pieces = value["tensor"]
    found = []
    for name, offset, starts, sizes in pieces:
        in_run = isinstance(starts, int)
        region = Run(starts, sizes) if in_run else Box(tuple(starts), tuple(sizes))
        stride = (1,) if in_run else row_major_stride(region.sizes)
        found.append(Piece(region, offset // ITEMSIZE[dtype], stride, storages[name]))
    return SavedTensor.in_pieces(dtype, tuple(shape), found)
