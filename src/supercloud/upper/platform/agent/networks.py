"""The networks of EEs: a bridge each, the EE's ends, and what DNS and firewall must know."""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import ipaddress
import itertools
import os
import re
import struct
from collections.abc import Iterable, Sequence

from supercloud.model.errors import Invalid
from supercloud.model.records import dataclass
from supercloud.upper.platform.agent import namespaces, paths
from supercloud.upper.platform.agent.netlink import Netlink
from supercloud.upper.platform.agent.state import read_json, write_json
from supercloud.wire.messages import EnvironmentSpec, Nic

MODULES = ("bridge", "veth", "tun", "nf_tables", "nft_ct", "nft_chain_nat", "nft_nat", "nft_masq",
           "nft_reject_inet")  # fmt: skip
MAX_NETWORKS = 64
_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
_MAC = re.compile(r"0[26ae](:[0-9a-f]{2}){5}")
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 2, 0x1000, 0x4000


@dataclass(frozen=True, slots=True)
class Network:
    """``gateways`` are the bridge's own addresses with their prefix lengths.

    There is one for each range that its EEs come from: one that was restored here from another
    platform has kept its address, and the gateway that it knows.
    """

    name: str
    bridge: str
    gateways: tuple[ipaddress.IPv4Interface, ...]


def check_nic(nic: Nic) -> ipaddress.IPv4Interface:
    """The NIC's address; Invalid when something in it is no address or does not fit together."""
    try:
        interface = ipaddress.IPv4Interface(nic.address)
        gateway = ipaddress.IPv4Address(nic.gateway)
    except ValueError as error:
        raise Invalid(str(error), where=f"nic {nic.network}") from error
    if not 8 <= interface.network.prefixlen <= 30 or gateway not in interface.network:
        raise Invalid(f"{nic.gateway} is no gateway of {nic.address}", where=f"nic {nic.network}")
    if interface.ip == gateway:
        raise Invalid(f"{nic.address} is the gateway's own", where=f"nic {nic.network}")
    if not _MAC.fullmatch(nic.mac):
        raise Invalid(f"{nic.mac!r:.40} is no local unicast MAC", where=f"nic {nic.network}")
    return interface


def gateways(
    specs: Iterable[EnvironmentSpec],
) -> dict[str, tuple[ipaddress.IPv4Interface, ...]]:
    """The networks that EEs are in, with the addresses of each bridge; Invalid if they overlap."""
    found: dict[ipaddress.IPv4Network, tuple[str, ipaddress.IPv4Interface]] = {}
    for nic in (nic for spec in specs for nic in spec.nics):
        gateway = ipaddress.IPv4Interface(f"{nic.gateway}/{check_nic(nic).network.prefixlen}")
        name, other = found.setdefault(gateway.network, (nic.network, gateway))
        if name != nic.network:
            raise Invalid(f"the networks {name} and {nic.network} overlap")
        if other != gateway:
            raise Invalid(f"network {nic.network} has two gateways in {gateway.network}")
    for one, second in itertools.pairwise(sorted(found)):
        if one.overlaps(second):
            raise Invalid(f"the networks {found[one][0]} and {found[second][0]} overlap")
    names = sorted({name for name, _ in found.values()})
    if len(names) > MAX_NETWORKS:
        raise Invalid(f"{len(names)} networks, at most {MAX_NETWORKS}")
    return {name: tuple(sorted(g for n, g in found.values() if n == name)) for name in names}


def device_name(kind: str, uid: str, index: int) -> str:
    """A name of at most 15 characters for an EE's device in the platform."""
    return f"{kind}{hashlib.sha256(f'{uid}/{index}'.encode()).hexdigest()[:10]}"


