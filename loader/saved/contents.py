"""Holds what a checkpoint holds, whatever the layout of its files: parts under the names that Composer gives them.

Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .tensor import SavedTensor

ENGINE = "engine"
"""The part of a checkpoint's state that only a DeepSpeed engine can take: counters, loss scale and the like."""

_ENGINE_SCALER = frozenset(
    {
        "loss_scaler",
        "dynamic_loss_scale",
        "cur_scale",
        "cur_iter",
        "last_overflow_iter",
        "scale_factor",
        "scale_window",
    }
)
"""What of it is the loss scaler's."""


@dataclass(frozen=True, slots=True)
class SetFile:
    """One of the files that a checkpoint consists of."""

    name: str
    """Relative to the checkpoint's folder; where it is none, the object's name."""
    least_bytes: int = 1
    """It is not whole where it is shorter."""
    beside: bool = False
    """Whether its name is relative to the folder that the path names, in which a framework puts more files."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint's parts as nested dicts, whose tensors are `SavedTensor`: nothing of them was read."""

    name: str
    """What messages and the receipt call the checkpoint; without secrets."""
    kind: str
    """``monolithic``, ``sharded``, ``slices``, ``rank-shards``, ``dcp``, ``composer-zero`` or ``deepspeed``."""
    layout: str
    """``composer``, ``lightning``, ``trainer``, ``accelerate``, ``state dict``, ``safetensors``, ``hand-written`` or
    ``deepspeed``."""
    state: dict[str, Any]
    """``model``, ``optimizers``, ``schedulers`` and so on."""
    rng: list[Any] | None = None
    """Random states, by saved rank; None where the checkpoint has none."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Top-level entries that are neither: a training script's own, or DeepSpeed's ``client_state``."""
    world_size: int | None = None
    """Ranks that saved it; None where it does not say."""
    data_parallel_size: int | None = None
    """Ranks that each part of the model was partitioned over; None where it was not."""
    global_steps: int | None = None
    """Steps that a DeepSpeed engine had done."""
    batch_size: int | None = None
    """Samples of one such step, over all ranks; None where the checkpoint does not say."""
    zero_stage: int | None = None
    """DeepSpeed's ZeRO stage, 0 to 3; None where it was saved by none of its engines."""
    masters: Mapping[str, SavedTensor] = field(default_factory=dict)
    """By a name in ``state/model``: the fp32 weights that the optimizer updates in place of those, or those themselves
    where the checkpoint has no others."""
    unnamed_masters: tuple[tuple[SavedTensor, ...], ...] = ()
    """The same where they are kept in the order of the optimizer's groups, without names (`masters.name_masters`)."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names of tied parameters to the one under which the optimizer's state is kept."""
    engine_schedulers: frozenset[str] = frozenset()
    """The keys in ``state/schedulers`` that a DeepSpeed engine saved itself."""
    rng_per_rank: bool = False
    """Whether each saved rank's random state is in its own file; otherwise one file has those of all ranks."""
    own_rng: bool = True
    """With `rng_per_rank`: whether this rank's counterpart among the saved ranks had its random state kept."""
    notes: tuple[str, ...] = ()
    """Sentences for the receipt."""
    files: tuple[SetFile, ...] = ()
    """All files of the checkpoint, whether this rank reads them or not, as far as those that it read name them."""
    unfinished: tuple[str, ...] = ()
    """Sentences on what shows that a save of it did not end, though all that is restored may be there."""
    unfiltered: Saved | None = None
    """The same before ``ignore_keys``; None where nothing was left out."""

    @property
    def whole(self) -> Saved:
        """The same as the checkpoint has it, before ``ignore_keys``."""
        return self if self.unfiltered is None else self.unfiltered

    def as_tree(self) -> dict[str, Any]:
        """The nested dict that ``ignore_keys`` applies to."""
        tree: dict[str, Any] = {"state": self.state}
        if self.rng is not None:
            tree["rng"] = self.rng
        for key, value in self.extra.items():
            tree.setdefault(key, value)
        return tree

    def with_tree(self, tree: Mapping[str, Any]) -> Saved:
        """The same after ``ignore_keys`` changed its nested dict."""
        state = tree.get("state")
        rng = tree.get("rng") if self.rng is not None else None
        own = {"state"} if self.rng is None else {"state", "rng"}
        extra = {key: value for key, value in tree.items() if key not in own}
        if "state" in self.extra:
            # A hand-written file's own entry of this name, which was not in the nested dict.
            extra["state"] = self.extra["state"]
        return replace(
            self,
            state=dict(state) if isinstance(state, Mapping) else {},
            rng=list(rng) if isinstance(rng, list | tuple) else None,
            extra=extra,
            unfiltered=self.whole,
        )

    def only(self, parts: frozenset[str], *, without: bool = False) -> Saved:
        """The same with those `parts` of its state alone, or `without` them; before ``ignore_keys`` too."""
        kept = {key: value for key, value in self.state.items() if (key in parts) != without}
        before = None if self.unfiltered is None else self.unfiltered.only(parts, without=without)
        return replace(self, state=kept, unfiltered=before)

    def without_schedulers(self, keys: frozenset[str]) -> Saved:
        """The same without the schedulers of `keys`; before ``ignore_keys`` too."""
        schedulers = self.state.get("schedulers")
        if not keys or not isinstance(schedulers, Mapping):
            return (
                self
                if self.unfiltered is None
                else replace(self, unfiltered=self.unfiltered.without_schedulers(keys))
            )
        kept = {key: value for key, value in schedulers.items() if key not in keys}
        state = {**self.state, "schedulers": kept}
        before = None if self.unfiltered is None else self.unfiltered.without_schedulers(keys)
        return replace(self, state=state, unfiltered=before)

    def without(self, parts: Collection[str]) -> Saved:
        """The same without those `parts`, as if the checkpoint lacked them.

        ``rng`` is one too. An engine's loss scaler goes with ``scaler``.
        """
        state = {key: value for key, value in self.state.items() if key not in parts}
        if "scaler" in parts and isinstance(state.get(ENGINE), Mapping):
            state[ENGINE] = {key: one for key, one in state[ENGINE].items() if key not in _ENGINE_SCALER}
        before = None if self.unfiltered is None else self.unfiltered.without(parts)
        left = replace(self, state=state, unfiltered=before)
        return replace(left, rng=None, rng_per_rank=False) if "rng" in parts else left

    def paths_of(self, parts: Collection[str]) -> tuple[str, ...]:
        """The places of what `without` takes out, as ``ignore_keys`` writes them."""
        engine = self.state.get(ENGINE) if "scaler" in parts else None
        scaler = [key for key in engine if key in _ENGINE_SCALER] if isinstance(engine, Mapping) else []
        return (
            *(f"state/{part}" for part in self.state if part in parts),
            *(f"state/{ENGINE}/{key}" for key in scaler),
            *(("rng",) if "rng" in parts and self.rng is not None else ()),
        )

    @property
    def step(self) -> int | None:
        """The steps that were done when it was saved: those of Composer's timestamp, of a DeepSpeed engine or of
        transformers' Trainer, else an entry of the file; None where it does not say, or says two things."""
        for known in (self._of_timestamp("batch"), self.global_steps):
            if known is not None:
                return known
        trainer = self.whole.extra.get("trainer_state")
        known = _the_number(trainer, ("global_step",)) if isinstance(trainer, Mapping) else None
        return (
            known
            if known is not None
            else _the_number(self.whole.extra, ("global_step", "step", "iteration"))
        )

    def step_with(self, extra: Mapping[str, Any]) -> int | None:
        """As `step`; else that of torchtitan, which is in a tensor: `extra` has the real values."""
        state = extra.get("train_state")
        if self.step is not None or not isinstance(state, Mapping):
            return self.step
        step: Any = state.get("step")
        if hasattr(step, "numel") and step.numel() == 1:
            step = step.item()
        return _the_number({"step": step}, ("step",))

    @property
    def epoch(self) -> int | None:
        """The epochs that were done, or the one under way, as whoever saved it counts; None where it does not say."""
        known = self._of_timestamp("epoch")
        return known if known is not None else _the_number(self.whole.extra, ("epoch",))

    def _of_timestamp(self, unit: str) -> int | None:
        timestamp = self.whole.state.get("timestamp")
        if isinstance(timestamp, Mapping):
            timestamp = timestamp.get("Timestamp", timestamp)
        return _the_number(timestamp, (unit,)) if isinstance(timestamp, Mapping) else None

    @property
    def rank_zero_seed(self) -> int | None:
        """The seed that the saved job began with, from which missing random states are derived; None if not saved."""
        for place in (self.state, self.extra):
            seed = place.get("rank_zero_seed")
            if isinstance(seed, int) and not isinstance(seed, bool):
                return seed
        return None


def _the_number(place: Mapping[Any, Any], keys: tuple[str, ...]) -> int | None:
    """The whole number that `place` has under `keys`; None where there is none, or where there are several."""
    values = (place.get(key) for key in keys)
    found = {value for value in values if isinstance(value, int) and not isinstance(value, bool)}
    return found.pop() if len(found) == 1 else None
