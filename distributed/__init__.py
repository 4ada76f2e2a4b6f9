"""Ranks: where they are, how they agree, and how they end. Importing this imports no torch."""

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
