"""Addresses, MACs and places in the port range of a platform: allotted once, then kept.

Every U-Cloud's network has a range, by default a /16 of its own out of 10.64.0.0/10; every
platform has a /24 of it; the first address there is the platform's, the EEs get the next ones.
What an EE has it keeps for as long as it stays on its platform.
"""

import ipaddress
from collections.abc import Iterable, Mapping, Sequence

from supercloud.control.documents import Assignment, PlatformWish
from supercloud.control.kept import Place
from supercloud.model.errors import NoResources
from supercloud.model.resources import Environment, Network

ALL_RANGES = ipaddress.IPv4Network("10.64.0.0/10")
RANGE_PREFIX, PLATFORM_PREFIX = 16, 24
FIRST_HOST, LAST_HOST = 2, 254


def ranges(
    networks: Sequence[Network], kept: Mapping[str, str], taken: Iterable[str]
) -> dict[str, str]:
    """Network name -> range: the one asked for, or the one that it has, or a free one.

    ``taken`` are ranges that other U-Clouds have. Raises NoResources when none is free.
    """
    result = {network.name: network.range for network in networks if network.range}
    used = [ipaddress.IPv4Network(item) for item in [*taken, *result.values()]]
    for network in networks:
        if network.range:
            continue
        own = kept.get(network.name)
        if own is None or _overlaps(ipaddress.IPv4Network(own), map(_net, result.values())):
            own = _free_range(used)
        result[network.name] = own
        used.append(ipaddress.IPv4Network(own))
    return result


def _net(text: str) -> ipaddress.IPv4Network:
    return ipaddress.IPv4Network(text)


def _overlaps(candidate: ipaddress.IPv4Network, others: Iterable[ipaddress.IPv4Network]) -> bool:
    return any(candidate.overlaps(other) for other in others)


def _free_range(used: Sequence[ipaddress.IPv4Network]) -> str:
    for candidate in ALL_RANGES.subnets(new_prefix=RANGE_PREFIX):
        if not _overlaps(candidate, used):
            return str(candidate)
    raise NoResources(
        f"all /{RANGE_PREFIX} networks of {ALL_RANGES} are in use",
        hint="give the network a `range` of your own",
    )


def index(name: str, kept: Mapping[str, PlatformWish], used: set[int], limit: int) -> int:
    """The number of a platform: the one that it has, or the lowest free one below ``limit``."""
    if name in kept:
        return kept[name].index
    for number in range(limit):
        if number not in used:
            return number
    raise NoResources(
        f"the networks have room for {limit} platforms, one more is needed",
        hint=f"give the networks ranges with more than {limit} /{PLATFORM_PREFIX} in them",
    )


def platforms_in(ranges_: Iterable[str]) -> int:
    """How many platforms have a /24 in every one of these ranges."""
    return min(
        (1 << max(0, PLATFORM_PREFIX - _net(item).prefixlen) for item in ranges_), default=1 << 16
    )


class Addresses:
    """Hands out addresses and port slots. ``kept`` are the assignments as they were."""

    def __init__(self, ranges_: Mapping[str, str], kept: Mapping[str, Assignment]) -> None:
        """``ranges_`` maps network name to range."""
        self._ranges, self._kept = ranges_, kept
        self._addresses: set[tuple[str, str]] = {
            (item.network, item.address) for item in kept.values()
        }
        self._slots: set[tuple[str, str, int]] = {
            (item.platform, port.partition("/")[2], slot)
            for item in kept.values()
            for port, slot in item.slots.items()
        }

    def assign(
        self,
        name: str,
        environment: Environment,
        platform: PlatformWish,
        place: Place | None = None,
    ) -> Assignment:
        """What the EE ``name`` gets on ``platform``; what it has there, it keeps.

        ``place`` is another one in the network, on whatever platform, that it comes back to.
        """
        subnet = self._subnet(environment.network, platform)
        had = self._kept.get(name)
        stays = had is not None and had.platform == platform.name
        slots = self._ports(environment, platform, had.slots if had and stays else {})
        back: Place | None = place or (had if had and stays and had.moved else None)
        if back is not None and back.network == environment.network:
            self._addresses.add((back.network, back.address))
            return Assignment(
                platform=platform.name,
                network=back.network,
                address=back.address,
                prefix_length=back.prefix_length,
                gateway=back.gateway,
                mac=back.mac,
                slots=slots,
                moved=not _within(back, environment, subnet),
            )
        address = had.address if had and stays and _within(had, environment, subnet) else ""
        address = address or self._free_address(environment.network, subnet)
        return Assignment(
            platform=platform.name,
            network=environment.network,
            address=address,
            prefix_length=PLATFORM_PREFIX,
            gateway=str(subnet[1]),
            mac=mac_of(address),
            slots=slots,
        )

    def _subnet(self, network: str, platform: PlatformWish) -> ipaddress.IPv4Network:
        base = _net(self._ranges[network])
        start = int(base.network_address) + platform.index * (1 << (32 - PLATFORM_PREFIX))
        return ipaddress.IPv4Network((start, PLATFORM_PREFIX))

    def _free_address(self, network: str, subnet: ipaddress.IPv4Network) -> str:
        for number in range(FIRST_HOST, LAST_HOST + 1):
            address = str(subnet[number])
            if (network, address) not in self._addresses:
                self._addresses.add((network, address))
                return address
        raise NoResources(f"no address is free in {subnet}", hint="use more, smaller platforms")

    def _ports(
        self, environment: Environment, platform: PlatformWish, had: Mapping[str, int]
    ) -> dict[str, int]:
        result = {}
        for port in environment.ports:
            if port.publish:
                name = f"{port.port}/{port.protocol}"
                slot = had.get(name, -1)
                result[name] = slot if slot >= 0 else self._free_slot(platform, port.protocol)
        return result

    def _free_slot(self, platform: PlatformWish, protocol: str) -> int:
        for slot in range(platform.size.ports):
            if (platform.name, protocol, slot) not in self._slots:
                self._slots.add((platform.name, protocol, slot))
                return slot
        raise NoResources(
            f"all {platform.size.ports} published ports of platform {platform.name} are in use",
            hint="raise `platform.ports`",
        )


def _within(had: Place, environment: Environment, subnet: ipaddress.IPv4Network) -> bool:
    return had.network == environment.network and ipaddress.IPv4Address(had.address) in subnet


def mac_of(address: str) -> str:
    """The MAC of an EE: 02:5c and its IPv4 address, so that it is unique where the address is."""
    octets = ipaddress.IPv4Address(address).packed
    return ":".join(f"{octet:02x}" for octet in (0x02, 0x5C, *octets))
