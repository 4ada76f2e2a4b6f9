"""Opens the torch store that the ranks talk over, and reads and writes its keys in calls that never wait.

`key_value_opener` takes the default process group's store, under a prefix of its own for each load.

A ``get`` or ``wait`` of torch's stores blocks until the key is there, can't be interrupted, and logs a
warning when it times out. Every call here returns at once, and a key that is not there is None. All ranks share the
keys; the caller decides which rank writes which. Large values are split so that no message exceeds what TCPStore's
server accepts (8 MiB; more and it closes the connection).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from .errors import TopologyError
from .memory_store import MemoryStore
from .sockets import Sockets, connected_since, open_sockets

VALUE_BYTES = 1 << 20
"""A longer value is split into parts of this size."""
BATCH_KEYS = 256
"""Keys that one message asks for."""
_ABSENT = "\x00absent"
_WHOLE, _SPLIT = b"w", b"s"


class KeyValue:
    """Keys and values over one connection to ``store`` (a ``torch.distributed.Store``).

    Attributes:
        address: of the server, where the store has one.
        connection: its sockets that nobody else uses.
        call: which one of this process's calls over its store this is, from 1 on.
        roster: the keys that all calls over that store share; None where it is known that there is one call.
    """

    def __init__(
        self,
        store: Any,
        address: tuple[str, int] | None = None,
        connection: Sockets | None = None,
        call: int = 1,
        roster: KeyValue | None = None,
    ) -> None:
        self._store = store
        self.address = address
        self.connection = connection or {}
        self._batched = bool(store.has_extended_api())
        self._parts: dict[str, int] = {}
        """How many parts a value has that was put or read here."""
        self.call = call
        self.roster = roster

    def put(self, key: str, value: bytes) -> None:
        """Sets a value; a reader sees all of it or none."""
        if len(value) <= VALUE_BYTES:
            self._parts[key] = 0
            self._store.set(key, _WHOLE + value)
            return
        parts = range(0, len(value), VALUE_BYTES)
        self._parts[key] = len(parts)
        for number, start in enumerate(parts):
            self._store.set(_part(key, number), value[start : start + VALUE_BYTES])
        self._store.set(key, _SPLIT + str(len(parts)).encode())

    def peek(self, key: str) -> bytes | None:
        """The value that `put` set, or None where there is none."""
        raw = self._peek_raw(key)
        return None if raw is None else self._whole(key, raw)

    def peek_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values of many keys; in one message for each `BATCH_KEYS` where the store can and all are there."""
        values: list[bytes | None] = []
        for start in range(0, len(keys), BATCH_KEYS):
            batch = list(keys[start : start + BATCH_KEYS])
            found = self.all_there(batch) if self._batched and len(batch) > 1 else None
            values += [self.peek(key) for key in batch] if found is None else found
        return values

    def all_there(self, keys: Sequence[str]) -> list[bytes] | None:
        """The values of many keys, as `peek_all` has them; None, by one message, where a key is not there."""
        if not self.has_all(keys):
            return None
        values: list[bytes] = []
        for start in range(0, len(keys), BATCH_KEYS):
            batch = list(keys[start : start + BATCH_KEYS])
            raws = self._store.multi_get(batch) if self._batched else [self._store.get(key) for key in batch]
            values += [self._whole(key, raw) for key, raw in zip(batch, raws, strict=True)]
        return values

    def has_all(self, keys: Sequence[str]) -> bool:
        """Whether every key is there: one message."""
        return bool(self._store.check(list(keys)))

    def settle(self, key: str, outcome: str) -> str:
        """Sets ``key`` unless it is set, in one atomic step; returns the value that stands, ours or the earlier one."""
        self._parts[key] = 0
        return bytes(self._store.compare_set(key, "", outcome)).decode()

    def settled(self, key: str) -> str | None:
        """What `settle` left at ``key``, or None."""
        raw = self._peek_raw(key)
        return None if raw is None else raw.decode()

    def count(self, key: str, amount: int) -> int:
        """Adds ``amount`` (0 to look only) to a counter; the new total."""
        return int(self._store.add(key, amount))

    def forget(self, keys: Sequence[str]) -> None:
        """Removes keys that no rank reads any more, where the store can."""
        for key in keys:
            n_parts = self._parts.pop(key, None)
            if n_parts is None:
                raw = self._peek_raw(key)
                if raw is None:
                    continue
                n_parts = int(raw[1:]) if raw[:1] == _SPLIT and raw[1:].isdigit() else 0
            for name in (key, *(_part(key, number) for number in range(n_parts))):
                with contextlib.suppress(NotImplementedError):
                    self._store.delete_key(name)

    def _peek_raw(self, key: str) -> bytes | None:
        # A comparison with a value that no key has changes nothing, and answers at once with what is there.
        raw = bytes(self._store.compare_set(key, _ABSENT, _ABSENT))
        return None if raw == _ABSENT.encode() else raw

    def _whole(self, key: str, raw: bytes) -> bytes:
        raw = bytes(raw)
        self._parts[key] = n_parts = int(raw[1:]) if raw[:1] == _SPLIT else 0
        if not n_parts:
            return raw[1:]
        # Parts are set before their key, so they are all there.
        return b"".join(bytes(self._store.get(_part(key, number))) for number in range(n_parts))


def _part(key: str, number: int) -> str:
    return f"{key}/part{number}"


_loads = itertools.count()
"""Numbers the loads of this process, for the prefixes of their keys."""


def key_value_opener(world_size: int, store: Any = None) -> Callable[[], KeyValue]:
    """A function that opens this rank's connection for the next load, for the thread that will use it to call.

    ``store`` by default: the default process group's, or, with one rank, one in memory. Every rank must call this
    as often as every other: the count of calls is the prefix that keeps loads apart.

    Raises:
        TopologyError: there is no process group, or it has another size or no store.
    """
    if store is None and world_size == 1:
        # Not counted: one rank of a job may look at a checkpoint alone, between two loads of all.
        own = MemoryStore()
        return lambda: KeyValue(own)
    number = next(_loads)
    shared = store if store is not None else _default_store(world_size)

    def open_key_value() -> KeyValue:
        from torch.distributed.distributed_c10d import PrefixStore

        before, address = open_sockets(), _address_of(shared)
        own = _own_connection(shared)
        connection = connected_since(before, None if address is None or own is shared else address[1])
        roster = KeyValue(PrefixStore("rankload/roster", own))
        return KeyValue(PrefixStore(f"rankload/{number}", own), address, connection, number + 1, roster)

    return open_key_value


def _default_store(world_size: int) -> Any:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise TopologyError(f"world size {world_size}, but no process group is initialised to talk over")
    if dist.get_world_size() != world_size:
        raise TopologyError(
            f"world size {world_size}, but the default process group has {dist.get_world_size()} ranks"
        )
    store = dist.distributed_c10d._get_default_store()
    if store is None:
        raise TopologyError("the default process group has no store; initialise it with gloo or nccl")
    return store


def _address_of(store: Any) -> tuple[str, int] | None:
    """The host and port of the TCPStore that `store` is, or is a part of; None for others."""
    while (inner := getattr(store, "underlying_store", None)) is not None:
        store = inner
    host, port = getattr(store, "host", None), getattr(store, "port", None)
    return (host, port) if isinstance(host, str) and isinstance(port, int) else None


def _own_connection(store: Any) -> Any:
    """A clone of the store with a connection that no other thread uses, where torch's version has ``clone``."""
    clone = getattr(store, "clone", None)
    if clone is None:
        return store
    try:
        return clone()
    except NotImplementedError:
        return store
