"""The platform's nftables rules as one text, replaced as a whole by one ``nft -f``.

Published ports are elements of its maps, which change without the rest: that is the same in all
clones of a template, which has it in force already.

EEs reach the world by the uplink and each other inside their network. They reach of the platform
only DNS, DHCP and echo at their gateway; those that use buckets, their object store too, which is a
port of the gateway that leads over the link to one of the rendezvous' address; never the link, the
metadata range or another network. The uids that VM engines run as may open no socket to anywhere.
A port that is not published says so at once, instead of letting its caller wait.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from supercloud.model.records import dataclass
from supercloud.upper.platform.agent import nftables, paths
from supercloud.upper.platform.agent.networks import Network
from supercloud.upper.platform.agent.processes import run
from supercloud.upper.platform.agent.state import write_private
from supercloud.wire.places import OBJECTS_LINK_PORT, OBJECTS_PORT

TABLE = "supercloud"
STORE_ADDRESS = "169.254.77.1"
VM_UIDS = (0x7000_0000, 0x7FFF_FFFF)
FORBIDDEN = "{ 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4 }"


class Publication(NamedTuple):
    """A port of the platform's uplink that leads to an EE."""

    protocol: str
    host_port: int
    address: str
    port: int


class Rules(NamedTuple):
    """Two texts for ``nft -f``: the whole table, with no port published, and the ports."""

    frame: str
    ports: str


def _map(name: str) -> str:
    return f"map {name} {{ type inet_service : ipv4_addr . inet_service; }}"


def ports(published: Iterable[Publication]) -> str:
    """The text that publishes these, and no others. All values must have been validated."""
    entries: dict[str, list[str]] = {"tcp": [], "udp": []}
    for one in sorted(published):
        entries[one.protocol].append(f"{one.host_port} : {one.address} . {one.port}")
    lines = [f"flush map inet {TABLE} to_{protocol}" for protocol in entries]
    lines += [
        f"add element inet {TABLE} to_{protocol} {{ {', '.join(found)} }}"
        for protocol, found in entries.items()
        if found
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class StoreWay:
    """How ``clients`` (addresses of EEs) get to the object store: over the NIC ``link``."""

    link: str
    clients: Sequence[str]


def ruleset(
    uplink: str,
    networks: Iterable[Network],
    published: Iterable[Publication],
    store: StoreWay | None = None,
) -> Rules:
    """The texts for ``nft -f``. All values must have been validated: they are pasted in."""
    ordered = sorted(networks, key=lambda network: network.bridge)
    ranges = ", ".join(str(g.network) for network in ordered for g in network.gateways)
    masquerade = f'ip saddr {{ {ranges} }} oifname "{uplink}" masquerade' if ranges else ""
    same = "\n    ".join(f'iifname "{n.bridge}" oifname "{n.bridge}" accept' for n in ordered)
    own = "\n    ".join(_at_gateway(network) for network in ordered)
    to_store = _StoreRules.of(store, [str(g.ip) for n in ordered for g in n.gateways])
    frame = f"""destroy table inet {TABLE}
table inet {TABLE} {{
  {_map("to_tcp")}
  {_map("to_udp")}
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname "{uplink}" dnat ip to tcp dport map @to_tcp
    iifname "{uplink}" dnat ip to udp dport map @to_udp
    {to_store.there}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    {masquerade}
    {to_store.from_us}
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname "{uplink}" ct status dnat accept
    {to_store.through}
    {same}
    iifname "ee*" oifname "{uplink}" ip daddr != {FORBIDDEN} accept
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    ct state established,related accept
    iifname "{uplink}" icmp type echo-request accept
    {own}
    iifname "ee*" udp sport 68 udp dport 67 accept
    iifname "{uplink}" meta l4proto tcp reject with tcp reset
    iifname "{uplink}" meta l4proto udp reject
  }}
  chain output {{
    type filter hook output priority filter; policy accept;
    meta skuid {VM_UIDS[0]}-{VM_UIDS[1]} drop
  }}
}}
"""
    return Rules(frame, ports(published))


@dataclass(frozen=True, slots=True)
class _StoreRules:
    there: str = ""
    from_us: str = ""
    through: str = ""

    @classmethod
    def of(cls, store: StoreWay | None, gateways: Sequence[str]) -> "_StoreRules":
        if store is None or not store.clients or not gateways:
            return cls()
        at = f"ip daddr {STORE_ADDRESS} tcp dport {OBJECTS_LINK_PORT}"
        who = f'iifname "ee*" ip saddr {{ {", ".join(sorted(store.clients))} }}'
        gate = f"ip daddr {{ {', '.join(gateways)} }} tcp dport {OBJECTS_PORT}"
        return cls(
            there=f"{who} {gate} dnat ip to {STORE_ADDRESS}:{OBJECTS_LINK_PORT}",
            from_us=f'oifname "{store.link}" {at} masquerade',
            through=f'{who} oifname "{store.link}" {at} ct status dnat accept',
        )


def _at_gateway(network: Network) -> str:
    """What EEs of a network may ask of the platform, at their own gateway's address only."""
    addresses = ", ".join(str(gateway.ip) for gateway in network.gateways)
    place = f'iifname "{network.bridge}" ip daddr {{ {addresses} }}'
    dns = f"{place} meta l4proto {{ tcp, udp }} th dport 53 accept"
    return f"{dns}\n    {place} icmp type echo-request accept"


class Firewall:
    """Applies what differs from what is in force, as an agent or a template before left it."""

    def __init__(self) -> None:
        self._frame, self._ports = _read(paths.FIREWALL), ""
        self._one = asyncio.Lock()

    async def apply(self, rules: Rules) -> None:
        """Change the table atomically; Permanent when nft refuses: then all is said anew."""
        async with self._one:
            try:
                await self._apply(rules)
            except BaseException:
                self._forget()
                raise

    async def _apply(self, rules: Rules) -> None:
        if rules.frame != self._frame:
            self._forget()
            await _do(rules.frame + rules.ports)
            write_private(paths.FIREWALL, rules.frame)
        elif rules.ports != self._ports:
            await _do(rules.ports)
        self._frame, self._ports = rules

    def _forget(self) -> None:
        """Nobody knows what is in force."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(paths.FIREWALL)
        self._frame = self._ports = ""


async def _do(text: str) -> None:
    if nftables.is_there():
        await asyncio.to_thread(nftables.apply, text)
    else:
        await run("nft", "-f", "-", given=text.encode())


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode()
    except FileNotFoundError:
        return ""
