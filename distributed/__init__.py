"""Coordinates the ranks of a job: where each one stands, how all agree, and how one learns that another died.

`open_session` does, in this order:

1. `shutdown.terminable`: SIGTERM becomes an exception, so that clean-up runs.
2. `topology.discover_topology`: this rank's place, from the variables of its launcher (`launchers`).
3. `group.process_group`: the default process group where there is one; otherwise a gloo group for the length of the
   session, made at the address that `rendezvous` finds. Ranks that end before they join are noticed by `siblings`.
4. `channel.open_channel`: this rank's end of the channel. `agreement` reaches one agreement at a time; `store_thread`
   carries it over torch's key-value store (`key_value`).
5. `topology.confirm_topology`: all ranks' places are compared.

A rank learns in `store_thread` that another died: once a second it looks at heartbeats (`heartbeat`), at the processes
of its own node (`liveness`, `siblings`) and at the outcome that another rank announced. `failures` explains a lost
store. All ranks raise the same error. Inside others' collectives, `watchdog` ends a rank that cannot leave them.
`range_server`, apart from all that, sends byte ranges of files from rank to rank, by the addresses of `interfaces`.

Not guaranteed: that a death is seen at once (about a second on one machine, `heartbeat.SILENT_AFTER_S` across
machines), nor that a rank hears of it outside an agreement or `Channel.progress`: native code and the user's own code
are never interrupted. A rank that lives and does nothing is an error only after ``stall_timeout_s``. Nothing is
encrypted. Nothing that a rank changed is undone.

May import the standard library, and torch inside functions only; nothing else of rankload.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .channel import Channel, open_channel
    from .errors import PeerError, RankloadError, StalledError, TopologyError
    from .group import process_group
    from .session import Session, open_session
    from .shutdown import Terminated, terminable
    from .topology import Topology, confirm_topology, discover_topology, group_topology

__all__ = [
    "Channel",
    "PeerError",
    "RankloadError",
    "Session",
    "StalledError",
    "Terminated",
    "Topology",
    "TopologyError",
    "confirm_topology",
    "discover_topology",
    "group_topology",
    "open_channel",
    "open_session",
    "process_group",
    "terminable",
]

_HOMES = {
    "Channel": "channel",
    "PeerError": "errors",
    "RankloadError": "errors",
    "Session": "session",
    "StalledError": "errors",
    "Terminated": "shutdown",
    "Topology": "topology",
    "TopologyError": "errors",
    "confirm_topology": "topology",
    "discover_topology": "topology",
    "group_topology": "topology",
    "open_channel": "channel",
    "open_session": "session",
    "process_group": "group",
    "terminable": "shutdown",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
