"""Reads a file that Python's pickle alone wrote, without torch: one pickle, and nothing after it. Free of torch.

Its tensors' storages are torch files of the format before 1.6, as bytes inside the pickle; they are read where they
lie, like those of other files. The file has no checksums.
"""

from __future__ import annotations

from typing import Any

from ..errors import CorruptError, FormatError
from ..plurals import counted
from ..saved.tensor import StorageRef
from .pickle.inert import PickledTensor
from .pickle.read import read_pickle
from .pickle.scan import scan_pickle
from .torch_legacy import read_legacy_inside


def read_plain(
    path: str, *, name: str, memory_limit: int, largest: int
) -> tuple[Any, tuple[StorageRef, ...]]:
    """The tree of the plain pickle at `path`, and its storages in the order of the file.

    Raises `CorruptError` where it is truncated or contradicts itself, `UnsafeError` as `scan_pickle` does, and
    `FormatError` where it has more than `largest` bytes, or tensors in the form of a pickle protocol before 3.
    """
    with open(path, "rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise FormatError(
            f"{name}: a plain pickle of more than {largest:,} bytes; save it by torch.save, which keeps tensors apart.",
            path=name,
        )
    scan = scan_pickle(data, name=name, memory_limit=memory_limit)
    if scan.end != len(data):
        raise CorruptError(
            f"{name}: its pickle is followed by {counted(len(data) - scan.end, 'byte')}.", path=name
        )
    inside = _InsideStorages(data, path, name, memory_limit)
    tree = read_pickle(data, scan, name=name, memory_limit=memory_limit, load_storage=inside.load)
    return tree, tuple(sorted(inside.found, key=lambda storage: storage.offset))


class _InsideStorages:
    """Finds the torch files inside a pickle by their bytes, which follow one another in the order of its calls."""

    def __init__(self, data: bytes, path: str, name: str, memory_limit: int) -> None:
        self.data = data
        self.path = path
        self.name = name
        self.memory_limit = memory_limit
        self.found: list[StorageRef] = []
        self._end = 0

    def load(self, inner: bytes) -> PickledTensor:
        base = self.data.find(inner, self._end)
        if base < 0:
            raise FormatError(
                "its tensors are in the form of a pickle protocol before 3, which is not supported; save it again by "
                "torch.save"
            )
        self._end = base + len(inner)
        tensor, storages = read_legacy_inside(
            inner, self.path, base, name=self.name, memory_limit=self.memory_limit
        )
        if not isinstance(tensor, PickledTensor):
            raise CorruptError("a storage that is no torch file of one")
        self.found += storages
        return tensor
