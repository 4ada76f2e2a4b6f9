"""Decides what of a checkpoint an export writes: which tensors, in which dtype, and what is left out and why. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import FormatError, LayoutError
from ..plurals import counted
from ..saved.contents import Saved
from ..saved.dtypes import ITEMSIZE
from ..saved.names import rename_all
from ..saved.tensor import SavedTensor, Unread
from ..saved.ties import tied_names
from ..saved.values import is_tensor, kind_of

DType = Literal["as-saved", "fp32", "bf16"]
DTYPES: tuple[DType, ...] = ("as-saved", "fp32", "bf16")
_TARGET: dict[DType, str] = {"fp32": "float32", "bf16": "bfloat16"}
_CAST = frozenset({"float64", "float32", "float16", "bfloat16"})
"""What a cast changes. Whole numbers, complex ones and the 8-bit floats of quantized weights are something else in
another dtype."""
MASTERS = "fp32 masters"
"""What `Selection.left_out` calls the optimizer's own copies of the weights."""
_REST = "all but the model"
_OF_THIS_JOB = "resharded from "
"""How a note begins that is about the job that loads."""


@dataclass(frozen=True, slots=True, eq=False)
class OutTensor:
    """A tensor to write: where its elements come from, and the dtype that they get."""

    name: str
    """For messages, and of a weight its name in the export."""
    source: SavedTensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        return self.source.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Selection:
    """What is exported of a checkpoint, and what is not."""

    weights: dict[str, OutTensor]
    """Parameters and buffers, by name; of tied ones the first name alone."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Further names of tied weights, each with the one in `weights`."""
    objects: dict[str, Any] = field(default_factory=dict)
    """Entries of the model's state dict that are no plain tensors: extra state, and quantized or sparse weights."""
    rest: dict[str, Any] | None = None
    """The checkpoint without its weights, in Composer's layout; None where the weights alone are exported."""
    from_masters: int = 0
    """How many of the weights are the optimizer's fp32 masters."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What is not exported, by its place, and why."""
    lost: tuple[str, ...] = ()
    """Those of `left_out` that are tensors of the model, which the format cannot hold."""
    notes: tuple[str, ...] = ()

    @property
    def casts(self) -> dict[str, int]:
        """How many weights change their dtype, by ``FROM to TO``."""
        found: dict[str, int] = {}
        for one in self.weights.values():
            if one.source.dtype != one.dtype:
                change = f"{one.source.dtype} to {one.dtype}"
                found[change] = found.get(change, 0) + 1
        return found


def select(saved: Saved, dtype: DType, *, everything: bool, rename: Mapping[str, str]) -> Selection:
    """What an export of `saved` writes.

    Args:
        dtype: of the weights. ``fp32`` and ``bf16`` cast floats; where the checkpoint has fp32 masters, and its weights
            are of another dtype than the wanted one, the masters are what is cast.
        everything: whether the rest of the checkpoint is exported too, as it was saved.
        rename: as ``LoadOptions.rename``.

    Raises `FormatError` where there are no weights, `LayoutError` where elements of one are in no file,
    and `OptionError` where `rename` gives two of them one name.
    """
    model = saved.state.get("model")
    if not isinstance(model, Mapping) or not model:
        raise FormatError(
            f"{saved.name} has no model to export; it has {', '.join(saved.as_tree()['state']) or 'nothing'}",
            path=saved.name,
        )
    new_name = rename_all([name for name in model if isinstance(name, str)], rename)
    tensors = {name: value for name, value in model.items() if isinstance(value, SavedTensor)}
    owners = tied_names(tensors, saved.aliases)
    weights: dict[str, OutTensor] = {}
    from_masters = 0
    for name, value in tensors.items():
        if name in owners:
            continue
        wanted = _TARGET.get(dtype, value.dtype) if value.dtype in _CAST else value.dtype
        master = saved.masters.get(name) if value.dtype != wanted or wanted == "float32" else None
        source = master if master is not None else value
        _check_pieces(saved.name, name, source)
        from_masters += master is not None
        weights[new_name[name]] = OutTensor(new_name[name], source, wanted)
    objects = {
        new_name.get(name, str(name)): value
        for name, value in model.items()
        if not isinstance(value, SavedTensor)
    }
    left_out = {} if everything else {_REST: "weights and buffers are exported; --all exports the rest too"}
    left_out.update(_lost_masters(saved, tensors, dtype, from_masters))
    return Selection(
        weights,
        {new_name[name]: new_name[owner] for name, owner in owners.items()},
        objects,
        _without_model(saved) if everything else None,
        from_masters,
        left_out,
        notes=tuple(_notes(saved, dtype, everything=everything)),
    )


def refused(value: Any) -> str:
    """Why a model's entry that is no `SavedTensor` is in no safetensors file."""
    what = f"a {kind_of(value)}" if is_tensor(value) else f"no tensor, but a {kind_of(value)}"
    return f"{what}: safetensors holds plain tensors alone; --format dcp keeps it"


def _check_pieces(where: str, name: str, tensor: SavedTensor) -> None:
    for piece in tensor.pieces:
        if isinstance(piece.storage, Unread):
            raise LayoutError(f"{where}: {name} {piece.storage.reason}", path=where)


def _lost_masters(
    saved: Saved, tensors: Mapping[str, SavedTensor], dtype: DType, from_masters: int
) -> dict[str, str]:
    known = [
        name for name, one in saved.masters.items() if name in tensors and tensors[name].dtype != one.dtype
    ]
    if dtype == "fp32" or from_masters or not known:
        return {}
    return {
        MASTERS: f"the weights are exported in their own dtype; --dtype fp32 exports these ({len(known):,})"
    }


def _without_model(saved: Saved) -> dict[str, Any]:
    tree = saved.as_tree()
    return {**tree, "state": {part: value for part, value in saved.state.items() if part != "model"}}


def _notes(saved: Saved, dtype: DType, *, everything: bool) -> list[str]:
    notes = [one for one in saved.notes if not one.startswith(_OF_THIS_JOB)]
    notes += saved.unfinished
    unnamed = sum(map(len, saved.unnamed_masters))
    if unnamed and dtype != "as-saved":
        notes.append(
            f"{counted(unnamed, 'fp32 master')} of the optimizer are kept without names (ZeRO stage 0), so that the "
            "weights were cast from their own dtype"
        )
    elif unnamed and everything:
        notes.append(f"{counted(unnamed, 'fp32 master')} of the optimizer without names are not exported")
    if everything and saved.rng is not None and saved.world_size is not None:
        lacking = saved.world_size - len(saved.rng)
        if lacking > 0:
            notes.append(
                f"random states of {counted(len(saved.rng), 'rank')} of {saved.world_size} are exported: each rank "
                "kept its own, or the first rank's alone were kept"
            )
    return notes
