"""Opens a session, the way in to this package: every rank's place, confirmed, and a channel between the ranks."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .channel import Channel, open_channel
from .group import process_group
from .shutdown import terminable
from .topology import Topology, confirm_topology, discover_topology, group_topology

DEFAULT_STALL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Session:
    """This rank's place among the ranks of the job, and the channel between them."""

    topology: Topology
    channel: Channel


@contextmanager
def open_session(*, stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S) -> Iterator[Session]:
    """A session of all ranks of the job, which have agreed on each one's place. Every rank must enter.

    The default process group is used where there is one; otherwise one is made on gloo from the environment,
    and destroyed at the end. SIGTERM inside the block runs every clean-up before the process ends.

    Args:
        stall_timeout_s: seconds without progress of any rank after which those that wait raise StalledError.

    Raises:
        TopologyError: rank, world size or node cannot be determined, or contradict each other.
        PeerError: another rank died or was interrupted.
        StalledError: nothing moved for `stall_timeout_s`.
    """
    with terminable():
        found = discover_topology()
        opened: list[Channel] = []
        with (
            process_group(
                found,
                timeout_s=stall_timeout_s,
                absent=lambda: sum(one.absent for one in opened),
                store_lost=lambda: any(one.store_is_lost for one in opened),
            ) as topology,
            open_channel(topology, stall_timeout_s=stall_timeout_s) as channel,
        ):
            opened.append(channel)
            confirmed = confirm_topology(topology, channel)
            channel.watch_neighbours(confirmed.ranks_by_node[confirmed.node_rank])
            yield Session(confirmed, channel)


@contextmanager
def open_session_alone(*, stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S) -> Iterator[Session]:
    """A session of this process alone, whatever job it may be part of; it needs no torch. One process enters."""
    with terminable():
        alone = Topology(0, 0, 1, 1, 0, 1, "python", socket.gethostname())
        with open_channel(alone, stall_timeout_s=stall_timeout_s) as channel:
            yield Session(confirm_topology(alone, channel), channel)


def current_topology() -> Topology:
    """This process's place, without asking the other ranks: by the default process group, else by the launcher's
    variables. Raises `TopologyError` where the two contradict each other."""
    found = discover_topology()
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return group_topology(dist.get_rank(), dist.get_world_size(), found)
    return found
