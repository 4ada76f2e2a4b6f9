"""torchtitan's loads at any world size, from any URI and of any kind: a `CheckpointManager` for its Trainer.

    from rankload.integrations import torchtitan

    with torchtitan.replaced():
        trainer = Trainer(config)   # its checkpointer is our CheckpointManager
    trainer.train()

torchtitan 0.2 has no extension point for it: its Trainer makes the class that its module names. `replaced` changes that
name, and changes it back. A script that makes its own manager takes `CheckpointManager` itself.

Its own folders (``step-N``) are restored by `rankload.load`, and so is what ``initial_load_path`` names: a folder, a
file, or a URI of either. It saves as torchtitan does. Hugging Face's files, a model in several parts (pipelines),
an optimizer for each parameter, and what TorchFT keeps for each replica are left to torchtitan's own load.

Not guaranteed: the position in the data at another data-parallel size, where the data begins again, with a warning.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from ..distributed.printable import warn
from ..distributed.session import open_session
from ..loader import (
    LayoutError,
    LoadOptions,
    LoadResult,
    MismatchError,
    OptionError,
    State,
    UnsafeError,
    load,
)
from ..loader.formats.plain_pickle import read_plain
from .batches import warn_of_batch, warn_of_unknown_batch
from .inert import inert_types
from .native import native_load
from .parts import leave_out
from .versions import warn_of_version

TRIED = ("0.2",)
_titan = importlib.import_module("torchtitan.components.checkpoint")
_TOKENS = "ntokens_seen"
_LARGEST_POSITION = 256 << 20
"""Bytes of one rank's position in the data."""