class Networks:
    """Bridges by network; numbers are kept in memory across restarts of the agent."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = read_json(paths.NETWORKS, {})
        self.by_name: dict[str, Network] = {}
        self.settled = asyncio.Event()  # what was applied last is in force: ports lead somewhere

    def ensure(self, specs: Iterable[EnvironmentSpec]) -> None:
        """Make the bridges that the EEs need, and remove the others. Idempotent."""
        wanted = gateways(specs)
        numbers = {name: n for name, n in self._numbers.items() if name in wanted}
        for name in sorted(wanted.keys() - numbers.keys()):
            numbers[name] = min(set(range(MAX_NETWORKS)) - set(numbers.values()))
        with Netlink() as netlink:
            for name in self._numbers.keys() - numbers.keys():
                netlink.delete(f"ee{self._numbers[name]}")
            self.by_name = {
                name: _bridge(netlink, name, f"ee{numbers[name]}", own)
                for name, own in wanted.items()
            }
        if numbers != self._numbers:
            write_json(paths.NETWORKS, numbers)
            self._numbers = numbers

    def attach(self, uid: str, nics: Sequence[Nic], place: str) -> None:
        """Give the namespaces at ``place`` their interfaces (eth0, ...), up, addressed, routed."""
        with namespaces.open_netlink(place) as inside, Netlink() as netlink:
            found = {link.name: link for link in inside.links()}
            loopback = found.get("lo")
            if loopback and not loopback.up:
                inside.set_up(loopback.index)
            for index, nic in enumerate(nics):
                name, link = device_name("ve", uid, index), found.get(f"eth{index}")
                if not (link and netlink.find(name)):
                    self._add_pair(netlink, name, index, nic, place)
                    link = inside.find(f"eth{index}")
                if link is None:
                    raise OSError(errno.ENODEV, f"eth{index} is not in {place}")
                inside.set_address(link.index, nic.address)
                inside.set_up(link.index)
                if index == 0:
                    inside.set_default_route(link.index, nic.gateway)

    def _add_pair(self, netlink: Netlink, name: str, index: int, nic: Nic, place: str) -> None:
        netlink.delete(name)
        bridge = netlink.find(self.by_name[nic.network].bridge)
        descriptor = os.open(f"{place}/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            netlink.add_veth(
                name, master=bridge.index if bridge else 0, peer=f"eth{index}",
                peer_mac=nic.mac, namespace=descriptor,
            )  # fmt: skip
        finally:
            os.close(descriptor)

    def open_tap(self, uid: str, index: int, nic: Nic) -> int:
        """A tap in the NIC's bridge, as a descriptor; it goes when the last copy is closed."""
        name = device_name("tp", uid, index)
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
            fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            with Netlink() as netlink:
                bridge = netlink.find(self.by_name[nic.network].bridge)
                link = netlink.find(name)
                if bridge is None or link is None:
                    raise OSError(errno.ENODEV, f"no {name} or its bridge")
                netlink.set_up(link.index, master=bridge.index)
        except BaseException:
            os.close(tap)
            raise
        return tap

    @staticmethod
    def detach(uid: str, count: int) -> None:
        """Remove what is left of an EE's devices."""
        with Netlink() as netlink:
            for index in range(count):
                netlink.delete(device_name("ve", uid, index))


def sweep_devices(known: Iterable[tuple[str, int]]) -> list[str]:
    """Remove devices of unknown EEs; ``known`` are (uid, number of NICs). Returns their names."""
    keep = {device_name("ve", uid, index) for uid, count in known for index in range(count)}
    removed = []
    with Netlink() as netlink:
        for link in netlink.links():
            if re.fullmatch(r"ve[0-9a-f]{10}", link.name) and link.name not in keep:
                netlink.delete(link.name)
                removed.append(link.name)
    return removed


def _bridge(
    netlink: Netlink, name: str, device: str, own: tuple[ipaddress.IPv4Interface, ...]
) -> Network:
    link = netlink.find(device)
    if link is None:
        netlink.add_bridge(device)
        link = netlink.find(device)
        _quick_neighbours(device)
    if link is None:
        raise OSError(errno.ENODEV, f"{device} could not be made")
    netlink.set_addresses(link.index, map(str, own))
    return Network(name, device, own)


def _quick_neighbours(device: str) -> None:
    """Ask for a starting VM's MAC every 100 ms instead of every second."""
    with open(f"/proc/sys/net/ipv4/neigh/{device}/retrans_time_ms", "w") as file:
        file.write("100")


def prepare_kernel() -> None:
    """Forwarding on; no IPv6 (EEs have none, it would only chatter). Huge pages where asked for.

    Elsewhere the kernel would fill, and so take from a clone's template, 2 MiB for a byte.
    """
    with contextlib.suppress(OSError), open(_HUGE_PAGES, "w") as file:
        file.write("madvise")
    for name, value in (
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/disable_ipv6", "1"),
        ("net/ipv6/conf/default/disable_ipv6", "1"),
        ("net/ipv4/conf/default/rp_filter", "1"),
    ):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/{name}", "w") as file:
            file.write(value)
