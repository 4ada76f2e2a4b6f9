"""The default process group for the length of a block: the user's as it is, or a gloo group made and destroyed here."""

from __future__ import annotations

import itertools
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from .channel import LINGER_AFTER_FAILURE_S, LINGER_S
from .errors import PeerError
from .rendezvous import (
    GRACE_S,
    MeetingPoint,
    RollCall,
    answered,
    await_all,
    meeting_point,
    open_meeting_store,
    own_keys,
    reaching,
)
from .sockets import Sockets, connected_since, open_sockets, shut_down
from .topology import Topology, group_topology

_groups = itertools.count()
"""Numbers the groups made by this process."""


@contextmanager
def process_group(
    topology: Topology,
    timeout_s: float = 120.0,
    absent: Callable[[], int] = lambda: 0,
    store_lost: Callable[[], bool] = lambda: False,
) -> Iterator[Topology]:
    """A default process group for the block, and the topology that fits it.

    An initialised group is used as it is, whatever its backend, and left as it is: its rank and size count.
    Otherwise, with more than one rank, a gloo group is made at the meeting point of `rendezvous` and
    destroyed at the end, on success and failure. With one rank nothing is made. Every rank must enter.

    Args:
        topology: as discovered.
        timeout_s: seconds for which a rank that has not joined is waited for, and the time-out of a group made
            here.
        absent: how many ranks are known, at the end of the block, not to come there: rank 0 does not wait for them.
        store_lost: whether it is known, at the end of the block, that the store answers no more: nobody is asked then.

    Raises:
        TopologyError: the group and the environment contradict each other, or no meeting point is known.
        StalledError: a rank did not join.
        PeerError: a rank joined and ended.
    """
    if _is_initialised():
        import torch.distributed as dist

        yield group_topology(dist.get_rank(), dist.get_world_size(), topology)
    elif topology.world_size == 1:
        yield topology
    else:
        with _own_group(topology, timeout_s, absent, store_lost):
            yield topology


@contextmanager
def _own_group(
    topology: Topology, timeout_s: float, absent: Callable[[], int], store_lost: Callable[[], bool]
) -> Iterator[None]:
    import torch.distributed as dist

    point = meeting_point(topology)
    call = next(_groups) + 1
    before = open_sockets()
    server = open_meeting_store(point, topology, timeout_s, call)
    connection = connected_since(before, point.port)
    farewell: socket.socket | None = None
    failed = True
    keys: Any = None
    store: Any = None
    try:
        with answered(connection, timeout_s):
            keys = own_keys(server, point, topology, timeout_s, call)
            store = keys.store
            if topology.rank == 0:
                farewell = _open_farewell(store, topology, point)
            roll_call = await_all(keys, topology, timeout_s, call)
            if topology.rank != 0:
                farewell = _open_farewell(store, topology, point)
        _make_group(store, topology, timeout_s, roll_call, connection)
        yield
        failed = False
    finally:
        if _is_initialised():
            dist.destroy_process_group()
        longest_s = LINGER_AFTER_FAILURE_S if failed else LINGER_S
        # Once a rank leaves the block, the user may make a group at the same address, where no rank may then still
        # find the server of this one. So rank 0 closes it when all have left, and the others wait until it has.
        # A thread asks the server, because one whose process is stopped never answers.
        leaving: Any = threading.Thread(
            target=_leave, args=(store, topology, longest_s, absent()), daemon=True
        )
        answers = not store_lost()
        if answers:
            leaving.start()
            leaving.join(longest_s + 0.5)
            answers = not leaving.is_alive()
        if not answers:
            shut_down(connection)
            if leaving.ident is not None:
                leaving.join(LINGER_AFTER_FAILURE_S)
        keys = store = server = leaving = None  # The last references: the server ends here.
        if farewell is not None:
            with farewell:
                if topology.rank != 0 and answers:
                    _await_end(farewell, longest_s)


def _make_group(
    store: Any, topology: Topology, timeout_s: float, roll_call: RollCall, connection: Sockets
) -> None:
    """Makes the group in a thread: gloo waits in native code for ranks that have ended, which are noticed here, and for
    a store that never answers, whose `connection` ends then."""
    import torch.distributed as dist

    outcome: list[BaseException | None] = []

    def make() -> None:
        try:
            dist.init_process_group(
                "gloo",
                store=store,
                rank=topology.rank,
                world_size=topology.world_size,
                timeout=timedelta(seconds=timeout_s),
            )
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=make, name="rankload-group", daemon=True)
    thread.start()
    begin = time.monotonic()
    while not outcome:
        thread.join(0.05)
        roll_call.look([], tells=False)
        if time.monotonic() - begin > timeout_s + GRACE_S:
            shut_down(connection)
    thread.join()
    if isinstance(outcome[0], RuntimeError):
        raise PeerError(
            f"rank {topology.rank} could not make the gloo process group: {outcome[0]}", rank=topology.rank
        ) from outcome[0]
    if outcome[0] is not None:
        raise outcome[0]


def _leave(store: Any, topology: Topology, longest_s: float, absent: int) -> None:
    """Counts this rank as left; on rank 0 waits until all are that come. Without a store it has never come."""
    if store is None:
        return
    key = "left"
    until = time.monotonic() + longest_s
    # Where the store is lost, no rank can wait for this one there.
    with suppress(RuntimeError):
        left = store.add(key, 1)
        while topology.rank == 0 and left < topology.world_size - absent and time.monotonic() < until:
            time.sleep(0.01)
            left = store.add(key, 0)


def _open_farewell(store: Any, topology: Topology, point: MeetingPoint) -> socket.socket | None:
    """A socket that ends when rank 0 closes its own: rank 0's is the listener, all others are connected to it.

    None where an agent hosts the store, or rank 0 can't be reached. A connection to the store's server won't do: it
    can end before the server's port is free again.
    """
    if point.hosted:
        return None
    if topology.rank == 0:
        listener = socket.create_server(("", 0), backlog=max(128, topology.world_size))
        reaching(lambda: store.set("farewell", str(listener.getsockname()[1])))
        return listener
    port = int(reaching(lambda: store.get("farewell")))
    with suppress(OSError):
        return socket.create_connection((point.host, port), timeout=5.0)
    return None


def _await_end(connection: socket.socket, longest_s: float) -> None:
    """Returns when rank 0 has closed `connection`, or after `longest_s`."""
    connection.settimeout(0.05)
    until = time.monotonic() + longest_s
    while time.monotonic() < until:
        try:
            if not connection.recv(1):
                return
        except TimeoutError:
            continue
        except OSError:
            return


def _is_initialised() -> bool:
    # A process that has not imported torch.distributed has no group, and need not pay for the import.
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and bool(dist.is_initialized())
