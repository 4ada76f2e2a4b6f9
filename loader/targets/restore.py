"""Plans and carries out the restore of one checkpoint into whatever the caller passed as ``state``.

That is a `State` (`state`), an object that loads itself (`foreign`), or either with a DeepSpeed engine as its model,
which takes its own parts first (`deepspeed.engine`). `prepare_restore` changes nothing, `apply_restore` everything.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import OptionError
from ..materialize.tensors import TensorReader
from ..request import LoadRequest
from ..saved.assembled import SavedTensor
from ..saved.contents import Contents
from ..saved.mismatch import Mismatch
from ..sources.zero.contents import ZeroContents
from ..sources.zero.whole import whole_contents
from ..state import ForeignState, State
from .algorithms import apply_required, ordered_algorithms, required_algorithms
from .deepspeed.engine import EnginePlan, apply_engine, is_deepspeed_engine, plan_engine
from .foreign import ForeignPlan, apply_foreign, plan_foreign
from .module import ModulePlan, NoteChange
from .optimizer import OptimizerPlan, optimizer_groups
from .state import StatePlan, apply_state, plan_state


@dataclass
class Prepared:
    """The plans of one restore, checked; nothing is changed yet."""

    mismatch: Mismatch
    algorithms: list[Any] = field(default_factory=list)
    """New objects that `apply_restore` applies first. They change the model, so names and shapes are checked after."""
    state: StatePlan | None = None
    foreign: ForeignPlan | None = None
    engine: EnginePlan | None = None
    zero: ZeroContents | None = None
    """The ZeRO checkpoint that `state` or `foreign` takes whole tensors from; None where an engine takes its shards, or
    the checkpoint has none."""

    @property
    def renamed(self) -> dict[str, str]:
        engine = dict(self.engine.renamed) if self.engine is not None else {}
        return {**dict(getattr(self._module, "renamed", {})), **engine}

    @property
    def cast(self) -> dict[str, str]:
        engine = dict(self.engine.cast) if self.engine is not None else {}
        optimizers = {name: cast for plan in self._optimizers for name, cast in plan.cast.items()}
        return {**dict(getattr(self._module, "cast", {})), **optimizers, **engine}

    @property
    def reset(self) -> list[str]:
        return [name for plan in self._optimizers for name in plan.reset]

    @property
    def notes(self) -> list[str]:
        """Sentences for the receipt."""
        notes = []
        names = self._module.from_masters if self._module is not None else []
        if names:
            notes.append(f"{len(names)} weights come from the saved fp32 masters, not from the module's file")
        optim = self.zero.any_optim if self.zero is not None else None
        if self._optimizers and optim is not None and not any("lr" in group for group in optim.groups or ()):
            notes.append(
                "the files hold no hyperparameters (elastic_checkpoint): the optimizer keeps its own"
            )
        return notes

    @property
    def not_restored(self) -> list[str]:
        plans = (self.state, self.foreign, self.engine)
        return [name for plan in plans if plan is not None for name in plan.not_restored]

    @property
    def _module(self) -> ModulePlan | None:
        holder = self.state or self.foreign
        return holder.module if holder is not None else None

    @property
    def _optimizers(self) -> list[OptimizerPlan]:
        holder = self.state or self.foreign
        return holder.optimizers if holder is not None else []


def prepare_restore(
    request: LoadRequest, checkpoint: Checkpoint, contents: Contents, unfiltered: Contents
) -> Prepared:
    """Plans the restore of `contents` into ``request.state``; changes nothing. Every rank calls it; none waits.

    What does not fit is in the ``mismatch`` of the result, for the caller to raise. Where algorithms are still to be
    applied, names and shapes can only be checked after them, by `apply_restore`.

    Args:
        contents: the checkpoint's, as ``ignore_keys`` left them.
        unfiltered: the same before ``ignore_keys``.

    Raises:
        OptionError: the state is of no known kind, or an engine's model would need an algorithm.
        LayoutError: the target has a layout that can't be restored, or saved ranks' files are missing.
    """
    state = request.state
    if not isinstance(state, State | ForeignState):
        raise OptionError(
            f"state={type(state).__name__}: expected a rankload.State, or an object with load_state_dict "
            "and load_model_state such as Composer's State"
        )
    prepared = Prepared(Mismatch())
    engine = is_deepspeed_engine(getattr(state, "model", None))
    if engine:
        contents, unfiltered, engine_contents = _engine_parts(checkpoint, contents, unfiltered)
        if checkpoint.zero is None and not request.weights_only:
            warnings.warn(
                f"{checkpoint.name} is a single file, of which a DeepSpeed engine takes the weights alone: its "
                "optimizer state and counters stay as they are. Say so with load_weights_only=True",
                stacklevel=2,
            )
        prepared.engine = plan_engine(
            request.state.model,
            checkpoint.zero,
            engine_contents,
            checkpoint.contents,
            weights_only=request.weights_only,
            rename=request.options.rename,
        )
        prepared.mismatch.extend(prepared.engine.mismatch)
    else:
        prepared.zero = checkpoint.zero
    present = getattr(state, "algorithms", None)
    if isinstance(present, list):
        missing = required_algorithms(contents.state.get("algorithms"), present, request.exclude_algorithms)
        if missing and engine:
            names = [type(algorithm).__qualname__ for algorithm in missing]
            raise OptionError(
                f"The checkpoint needs {[repr(a) for a in missing]}, which change the model, but the model is a "
                "DeepSpeed engine, whose parameters are laid out already. Apply them before "
                f"deepspeed.initialize and pass them in State(algorithms=...), or use exclude_algorithms={names!r}"
            )
        prepared.algorithms = ordered_algorithms(missing, present, request.algorithm_passes)
    if not prepared.algorithms:
        _plan_rest(request, prepared, contents, unfiltered, with_model=not engine)
    return prepared


def _engine_parts(
    checkpoint: Checkpoint, contents: Contents, unfiltered: Contents
) -> tuple[Contents, Contents, Contents]:
    """`contents` and `unfiltered` without the parts that a DeepSpeed engine restores, and those parts of `contents`.

    The schedulers are among them only where DeepSpeed saved one: Composer keeps its own outside the engine's files.
    """
    zero = checkpoint.zero
    claimed = {"model", "optimizers", "engine"}
    own_scheduler = zero is not None and zero.models[0].lr_scheduler is not None
    if own_scheduler:
        claimed.add("schedulers")

    def without(whole: Contents) -> Contents:
        return replace(whole, state={key: value for key, value in whole.state.items() if key not in claimed})

    kept = {key: value for key, value in contents.state.items() if key in claimed}
    return without(contents), without(unfiltered), replace(contents, state=kept)


def _plan_rest(
    request: LoadRequest, prepared: Prepared, contents: Contents, unfiltered: Contents, *, with_model: bool
) -> None:
    """Plans everything but algorithms and a DeepSpeed engine, against the model as it is now."""
    masters: Mapping[int, SavedTensor] = {}
    if prepared.zero is not None:
        whole = whole_contents(prepared.zero, contents, optimizer_groups(request.state))
        contents, masters = whole.contents, whole.masters
        unfiltered = whole_contents(prepared.zero, unfiltered).contents
    if isinstance(request.state, State):
        prepared.state = plan_state(
            request.state,
            contents,
            unfiltered,
            weights_only=request.weights_only,
            rename=request.options.rename,
            with_model=with_model,
            masters=masters,
        )
        prepared.mismatch.extend(prepared.state.mismatch)
        return
    prepared.foreign = plan_foreign(
        request.state,
        contents,
        unfiltered,
        weights_only=request.weights_only,
        rename=request.options.rename,
        exclude_algorithms=request.exclude_algorithms,
        with_model=with_model,
        masters=masters,
    )
    prepared.mismatch.extend(prepared.foreign.mismatch)


def apply_restore(
    request: LoadRequest,
    prepared: Prepared,
    contents: Contents,
    unfiltered: Contents,
    reader: TensorReader,
    note_change: NoteChange,
    materialize_options: Mapping[str, Any],
) -> list[str]:
    """Carries out what was prepared, on this rank; returns the parts that were restored, for the receipt.

    Every rank calls it; none waits for another. `note_change` is called with a part's name before that part is first
    changed; `materialize_options` are `materialize`'s ``safe_types`` and ``file``.

    Raises:
        MismatchError: after algorithms were applied, names or shapes do not fit.
        AlgorithmError: applying an algorithm failed.
        CorruptError: bytes are missing or do not match their checksum.
    """
    restored: list[str] = []
    if prepared.algorithms:
        apply_required(prepared.algorithms, request.state, request.logger, note_change)
        restored.extend(f"algorithm {algorithm!r}" for algorithm in prepared.algorithms)
        _plan_rest(request, prepared, contents, unfiltered, with_model=prepared.engine is None)
        prepared.mismatch.raise_if_any(request.path, strict=request.strict)
    if prepared.engine is not None:
        restored += apply_engine(prepared.engine, reader, note_change)
    if prepared.state is not None:
        restored += apply_state(
            prepared.state,
            reader,
            note_change,
            strict=request.strict,
            materialize_options=materialize_options,
        )
    if prepared.foreign is not None:
        restored += apply_foreign(
            prepared.foreign,
            request.logger,
            reader,
            note_change,
            strict=request.strict,
            exclude_algorithms=request.exclude_algorithms,
            algorithm_passes=request.algorithm_passes,
            materialize_options=materialize_options,
        )
    return restored
