"""Puts a pipeline's layer files together into the module of a stage. Pure.

A stage's model file has no module. Instead ``layer_NN-model_states.pt`` holds the state dict of layer NN, with names
that begin inside the layer. In the stage's module that layer is called ``NN``, a tied one ``tied_modules.KEY``. A layer
that is a plain function, or that only calls a tied module by a function of its own, has no file. The names are those of
DeepSpeed's ``PipelineModule.ckpt_layer_path`` (``runtime/pipe/module.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...errors import LayoutError
from ...saved.model_parallel import LayerFile
from .fields import Field, a_mapping, a_name, a_tensor
from .model_states import ModelStates


def read_layer(tree: Any, *, file: str) -> dict[str, Any]:
    """A layer's state dict, of which no tensor was read. Raises `CorruptError` where it is none."""
    top = Field(file)
    return {a_name(name, top): value for name, value in a_mapping(tree, top).items()}


def with_layers(
    model: ModelStates, layers: Sequence[tuple[LayerFile, Mapping[str, Any], str]]
) -> ModelStates:
    """A stage's model file with its module filled from `layers`: (layer, its state dict, what messages call the file).

    Parameters that no layer file has (a loss function's, or those of a module that is tied by functions only) are left
    out; the optimizer's files may hold their fp32 masters. Raises `CorruptError` where a tensor has another shape than
    the model file's ``param_shapes``.
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
    """Raises `LayoutError` where the saved stage of the pipeline trained other layers than this job's stage.

    `trained` names the parameters of this job's; where they are of a layer, they begin with its number.
    """
    if model.param_shapes is None:
        return
    saved = _numbers(name for group in model.param_shapes for name in group)
    here = _numbers(trained)
    if saved != here:
        raise LayoutError(
            f"{model.file}: this stage of the pipeline trained the layers {_listed(saved)} and trains {_listed(here)} "
            "in this job. Partition them as when it was saved (partition_method); with load_weights_only=True any "
            "partition does",
            path=model.file,
        )


def _numbers(names: Iterable[str]) -> list[int]:
    """The numbers of the layers that the parameters `names` belong to."""
    return sorted({int(name.partition(".")[0]) for name in names if name.partition(".")[0].isdecimal()})


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
