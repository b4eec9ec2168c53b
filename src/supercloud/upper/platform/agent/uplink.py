"""The platform's own network interfaces: the link to the control plane, and the uplink.

That has what DHCP says, or, in a clone, what the host said right away.
"""

import asyncio
import ipaddress
import logging
import os

from supercloud.model.errors import SupercloudError
from supercloud.upper.platform.agent import paths
from supercloud.upper.platform.agent.netlink import Link, Netlink
from supercloud.upper.platform.agent.processes import run
from supercloud.wire.lease import Lease

LINK_MAC, UPLINK_MAC = "02:5c:77:", "02:5c:00:"
LINK_ADDRESS = "169.254.77.2/30"
RETRY_S = (1.0, 30.0)
MIN_LEASE_S = 60
_SCRIPT = f"{paths.RUN}/udhcpc.sh"
# udhcpc hands the lease over in the environment; we take it from standard output.
_SCRIPT_TEXT = """#!/bin/sh
[ "$1" = bound ] || exit 0
echo "address $ip/$mask"
for one in $router; do echo "router $one"; done
for one in $dns; do echo "dns $one"; done
echo "lease $lease"
"""

log = logging.getLogger("supercloud.agent.uplink")


Nics = tuple[Link | None, Link | None]
"""The link's and the uplink's."""


def find_nics(links: list[Link]) -> Nics:
    """The link NIC and the uplink NIC, by MAC.

    Elsewhere than on our Lower Layer the first NIC is the uplink, and the link goes over it.
    """
    link = next((nic for nic in links if nic.mac.startswith(LINK_MAC)), None)
    uplink = next((nic for nic in links if nic.mac.startswith(UPLINK_MAC)), None)
    if uplink is None and link is None:
        uplink = next((nic for nic in links if nic.name.startswith(("eth", "en"))), None)
    return link, uplink


def bring_up(address: str = LINK_ADDRESS, known: Nics | None = None) -> Nics:
    """Bring lo and both NICs up, the link with its fixed address; waits for nothing.

    Without an address (in a template) nothing is sent. Those that are ``known`` are up.
    """
    with Netlink() as netlink:
        links = [] if known else netlink.links()
        link, uplink = known or find_nics(links)
        for nic in links:
            if not nic.up and (nic.name == "lo" or nic in (link, uplink)):
                netlink.set_up(nic.index)  # of 1500 bytes: see critiques
        if link and address:
            netlink.set_address(link.index, address)
    return link, uplink


def parse_lease(untrusted: str) -> tuple[str, str, list[str], int]:
    """Interface address, first router ("" if none), resolvers, lease in seconds; ValueError."""
    address, router, resolvers, lease_s = "", "", [], 3600
    for line in untrusted.splitlines()[:64]:
        key, _, value = line.partition(" ")
        if key == "address":
            address = str(ipaddress.IPv4Interface(value))
        elif key == "router" and not router:
            router = str(ipaddress.IPv4Address(value))
        elif key == "dns":
            resolvers.append(str(ipaddress.IPv4Address(value)))
        elif key == "lease" and value.isdigit():
            lease_s = int(value)
    if not address:
        raise ValueError("a lease without an address")
    return address, router, resolvers, lease_s


class Uplink:
    """Keeps a DHCP lease for as long as ``keep`` runs; one that the host has ``told`` at once.

    That holds the first time only: a platform that was restored may have another uplink.
    """

    def __init__(self, nic: Link, told: Lease | None = None) -> None:
        self.nic, self._told = nic, told
        self.address = ""

    def forget_told(self) -> None:
        """This platform was restored, maybe elsewhere."""
        self._told = None

    async def keep(self) -> None:
        """Obtain the lease and renew it at half of its time; returns only where one was told."""
        told, self._told = self._told, None
        if told:
            try:
                self._apply(told.address, told.gateway, told.resolvers)
                return
            except (SupercloudError, ValueError, OSError) as error:
                log.warning("%s does not take %s: %s", self.nic.name, told, error)
        with open(_SCRIPT, "w") as file:
            file.write(_SCRIPT_TEXT)
        os.chmod(_SCRIPT, 0o700)
        wait_s = RETRY_S[0]
        while True:
            try:
                lease_s = await self._obtain()
                wait_s = RETRY_S[0]
                await asyncio.sleep(max(lease_s, MIN_LEASE_S) / 2)
            except (SupercloudError, ValueError, OSError) as error:
                log.warning("no lease on %s: %s", self.nic.name, error)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, RETRY_S[1])

    async def _obtain(self) -> int:
        out = await run(
            "udhcpc", "-i", self.nic.name, "-f", "-q", "-n", "-t", "10", "-T", "1",
            "-s", _SCRIPT, timeout_s=30,
        )  # fmt: skip
        lines = [line for line in out.decode("ascii", "replace").splitlines() if " " in line]
        address, router, resolvers, lease_s = parse_lease("\n".join(lines))
        self._apply(address, router, resolvers)
        return lease_s

    def _apply(self, address: str, router: str, resolvers: list[str]) -> None:
        with Netlink() as netlink:
            netlink.set_address(self.nic.index, address)
            if router:
                netlink.set_default_route(self.nic.index, router)
        write_resolvers(resolvers)
        if address != self.address:
            log.info("uplink %s has %s", self.nic.name, address)
        self.address = address


def write_resolvers(resolvers: list[str]) -> None:
    """For dnsmasq, which looks at the file now and then, and for the platform itself."""
    text = "".join(f"nameserver {one}\n" for one in resolvers[:3])
    for path in (paths.RESOLVERS, "/etc/resolv.conf"):
        with open(f"{path}.part", "w") as file:
            file.write(text)
        os.replace(f"{path}.part", path)
