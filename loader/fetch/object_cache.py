"""Says where the objects of one store go in the node's cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..stores.base import Store

if TYPE_CHECKING:
    from ..cache.node import CacheEntry, NodeCache


@dataclass(frozen=True, slots=True)
class ObjectCache:
    """A store, and the cache that its objects go into while a load reads them."""

    store: Store
    cache: NodeCache
    load_id: str
    """Of the load, the same on all ranks."""

    def entry(
        self, name: str, size_bytes: int | None, version: str | None, *, nbytes: int | None
    ) -> CacheEntry:
        """The entry of one version of the object `name`, which takes `nbytes` at most, where that is known."""
        # Without a version and a size, nothing shows that the object is still the same in another load.
        lasting = version is not None and size_bytes is not None
        return self.cache.entry(
            self.store.describe(name),
            self.store.identity,
            name,
            str(size_bytes),
            version if lasting else f"load {self.load_id}",
            nbytes=nbytes,
            lasting=lasting,
        )
