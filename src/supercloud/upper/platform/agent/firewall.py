"""The platform's nftables rules as one text, replaced as a whole by one ``nft -f``.

EEs reach the world by the uplink and each other inside their network. They reach of the platform
only DNS, DHCP and echo at their gateway; those that use buckets, their object store too, which is a
port of the gateway that leads over the link to one of the rendezvous' address; never the link, the
metadata range or another network. The uids that VM engines run as may open no socket to anywhere.
A port that is not published says so at once, instead of letting its caller wait.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from supercloud.model.records import dataclass
from supercloud.upper.platform.agent import nftables
from supercloud.upper.platform.agent.networks import Network
from supercloud.upper.platform.agent.processes import run
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


def _map(name: str, entries: list[str]) -> str:
    elements = f"elements = {{ {', '.join(entries)} }}" if entries else ""
    return f"map {name} {{ type inet_service : ipv4_addr . inet_service; {elements} }}"


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
) -> str:
    """The text for ``nft -f``. All values must have been validated: they are pasted in."""
    maps: dict[str, list[str]] = {"tcp": [], "udp": []}
    for one in sorted(published):
        maps[one.protocol].append(f"{one.host_port} : {one.address} . {one.port}")
    ordered = sorted(networks, key=lambda network: network.bridge)
    ranges = ", ".join(str(g.network) for network in ordered for g in network.gateways)
    masquerade = f'ip saddr {{ {ranges} }} oifname "{uplink}" masquerade' if ranges else ""
    same = "\n    ".join(f'iifname "{n.bridge}" oifname "{n.bridge}" accept' for n in ordered)
    own = "\n    ".join(_at_gateway(network) for network in ordered)
    to_store = _StoreRules.of(store, [str(g.ip) for n in ordered for g in n.gateways])
    return f"""destroy table inet {TABLE}
table inet {TABLE} {{
  {_map("to_tcp", maps["tcp"])}
  {_map("to_udp", maps["udp"])}
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
    """Applies a ruleset when it differs from the last one."""

    def __init__(self) -> None:
        self._applied = ""

    async def apply(self, text: str) -> None:
        """Replace the table atomically; Permanent when nft refuses."""
        if text != self._applied:
            if nftables.is_there():
                await asyncio.to_thread(nftables.apply, text)
            else:
                await run("nft", "-f", "-", given=text.encode())
            self._applied = text
