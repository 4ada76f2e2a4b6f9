"""Says by which addresses this machine can be reached: those of its network interfaces, the likeliest first.

Which of them reaches another node, only that node can tell: it tries them (`range_server.PeerConnection`).
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache

from .errors import TopologyError
from .liveness import machine_identity

_SIOCGIFADDR = 0x8915
"""Asks for an interface's IPv4 address (Linux: netdevice(7))."""
_HINTS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
"""Variables by which a job tells others' libraries which interfaces to use; here they set the order."""
_OWN_BRIDGES = ("docker", "br-", "virbr", "veth", "cni", "flannel", "cali", "lxc", "podman", "tun", "tap")
"""Beginnings of the names of interfaces that mostly reach this machine's own containers alone."""
_MOST = 8
"""Addresses that are told at most."""


@lru_cache(maxsize=1)
def network_identity() -> str:
    """The same text in all processes that share this machine's loopback interface; "" where that is not known.

    Host names do not tell it: machines, and containers, may have equal ones.
    """
    boot = machine_identity().partition(" ")[0]
    try:
        return f"{boot} {os.readlink('/proc/self/ns/net')}" if boot else ""
    except OSError:
        return ""


def own_addresses(chosen: str | None = None, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The addresses of this machine that others may reach, the likeliest first, loopback left out.

    First the one from which this machine sends to MASTER_ADDR, which all ranks reach; then those of interfaces that
    `_HINTS` name; others in the system's order; at last the host's name. With `chosen`, only what that names: an
    interface (``eth1``), an address, or a network (``10.1.0.0/16``), several of them with commas.

    Raises `TopologyError` where this machine has nothing that `chosen` names.
    """
    given = os.environ if environ is None else environ
    known = _interfaces()
    if chosen is not None:
        found = [address for name, address in known if _is_chosen(name, address, chosen)]
        if not found:
            has = ", ".join(f"{name} ({address})" for name, address in known) or "none"
            raise TopologyError(
                f"interface={chosen!r} names no interface, address or network of this machine (host "
                f"{socket.gethostname()}), which has {has}; set it to one of them, or leave it out"
            )
        return tuple(found[:_MOST])
    hints = [one for variable in _HINTS for one in _hinted(given.get(variable, ""))]

    def order(one: tuple[str, str]) -> tuple[bool, bool]:
        return not one[0].startswith(tuple(hints)) if hints else False, one[0].startswith(_OWN_BRIDGES)

    others = [address for name, address in sorted(known, key=order) if name != "lo"]
    routed = _towards(given.get("MASTER_ADDR", ""))
    listed = [*others, *routed] if hints else [*routed, *others]
    return (*dict.fromkeys(listed[:_MOST]), socket.gethostname())


def _hinted(text: str) -> list[str]:
    """The beginnings of names in ``eth,=ib0``; none of ``^docker``, which excludes."""
    return [] if text.startswith("^") else [one for one in text.lstrip("=").split(",") if one]


def _is_chosen(name: str, address: str, chosen: str) -> bool:
    for one in (part.strip() for part in chosen.split(",")):
        if one in (name, address):
            return True
        with contextlib.suppress(ValueError):
            if "/" in one and ipaddress.ip_address(address) in ipaddress.ip_network(one, strict=False):
                return True
    return False


def _interfaces() -> list[tuple[str, str]]:
    """Name and address of each interface that has one: IPv4, then global IPv6."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append((name, socket.inet_ntoa(answer[20:24])))
    return [*found, *_of_version_six()]


def _of_version_six() -> Sequence[tuple[str, str]]:
    found = []
    with contextlib.suppress(OSError, ValueError), open("/proc/net/if_inet6", encoding="ascii") as file:
        for line in file:
            digits, _, _, scope, _, name = line.split()
            if scope == "00":
                found.append((name, str(ipaddress.IPv6Address(int(digits, 16)))))
    return found


def _towards(host: str) -> list[str]:
    """The address from which this machine sends to `host`; sends nothing: it asks which way a packet would go."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            address = str(probe.getsockname()[0])
            if not ipaddress.ip_address(address).is_loopback:
                return [address]
    return []
