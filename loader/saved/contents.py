"""Holds a checkpoint's parts under the names that Composer gives them, whatever the layout of its files. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contents:
    """A checkpoint's parts under Composer's names; their tensors are lazy."""

    layout: str
    """``composer``, ``lightning``, ``state dict``, ``hand-written`` or ``deepspeed``."""
    state: dict[str, Any]
    """``model``, ``optimizers``, ``schedulers`` and so on."""
    rng: list[Any] | None = None
    """Random states, by saved rank; None where the checkpoint has none."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Top-level entries that are neither: a training script's own, or DeepSpeed's ``client_state``."""

    def as_tree(self) -> dict[str, Any]:
        """The nested dict that ``ignore_keys`` applies to."""
        tree: dict[str, Any] = {"state": self.state}
        if self.rng is not None:
            tree["rng"] = self.rng
        for key, value in self.extra.items():
            tree.setdefault(key, value)
        return tree

    def with_tree(self, tree: Mapping[str, Any]) -> Contents:
        """The same contents after ``ignore_keys`` changed its nested dict."""
        state = tree.get("state")
        rng = tree.get("rng") if self.rng is not None else None
        own = {"state"} if self.rng is None else {"state", "rng"}
        extra = {key: value for key, value in tree.items() if key not in own}
        if "state" in self.extra:
            # A hand-written file's own entry of this name, which was not in the nested dict.
            extra["state"] = self.extra["state"]
        return Contents(
            self.layout,
            dict(state) if isinstance(state, Mapping) else {},
            list(rng) if isinstance(rng, list | tuple) else None,
            extra,
        )

    @property
    def rank_zero_seed(self) -> int | None:
        """The seed that the saved job began with, from which missing random states are derived; None if not saved."""
        for place in (self.state, self.extra):
            seed = place.get("rank_zero_seed")
            if isinstance(seed, int) and not isinstance(seed, bool):
                return seed
        return None
