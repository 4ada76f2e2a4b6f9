"""Checks on all nodes, before anything is fetched, that each cache folder has room for what is to go into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...distributed.printable import package_logger
from ..cache.homes import Room
from ..errors import AccessError
from ..wire import Json, decode, encode

if TYPE_CHECKING:
    from ...distributed.channel import Channel
    from ..cache.node import NodeCache

_logger = package_logger()


@dataclass(frozen=True, slots=True)
class RoomReport:
    """What one rank has fetched, and what its node is to take."""

    node: int
    host: str
    done_bytes: int
    """That this rank has fetched, or will fetch into its own memory."""
    rooms: tuple[Room, ...]


def agree_on_room(
    channel: Channel,
    node: int,
    cache: NodeCache,
    needed: Mapping[str, int],
    stage: str,
    *,
    direct_bytes: int = 0,
) -> int:
    """Makes room for the `needed` bytes of this node, by folder. Returns all bytes of the job, fetched and planned.

    `direct_bytes` are those that this rank will fetch into its own memory: they count, and need no room in a folder.

    Every rank must call; those that do not fetch for their node give {}. Raises, on every rank, one `AccessError` that
    names each node and folder whose room does not suffice even after eviction. Nothing has been evicted then.
    """
    done = int(channel.counters().get(channel.rank, {}).get("bytes_done", 0))
    report = RoomReport(node, channel.host, done + direct_bytes, tuple(cache.room(needed)))

    def judge(records: Sequence[Json]) -> int:
        return _judge(stage, [decode(RoomReport, record) for record in records])

    planned = channel.decide(f"{stage}: room", encode(report), judge)
    cache.make_room(needed)
    return int(planned)


def _judge(stage: str, reports: Sequence[RoomReport]) -> int:
    rooms = [(one.node, one.host, room) for one in reports for room in one.rooms]
    short = [one for one in rooms if not one[2].fits]
    if short:
        raise AccessError(
            f"{stage}: {'; '.join(_room_text(*one) for one in short)}; nothing was changed; set "
            f"{_remedy([room for _, _, room in short])}",
            path=short[0][2].folder,
        )
    for node, host, room in rooms:
        if room.needed_bytes:
            _logger.info("%s: %s", stage, _room_text(node, host, room))
    return sum(one.done_bytes for one in reports) + sum(room.needed_bytes for _, _, room in rooms)


def _room_text(node: int, host: str, room: Room) -> str:
    return (
        f"node {node} ({host}) is to fetch {room.needed_bytes:,} bytes into {room.folder}, where "
        f"{room.free_bytes:,} are free"
    )


def _remedy(rooms: Sequence[Room]) -> str:
    if any(room.in_memory for room in rooms):
        return "cache_home to 'disk', or cache_dir to a folder with more"
    return "cache_dir to a folder with more"
