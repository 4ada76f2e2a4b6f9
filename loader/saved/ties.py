"""Which names of a model stand for one tensor: by the word of the checkpoint, or by where their elements lie. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from .tensor import SavedTensor, StorageRef


def place_of(tensor: SavedTensor) -> Hashable:
    """Equal for tensors that are the same elements of the same storages.

    Of elements whose files were not read it is not known where they lie: only for tensors of one name it tells then
    whether they are the same.
    """
    pieces = tuple((one.region, one.offset, one.stride, one.storage) for one in tensor.pieces)
    return tensor.dtype, tensor.shape, pieces


def tied_names(tensors: Mapping[str, SavedTensor], aliases: Mapping[str, str]) -> dict[str, str]:
    """The names of `tensors` that stand for another one's tensor, each with that name.

    That is the owner by `aliases` (`Saved.aliases`), where it is there and has the same shape; else the first name of a
    tensor in the same place.
    """
    owners = {
        name: owner
        for name, tensor in tensors.items()
        if (owner := aliases.get(name, name)) != name
        and owner in tensors
        and tensors[owner].shape == tensor.shape
    }
    first: dict[Hashable, str] = {}
    for name, tensor in tensors.items():
        if name not in owners and _is_known(tensor):
            owner = first.setdefault(place_of(tensor), name)
            if owner != name:
                owners[name] = owner
    return {name: owners.get(owner, owner) for name, owner in owners.items()}


def _is_known(tensor: SavedTensor) -> bool:
    """Whether it has elements, and it is known where all of them lie."""
    known = bool(tensor.pieces) and all(isinstance(one.storage, StorageRef) for one in tensor.pieces)
    return known and tensor.numel > 0
