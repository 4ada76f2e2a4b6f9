"""DeepSpeed's own load, at any world size and from any path: ``engine.load_checkpoint``, done by `rankload.load`.

    from rankload.integrations import deepspeed

    path, client_state = deepspeed.load_checkpoint(engine, "run")   # in a script
    deepspeed.attach(engine)                                        # one engine that somebody else loads
    with deepspeed.replaced(): ...                                  # every engine that is loaded in the block

The arguments and what is returned are those of ``DeepSpeedEngine.load_checkpoint`` (``runtime/engine.py``), but a
missing checkpoint raises, where DeepSpeed warns and returns ``(None, None)``.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..loader import LoadOptions, OptionError, State, load
from ..loader.stores.names import child_of
from .batches import warn_of_batch
from .parts import leave_out
from .side_folders import origin_of
from .versions import warn_of_version

TRIED = ("0.19", "0.18")
_COUNTERS = "state/engine"
"""Steps, samples and the loss scale: what an engine keeps beside its module, optimizer and scheduler."""


def load_checkpoint(
    engine: Any,
    load_dir: str | os.PathLike[str],
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Any = None,
    *,
    object_store: Any = None,
    options: LoadOptions | Mapping[str, Any] | None = None,
    warns_of_batch: bool = True,
) -> tuple[str, dict[str, Any]]:
    """Restores `engine` as ``engine.load_checkpoint`` does, at any world size and from any path or URI.

    Every rank must call it, with the same arguments.

    Args:
        engine: a DeepSpeed engine.
        load_dir: the folder with ``latest``; with `tag`, the folder that has it.
        tag: the folder inside of it. None: what ``latest`` names.
        load_module_strict: whether missing and unexpected weights are an error.
        load_optimizer_states: whether the optimizer's state is restored; its fp32 weights are, with the module.
        load_lr_scheduler_states: whether the engine's lr scheduler is restored.
        load_module_only: restore the module, and none of these nor the engine's counters.
        custom_load_fn: refused: rankload puts the weights in place itself.
        object_store, options: as `rankload.load` takes them.
        warns_of_batch: whether to warn where a step's samples are others than when it was saved: a framework's adapter
            that knows more of them does so itself.

    Returns:
        The path of what was restored, and the whole client_state of this rank, for ``rng`` one random state for each
        rank of this world. ``engine.rankload_result`` has the `LoadResult`.

    Raises:
        RankloadError: as `rankload.load`; also where there is no ``latest``.
    """
    if custom_load_fn is not None:
        raise OptionError(
            "custom_load_fn is not called: rankload puts weights in place itself; rename them with "
            "LoadOptions(rename=...), or leave some out with rankload.load(..., ignore_keys=...)"
        )
    warn_of_version("deepspeed", TRIED)
    left_out = []
    if load_module_only or not load_optimizer_states:
        left_out.append("optimizer")
    if load_module_only or not load_lr_scheduler_states:
        left_out.append("scheduler")
    path = os.fspath(load_dir) if tag is None else child_of(os.fspath(load_dir), tag)
    result = load(
        path,
        State(model=engine),
        object_store=object_store,
        strict_model_weights=load_module_strict,
        progress_bar=False,
        ignore_keys=[_COUNTERS] if load_module_only else None,
        options=leave_out(options, left_out),
    )
    if warns_of_batch and load_optimizer_states and not load_module_only:
        warn_of_batch(
            result.batch_size,
            engine.train_batch_size(),
            counted_by="DeepSpeed",
            remedy="Keep the batch by gradient_accumulation_steps, or count samples yourself",
        )
    client_state = dict(result.extra)
    if result.rng_states is not None:
        client_state["rng"] = result.rng_states
    engine.rankload_result = result
    return result.receipt.path, client_state


def attach(engine: Any) -> Any:
    """Makes ``engine.load_checkpoint`` of this one engine `load_checkpoint`, and returns it; no class is touched.

    For an engine that a framework loads: what ``Accelerator.prepare`` returned.
    """
    engine.load_checkpoint = types.MethodType(load_checkpoint, engine)
    return engine


@contextlib.contextmanager
def replaced(load: Callable[..., Any] = load_checkpoint) -> Iterator[None]:
    """A block in which ``DeepSpeedEngine.load_checkpoint`` is `load_checkpoint`, whoever calls it; it undoes itself.

    For a framework that makes and loads its engine in one call, as Trainer's ``train(resume_from_checkpoint=...)``.
    """
    from deepspeed import DeepSpeedEngine

    before = DeepSpeedEngine.load_checkpoint
    DeepSpeedEngine.load_checkpoint = load
    try:
        yield
    finally:
        DeepSpeedEngine.load_checkpoint = before


def replaced_by_origins(
    *, object_store: Any = None, options: LoadOptions | Mapping[str, Any] | None = None
) -> contextlib.AbstractContextManager[None]:
    """`replaced` for a framework that was handed a side folder: its engines are loaded from what that stands for.

    Args:
        object_store: the store of what a side folder stands for; other folders are local, whatever it is.
        options: as `rankload.load` takes them.
    """

    def load(engine: Any, load_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        origin, store = origin_of(load_dir, object_store)
        return load_checkpoint(engine, origin, *args, object_store=store, options=options, **kwargs)

    return replaced(load)