class CheckpointManager(_titan.CheckpointManager):  # type: ignore[misc, name-defined]
    """torchtitan's, which loads through rankload; its constructor takes torchtitan's arguments.

    Args:
        object_store, options: as `rankload.load` takes them.

    Attributes:
        rankload_result: the `LoadResult` of the last load that went through rankload, else None.
    """

    def __init__(
        self,
        *args: Any,
        object_store: Any = None,
        options: LoadOptions | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.rankload_result: LoadResult | None = None
        self._object_store = object_store
        self._options = options
        super().__init__(*args, **kwargs)

    def load(self, step: int = -1) -> bool:
        """Loads as torchtitan's does; ``initial_load_path`` may be a file or a URI too. Every rank must call it.

        Raises:
            RankloadError: as `rankload.load`.
        """
        path = self.initial_load_path if self.enable else None
        native = self.enable_ft_dataloader_checkpoints or (self.enable and self.initial_load_in_hf)
        if not path or native or os.path.exists(self.folder) or os.path.isdir(path):
            done: bool = super().load(step)
            return done
        # torchtitan takes folders alone.
        self.dcp_load(self._states_to_load(self.initial_load_model_only), path, False, False)
        return True

    def dcp_load(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        from_hf: bool = False,
        from_quantized: bool = False,
    ) -> None:
        """Restores the parts that `state_dict` has from the checkpoint at `checkpoint_id`; every rank must call it.

        Raises:
            RankloadError: as `rankload.load`; `LayoutError` where only torchtitan's own folders can be loaded, and this
                is none; `UnsafeError` where the position in the data holds types that are not made.
        """
        warn_of_version("torchtitan", TRIED)
        model, others = self.states[_titan.MODEL], [key for key in self.states if key != _titan.MODEL]
        wanted = [key for key in others if key in state_dict]
        has_model = any(key not in others for key in state_dict)
        if from_hf or not has_model:
            self._load_natively(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        if not self._is_one_model(model, wanted):
            if not os.path.isfile(os.path.join(checkpoint_id, ".metadata")):
                raise LayoutError(
                    f"{checkpoint_id}: a model in parts (a pipeline), or with an optimizer for each parameter, is "
                    "restored from torchtitan's own local folders alone; resume this one without a pipeline, save, and "
                    "go on from what it saved"
                )
            self._load_natively(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        self._restore(checkpoint_id, model, wanted)

    def _load_natively(self, *arguments: Any) -> None:
        with native_load("torchtitan", self._options):
            super().dcp_load(*arguments)

    def _is_one_model(self, model: Any, wanted: list[str]) -> bool:
        """Whether every rank has the whole model in one part, and one optimizer for it; every rank must call."""
        optimizers = list(self.states[_titan.OPTIMIZER]) if _titan.OPTIMIZER in wanted else [None]
        names = sorted(name for part in model.model for name, _ in part.named_parameters())
        with open_session() as session:
            told = session.channel.gather("parts of the model", [len(model.model), len(optimizers), names])
        return told[0][:2] == [1, 1] and all(one == told[0] for one in told)

    def _restore(self, path: str, model: Any, wanted: list[str]) -> None:
        """Restores the model and the parts `wanted` by rankload."""
        optimizer = next(iter(self.states[_titan.OPTIMIZER])) if _titan.OPTIMIZER in wanted else None
        scheduler = next(iter(self.states[_titan.LR_SCHEDULER])) if _titan.LR_SCHEDULER in wanted else None
        left_out = [part for part, one in (("optimizer", optimizer), ("scheduler", scheduler)) if one is None]
        result = load(
            path,
            State(model.model[0], optimizer, scheduler),
            object_store=self._object_store,
            load_weights_only=not wanted,
            progress_bar=False,
            options=leave_out(self._options, left_out) if wanted else self._options,
        )
        self.rankload_result = result
        model.cache_state_dict = model._get_state_dict()
        for key in wanted:
            if key == _titan.TRAIN_STATE:
                _restore_counters(self.states[key], result, self.states.get(_titan.DATALOADER))
            elif key == _titan.DATALOADER:
                _restore_position(self.states[key], result.extra.get(key), path)
            elif key not in (_titan.OPTIMIZER, _titan.LR_SCHEDULER):
                if key not in result.extra:
                    raise MismatchError(
                        f"{path} has no {key!r}, which this job saves; leave it out with "
                        f"checkpoint.exclude_from_loading=[{key!r}]"
                    )
                self.states[key].load_state_dict(result.extra[key])


@contextlib.contextmanager
def replaced(
    *, object_store: Any = None, options: LoadOptions | Mapping[str, Any] | None = None
) -> Iterator[None]:
    """A block in which torchtitan's Trainer makes our `CheckpointManager`; it undoes itself.

    Args:
        object_store, options: as `rankload.load` takes them.

    Raises:
        OptionError: torchtitan is one that makes its manager in another way, as 0.3 does.
    """
    train = importlib.import_module("torchtitan.train")
    if not hasattr(train, "CheckpointManager"):
        raise OptionError(
            f"this torchtitan makes its CheckpointManager in another way than {', '.join(TRIED)}, which the adapter is "
            "for: install torchtitan 0.2.2, or restore the checkpoint by rankload.load in a job of your own"
        )
    before = train.CheckpointManager
    ours = functools.partial(CheckpointManager, object_store=object_store, options=options)
    train.CheckpointManager = ours  # type: ignore[attr-defined]
    try:
        yield
    finally:
        train.CheckpointManager = before  # type: ignore[attr-defined]


def _restore_counters(owner: Any, result: LoadResult, loader: Any) -> None:
    """Sets the step, and what else the Trainer counts, where the checkpoint has it."""
    now, saved = owner.state_dict(), result.extra.get(_titan.TRAIN_STATE)
    if isinstance(saved, Mapping) and now.keys() <= saved.keys():
        numbers = {key: _number(saved[key]) for key in now}
        ranks = _saved_ranks(result)
        _compare_batch(owner, loader, numbers, ranks)
        if _TOKENS in numbers:
            numbers[_TOKENS] = _tokens_of_rank(numbers[_TOKENS], ranks, loader)
        owner.load_state_dict({key: _like(now[key], numbers[key]) for key in now})
        return
    if result.step is None or "step" not in now:
        warn("the checkpoint does not say at which step it was saved: the job begins at 0", stacklevel=3)
        return
    owner.load_state_dict({**now, "step": _like(now["step"], result.step)})
    others = sorted(now.keys() - {"step"})
    if others:
        warn(f"the checkpoint was not saved by torchtitan: {', '.join(others)} begins at 0", stacklevel=3)


def _saved_ranks(result: LoadResult) -> int | None:
    """The data-parallel ranks that saved the checkpoint, which the position in the data tells."""
    position = result.extra.get(_titan.DATALOADER)
    ranks = _number(position.get("world_size")) if isinstance(position, Mapping) else None
    return ranks if isinstance(ranks, int) and ranks > 0 else None


def _tokens_of_rank(tokens: int, saved_ranks: int | None, loader: Any) -> int:
    """The tokens that this rank counts on from, so that all ranks together have those that the saved ones had.

    Each rank counts its own, and the checkpoint has one rank's.
    """
    ranks, rank = getattr(loader, "dp_world_size", None), getattr(loader, "dp_rank", None)
    if saved_ranks is None or ranks is None or rank is None or ranks == saved_ranks:
        return tokens
    each, rest = divmod(tokens * saved_ranks, int(ranks))
    return each + int(rank < rest)


def _compare_batch(owner: Any, loader: Any, numbers: Mapping[str, Any], saved_ranks: int | None) -> None:
    """Warns where a step has another number of tokens than it had on average when the checkpoint was saved."""
    ranks = getattr(loader, "dp_world_size", None)
    if ranks is None or saved_ranks is None:
        return
    remedy = "Keep training.global_batch_size and training.seq_len"
    training = getattr(getattr(owner, "job_config", None), "training", None)
    accumulated = getattr(owner, "gradient_accumulation_steps", None)
    step, tokens = numbers.get("step"), numbers.get(_TOKENS)
    if training is None or accumulated is None or not step or not tokens:
        warn_of_unknown_batch(saved_ranks, ranks, counted_by="torchtitan", remedy=remedy)
        return
    warn_of_batch(
        round(tokens * saved_ranks / step),
        training.local_batch_size * training.seq_len * accumulated * ranks,
        counted_by="torchtitan",
        remedy=remedy,
        unit="tokens on average",
    )


def _number(saved: Any) -> Any:
    return saved.item() if hasattr(saved, "item") else saved


def _like(now: Any, saved: Any) -> Any:
    """The number `saved` in the form that the job has it in: a number, or a tensor."""
    number = _number(saved)
    return now.new_tensor(number) if hasattr(now, "new_tensor") else number


def _restore_position(loader: Any, saved: Any, path: str) -> None:
    """Hands the loader its position, where the saving job had as many data-parallel ranks; else warns."""
    if loader is None:
        return
    size = getattr(loader, "dp_world_size", None)
    if not isinstance(saved, Mapping) or saved.get("world_size") != size:
        before = saved.get("world_size") if isinstance(saved, Mapping) else None
        why = (
            f"it was saved by {before} data-parallel ranks, and here are {size}"
            if before is not None
            else "the checkpoint has none that fits"
        )
        warn(f"the position in the data is not restored, and it begins again: {why}", stacklevel=4)
        return
    # torchtitan unpickles what it is handed: so that is made anew from what may be made. Every rank looks at all of
    # them, so that all raise where one would.
    loader.load_state_dict(
        {
            key: pickle.dumps(_position(value, f"{path}: {_titan.DATALOADER}/{key}"))
            if isinstance(value, bytes)
            else value
            for key, value in saved.items()
        }
    )


def _position(pickled: bytes, name: str) -> Any:
    """What a rank's pickled position is, without running the pickle. Raises `UnsafeError` where that needs a type of
    the user's."""
    from ..loader.materialize.objects import materialize
    from ..loader.materialize.tensors import TensorReader

    with tempfile.NamedTemporaryFile() as file:
        file.write(pickled)
        file.flush()
        tree, _ = read_plain(file.name, name=name, memory_limit=_LARGEST_POSITION, largest=_LARGEST_POSITION)
        found = materialize(tree, reader=TensorReader(verify="off"), file=name)
    types = inert_types(found)
    if types:
        raise UnsafeError(
            f"{name} holds objects of types that are not made: {', '.join(types)}; leave the position out with "
            f"checkpoint.exclude_from_loading=['{_titan.DATALOADER}']"
        )
    return found
