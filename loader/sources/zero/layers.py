"""The layer files of a pipeline: each layer's weights and buffers, under names that begin at the layer. Pure.

A stage's model file has no module; ``layer_NN-model_states.pt`` holds layer NN's state dict as it is. Within the
stage's module that layer is called ``NN``, and a tied one ``tied_modules.KEY``. A layer that is a plain function, or
uses a tied module by a function of its own, has no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import LayoutError
from .fields import Field, a_mapping, a_name, a_tensor
from .model_states import ModelStates


@dataclass(frozen=True)
class LayerFile:
    """A file that a stage reads, and where its names belong in the stage's module."""

    name: str
    """Relative to the tag folder."""
    prefix: str
    """Such as ``3.`` or ``tied_modules.embed.``."""


def read_layer(tree: Any, *, file: str) -> dict[str, Any]:
    """A layer's state dict, lazy. Raises `CorruptError` where it is none."""
    top = Field(file)
    return {a_name(name, top): value for name, value in a_mapping(tree, top).items()}


def with_layers(
    model: ModelStates, layers: Sequence[tuple[LayerFile, Mapping[str, Any], str]]
) -> ModelStates:
    """A stage's model file with the module that its layer files give: (layer, its state dict, the file's name).

    Parameters that no layer file has (a loss function's, or those of a module that is tied by functions only) stay
    away; their fp32 masters may be had. Raises `CorruptError` where a tensor has another shape than the stage tells.
    """
    shapes = {name: shape for group in model.param_shapes or () for name, shape in group.items()}
    module: dict[str, Any] = {}
    for layer, states, file in layers:
        for name, value in states.items():
            full = layer.prefix + name
            if full in shapes and a_tensor(value, Field(file).at(name)).shape != shapes[full]:
                raise Field(file).at(name).wrong(f"shape {shapes[full]}, as {model.file} tells", value)
            module[full] = value
    return replace(model, module=module)


def check_layers(model: ModelStates, trained: Iterable[str]) -> None:
    """Raises `LayoutError` where a stage trained other layers than it does here; `trained` are its parameters."""
    if model.param_shapes is None:
        return
    saved = _numbers(name for group in model.param_shapes for name in group)
    here = _numbers(trained)
    if saved != here:
        raise LayoutError(
            f"{model.file}: this stage of the pipeline trained the layers {_spoken(saved)} and trains {_spoken(here)} "
            "in this job. Partition them as when it was saved (partition_method); with load_weights_only=True any "
            "partition does",
            path=model.file,
        )


def _numbers(names: Iterable[str]) -> list[int]:
    """The layers that parameters are of, where their names begin with a layer's number."""
    return sorted({int(name.partition(".")[0]) for name in names if name.partition(".")[0].isdecimal()})


def _spoken(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
