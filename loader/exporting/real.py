"""Makes what a checkpoint holds beside its tensors real, so that it can be saved again. Tensors stay unread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..formats.pickle.inert import TorchSize
from ..materialize.objects import hashable, materialize
from ..materialize.tensors import TensorReader
from ..saved.tensor import SavedTensor
from ..saved.tree import iterate, join_path
from ..saved.values import GlobalName, InertArray, InertObject, kind_of
from .select import OutTensor

_PLAIN = (str, int, float, bool, bytes, complex, type(None))
_CONTAINERS = (dict, list, tuple)
_NOT_REAL = object()
"""Stands for a value that cannot be made real."""


class RealValues:
    """Makes trees of saved values real, and notes what cannot be. `reader` reads tensors inside of objects."""

    def __init__(self, reader: TensorReader, safe_types: tuple[str | type, ...], file: str) -> None:
        self._reader = reader
        self._safe_types = safe_types
        self._file = file
        self.left_out: dict[str, str] = {}
        """What is not in the trees any more, by its place, and why."""

    def real(self, tree: Any, path: str) -> Any:
        """`tree`, whose place is `path`, with an `OutTensor` for each saved tensor, and without what cannot be real.

        Raises as `materialize`.
        """
        if isinstance(tree, SavedTensor):
            return OutTensor(path, tree, tree.dtype)
        if isinstance(tree, TorchSize) or not isinstance(tree, _CONTAINERS):
            return self._checked(self._leaf(tree), path)
        if isinstance(tree, dict):
            made = {
                self._key(key, path): self.real(value, join_path(path, key)) for key, value in tree.items()
            }
            return {key: value for key, value in made.items() if value is not _NOT_REAL}
        values = [self.real(value, join_path(path, index)) for index, value in enumerate(tree)]
        # A list keeps its length: what stands behind is found by its place.
        kept = [None if value is _NOT_REAL else value for value in values]
        return kept if isinstance(tree, list) else tuple(kept)

    def _leaf(self, value: Any) -> Any:
        return materialize(
            value, reader=self._reader, safe_types=self._safe_types, file=self._file, keep_unknown=True
        )

    def _key(self, key: Any, path: str) -> Any:
        return key if type(key) in _PLAIN else hashable(self._leaf(key), path=path, file=self._file)

    def _checked(self, made: Any, path: str) -> Any:
        """`made`, or `_NOT_REAL` where a part of it is not real; that is noted."""
        for _, one in iterate(made):
            if isinstance(one, InertObject | GlobalName | InertArray):
                self.left_out[path] = (
                    f"holds a {kind_of(one)}, which is made by no known constructor; --safe-type allows it"
                )
                return _NOT_REAL
        return made


def inert_values(tree: Any) -> list[Any]:
    """What of `tree` is neither a container nor a tensor, but an object: it has to be read to be made real."""
    if isinstance(tree, dict):
        return [one for value in tree.values() for one in inert_values(value)]
    if isinstance(tree, list | tuple) and not isinstance(tree, TorchSize):
        return [one for value in tree for one in inert_values(value)]
    return [tree] if isinstance(tree, InertObject) else []


def tensors_of(tree: Any) -> Iterator[OutTensor]:
    """The tensors of a tree that `RealValues.real` made, in order."""
    if isinstance(tree, OutTensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_of(value)
