"""Holds what the stages of one load work with: the session, the options, the store, and the node's cache."""

from __future__ import annotations

from dataclasses import dataclass

from ..distributed.session import Session
from .cache.node import NodeCache
from .options import Options
from .stages import Stages
from .stores.base import Store


@dataclass(frozen=True)
class LoadContext:
    """What one load has on this rank from its beginning to its end."""

    session: Session
    options: Options
    stages: Stages
    store: Store
    """Where the checkpoint is."""
    cache: NodeCache
    """What this node keeps of it."""

    @property
    def direct(self) -> bool:
        """Whether bytes may be fetched from the store directly into a rank's tensors, past the node's cache."""
        options = self.options
        if self.store.is_local or options.verify == "before":
            return False
        # What is to stay in the cache has to pass through it.
        return options.mode == "direct" or (options.mode == "auto" and not options.cache_size)
