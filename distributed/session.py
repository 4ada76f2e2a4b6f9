"""A session: the ranks of the job, confirmed, and a channel between them, from first word to clean-up."""

from __future__ import annotations

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
    """Who takes part, and how they talk."""

    topology: Topology
    channel: Channel


@contextmanager
def open_session(*, stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S) -> Iterator[Session]:
    """All ranks of the job, in agreement on who and where they are. Every rank must enter.

    The default process group is used where there is one; otherwise one is made on gloo from the environment,
    and destroyed at the end. SIGTERM inside the block runs every clean-up before the process ends.

    Raises:
        TopologyError: rank, world size or node cannot be told, or contradict each other.
        PeerError, StalledError: another rank ended, or nothing moved for `stall_timeout_s`.
    """
    with terminable():
        found = discover_topology()
        with (
            process_group(found, timeout_s=stall_timeout_s) as topology,
            open_channel(topology, stall_timeout_s=stall_timeout_s) as channel,
        ):
            yield Session(confirm_topology(topology, channel), channel)


def current_topology() -> Topology:
    """This process's place, without asking anybody: the default group's word, else the launcher's variables."""
    found = discover_topology()
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return group_topology(dist.get_rank(), dist.get_world_size(), found)
    return found
